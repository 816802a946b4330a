"""Comparisons: several runs, measured alike, in one table and one picture."""
