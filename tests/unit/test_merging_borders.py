"""Merging of trees small enough to be written down, and the borders of what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.merging.linkage import (
    _positions_in_pairs,
    average_linkage,
    in_block_triangle,
    start_host_copy,
)
from lgm_scale.merging.nesting import Nesting, contrast_basis, tree_from_cuts
from lgm_scale.merging.tree import MergeAssignment, MergeTree, cosine_similarity

# Blocks of tokens 0 to 2 and 3 to 5; 4 and 5 are closest, then 0 and 2.
SIMILARITY = torch.full((6, 6), 0.1)
for (i, j), value in {(0, 1): 0.2, (0, 2): 0.8, (1, 2): 0.4, (3, 4): 0.5, (4, 5): 0.9}.items():
    SIMILARITY[i, j] = value
MERGES = [[4, 5], [0, 2], [1, 7], [3, 6], [8, 9]]
HEIGHTS = [0.1, 0.2, 0.7, 0.7, 101.0]  # the mean of 0.8 and 0.6; of 0.5 and 0.9


def tree() -> MergeTree:
    return MergeTree(torch.tensor(MERGES), torch.tensor(HEIGHTS), 2)


def labels(*values: int) -> MergeAssignment:
    return MergeAssignment.from_labels(torch.tensor(values))


def test_a_small_dendrogram():
    triangle = in_block_triangle(SIMILARITY, 2)
    torch.testing.assert_close(triangle, torch.tensor([[0.2, 0.8, 0.4], [0.5, 0.1, 0.9]]))
    merges, heights = average_linkage(triangle, 6)
    assert merges.tolist() == MERGES
    assert heights == pytest.approx(HEIGHTS)
    assert start_host_copy(triangle)() is triangle


def test_exploration_is_added_to_the_similarity_of_its_pair():
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    inside = [pairs.index(pair) for pair in ((0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5))]
    assert _positions_in_pairs(6, 2).tolist() == inside
    noise = np.zeros(15)
    noise[pairs.index((0, 1))] = 0.7  # now 0.9: as close as 4 and 5, and before them
    noise[pairs.index((2, 3))] = 9.0  # of two blocks: nothing
    merges, heights = average_linkage(in_block_triangle(SIMILARITY, 2), 6, noise)
    assert sorted(merges[:2].tolist()) == [[0, 1], [4, 5]]
    assert heights == pytest.approx([0.1, 0.1, 0.4, 0.7, 101.0])


def test_the_smallest_blocks_have_two_tokens():
    assert in_block_triangle(torch.eye(4), 2).shape == (2, 1)
    for num_blocks in (0, -1, 3, 4):
        with pytest.raises(ConfigError, match=f"4 tokens cannot be cut into {num_blocks} equal"):
            in_block_triangle(torch.eye(4), num_blocks)


def test_cuts_of_a_small_tree():
    cuts = {k: tree().assignment(k).labels.tolist() for k in range(2, 7)}
    assert cuts == {
        6: [0, 1, 2, 3, 4, 5],
        5: [0, 1, 2, 3, 4, 4],
        4: [0, 1, 0, 2, 3, 3],
        3: [0, 0, 0, 1, 2, 2],
        2: [0, 0, 0, 1, 1, 1],
    }


def test_a_cut_is_made_once():
    small = tree()
    assert small.assignment(4) is small.assignment(4)
    assert small.assignment(4) is not small.assignment(5)
    assert small.assignment(4, "meta").labels.device.type == "meta"
    z = torch.full((1, 6, 2), math.nan)
    assert (
        small.assignment(6).merge(z) is z
    )  # no product, which would mix tokens that are not finite


def test_near_ties_are_counted_between_merges_of_tokens():
    assert [tree().near_ties(width) for width in (0.0, 0.05, 0.15, 0.6, 1000.0)] == [1, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("merges", "heights", "blocks", "text"),
    [
        (MERGES, HEIGHTS[:4], 2, "merges must be"),
        ([row * 2 for row in MERGES], HEIGHTS, 2, "merges must be"),
        (MERGES, HEIGHTS, 0, "6 tokens cannot be cut into 0 equal blocks"),
        (MERGES, HEIGHTS, 4, "6 tokens cannot be cut into 4 equal blocks"),
        (MERGES, [0.1, 0.2, 0.7, 0.6, 101.0], 2, "heights must be finite and ascending"),
        (MERGES, [0.1, 0.2, 0.7, 0.7, math.inf], 2, "heights must be finite and ascending"),
        ([[4, 6], [0, 2], [1, 7], [3, 5], [8, 9]], HEIGHTS, 2, "do not form a binary tree"),
        ([[4, 5], [0, 2], [1, 7], [3, 7], [8, 9]], HEIGHTS, 2, "do not form a binary tree"),
        ([[4, 5], [0, 3], [1, 7], [2, 6], [8, 9]], HEIGHTS, 2, "merges cross its 2 blocks"),
    ],
)
def test_what_is_no_tree_is_refused(merges, heights, blocks, text):
    with pytest.raises(CheckpointError, match=text):
        MergeTree(torch.tensor(merges), torch.tensor(heights), blocks)


# --- two cuts ---------------------------------------------------------------------------------


def test_a_coarse_view_is_a_weighted_mean():
    nesting = Nesting.between(tree().assignment(4), tree().assignment(2))
    assert nesting.parents.tolist() == [0, 0, 1, 1]
    expected = torch.tensor([[2 / 3, 0], [1 / 3, 0], [0, 1 / 3], [0, 2 / 3]])
    torch.testing.assert_close(nesting.pool, expected)
    z = torch.tensor([[[3.0], [6.0], [0.0], [3.0]]])
    torch.testing.assert_close(nesting.merge(z), torch.tensor([[[4.0], [2.0]]]))
    assert nesting.merge(z.double()).dtype == torch.float64
    assert nesting.expand(torch.tensor([[[1.0], [2.0]]])).flatten().tolist() == [1, 1, 2, 2]


def test_contrasts_of_a_small_tree():
    basis = contrast_basis(tree())
    half, third = math.sqrt(1 / 2), math.sqrt(1 / 6)
    columns = {
        0: [0, 0, 0, 0, half, -half],
        1: [half, 0, -half, 0, 0, 0],
        2: [-third, 2 * third, -third, 0, 0, 0],
        3: [0, 0, 0, 2 * third, -third, -third],
    }
    assert basis.shape == (6, 4)
    for column, values in columns.items():
        assert basis[:, column].tolist() == pytest.approx(values)


def test_cuts_that_are_not_nested_name_the_cluster_that_is_split():
    with pytest.raises(ConfigError, match=r"base tokens 1, 2 at 3 is split at 2; take both"):
        Nesting.between(labels(0, 1, 1, 2), labels(0, 0, 1, 1))
    many = labels(*[0] * 9, 1)
    with pytest.raises(ConfigError, match=r"tokens 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. at 2 is split"):
        Nesting.between(many, labels(*[0] * 8, 1, 1))
    eight = labels(*[0] * 8, 1, 1)
    with pytest.raises(ConfigError, match=r"tokens 0, 1, 2, 3, 4, 5, 6, 7 at 2 is split"):
        Nesting.between(eight, labels(*[0] * 7, 1, 1, 1))


# --- a tree from cuts -------------------------------------------------------------------------


def test_a_tree_from_one_cut():
    """Small parts first, of equal ones those with the smallest member; then block by block."""
    found = tree_from_cuts([labels(0, 0, 0, 0, 1, 1, 2, 3)], 2)
    assert found.merges.tolist() == [
        [0, 1], [2, 3], [4, 5], [8, 9], [6, 7], [10, 12], [11, 13]
    ]  # fmt: skip
    assert found.heights.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert found.num_blocks == 2
    assert tree_from_cuts([labels(0, 0, 1)], 1).merges.tolist() == [[0, 1], [2, 3]]
    # The two smallest parts join first, of equal ones those with the smallest member.
    cuts = [labels(0, 1, 2, 3, 3, 4, 4), labels(0, 1, 1, 0, 0, 1, 1)]
    merges = tree_from_cuts(cuts, 1).merges.tolist()
    assert merges == [[3, 4], [5, 6], [1, 2], [0, 7], [8, 9], [10, 11]]


def test_cuts_that_make_no_tree_are_refused():
    with pytest.raises(ConfigError, match="cuts: one or more are needed"):
        tree_from_cuts([], 1)
    with pytest.raises(ConfigError, match="all of the same base tokens"):
        tree_from_cuts([labels(0, 1), labels(0, 1, 2)], 1)
    for num_blocks in (0, 3):
        with pytest.raises(ConfigError, match=f"4 tokens cannot be cut into {num_blocks} equal"):
            tree_from_cuts([labels(0, 0, 1, 1)], num_blocks)
    with pytest.raises(ConfigError, match="at 3 tokens, base token 2 shares a cluster with a tok"):
        tree_from_cuts([labels(0, 1, 1, 2)], 2)


def test_similarities_of_half_precision_are_computed_in_full_and_double_stays():
    vectors = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = vectors.to(torch.bfloat16)
    assert torch.equal(cosine_similarity(half), cosine_similarity(half.float()))
    assert cosine_similarity(half).dtype == torch.float32
    assert cosine_similarity(vectors).dtype == torch.float64
