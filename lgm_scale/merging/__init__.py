"""Merging: one tree of tokens (tree), how its cuts are nested (nesting), how it grows (linkage)."""
