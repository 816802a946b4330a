"""Lengths, embeddings, merges and files that are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from test_merging import random_latents, random_tree

from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.merging.tree import (
    MergeTree,
)


@pytest.mark.parametrize("num_tokens", [-1, 0, 3, 65])
def test_a_length_outside_the_range_is_refused(num_tokens):
    with pytest.raises(ConfigError, match=rf"num_tokens: {num_tokens} is outside \[4, 64\]"):
        random_tree().assignment(num_tokens)


def test_a_wrong_number_of_tokens_is_refused():
    cut = random_tree().assignment(16)
    with pytest.raises(ConfigError, match="merge: got 63 tokens, the merge tree has 64"):
        cut.merge(torch.zeros(2, 63, 5))
    with pytest.raises(ConfigError, match="unmerge: got 64 tokens, the assignment has 16"):
        cut.unmerge(torch.zeros(2, 64, 5))
    with pytest.raises(ConfigError, match="got 63 tokens"):
        random_tree().assignment(64).merge(torch.zeros(2, 63, 5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(bad):
    embeddings = random_latents(64, 12)
    embeddings[10, 3] = bad
    with pytest.raises(ConfigError, match="not finite; the run that made them has diverged"):
        MergeTree.from_embeddings(embeddings)


@pytest.mark.parametrize(("size", "num_blocks"), [(62, 4), (4, 4), (64, 5)])
def test_tokens_that_cannot_be_cut_into_blocks_are_refused(size, num_blocks):
    text = f"num_base_tokens: {size} tokens cannot be cut into {num_blocks} equal blocks"
    with pytest.raises(ConfigError, match=text):
        MergeTree.from_embeddings(torch.randn(size, 8), num_blocks)


def broken_merges() -> dict[str, torch.Tensor]:
    """Ways for the merges [7, 2] of eight leaves to be no tree, by name."""
    good = random_tree(8, 1).merges
    twice, own_child, four_rows = good.clone(), good.clone(), torch.arange(12)
    twice[3, 0] = twice[2, 0]
    row, column = (good == 13).nonzero()[0]  # the node that the sixth merge makes ...
    own_child[row, column], own_child[0, 0] = good[0, 0], 13  # ... becomes a child of the first
    return {
        "a node merged twice": twice,
        "a child before it is made": own_child,
        "negative nodes": good - 1,
        "shape": four_rows.view(4, 3),
    }


@pytest.mark.parametrize("name", list(broken_merges()))
def test_merges_that_are_no_tree_are_refused(name):
    merges = broken_merges()[name]
    text = r"merges must be \[N - 1, 2\]" if name == "shape" else "do not form a binary tree"
    with pytest.raises(CheckpointError, match=text):
        MergeTree(merges, torch.arange(len(merges)), num_blocks=1)


def test_heights_and_blocks_must_fit_the_merges():
    tree = random_tree()
    with pytest.raises(CheckpointError, match=r"heights \[N - 1\]"):
        MergeTree(tree.merges, tree.heights[:-1], 4)
    with pytest.raises(CheckpointError, match="finite and ascending"):
        MergeTree(tree.merges, tree.heights.flip(0), 4)
    with pytest.raises(CheckpointError, match="finite and ascending"):
        MergeTree(tree.merges, tree.heights * float("nan"), 4)
    with pytest.raises(CheckpointError, match="merges cross its 16 blocks"):
        MergeTree(tree.merges, tree.heights, 16)
    with pytest.raises(CheckpointError, match="64 tokens cannot be cut into 5 equal blocks"):
        MergeTree(tree.merges, tree.heights, 5)


@pytest.mark.parametrize("content", [b"", b"hello" * 20, "truncated", None])
def test_a_damaged_or_missing_file_is_refused(tmp_path, content):
    path = tmp_path / "tree.safetensors"
    if content == "truncated":
        random_tree().save(path)
        content = path.read_bytes()[:-9]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tree\.safetensors: cannot be read as a merge tree"):
        MergeTree.load(path)


def test_a_file_without_merges_is_refused(tmp_path):
    path = tmp_path / "tree.safetensors"
    metadata = {"format": "lgm_scale.merge_tree", "num_blocks": "4"}
    save_file({"heights": torch.zeros(63)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="cannot be read as a merge tree"):
        MergeTree.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_of_another_kind_is_refused(tmp_path, metadata):
    path = tmp_path / "weights.safetensors"
    save_file({"merges": torch.zeros(2, 2)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: not a merge tree"):
        MergeTree.load(path)
