"""Merging: one tree of tokens (tree), how its cuts are nested (nesting), how it grows (linkage)."""

from lgm_scale.merging.tree import (
    MergeAssignment,
    MergeTree,
    cosine_similarity,
    in_block_pairs,
    straight_through_merge,
)

__all__ = [
    "MergeAssignment",
    "MergeTree",
    "cosine_similarity",
    "in_block_pairs",
    "straight_through_merge",
]
