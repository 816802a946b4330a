"""The release's merge dictionary, read into a tree that has each of its cuts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lgm_scale.errors import CheckpointError
from lgm_scale.families.lgm.release_tree import read_tree
from lgm_scale.merging.tree import MergeTree


def random_tree(seed: int) -> MergeTree:
    return MergeTree.from_embeddings(
        torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))
    )


OWN, FOREIGN = random_tree(1), random_tree(2)


def merge_dictionary(
    tree: MergeTree, lengths: list[int], seed: int = 0
) -> dict[int, tuple[Tensor, Tensor]]:
    """As the release saves it: clusters numbered anyhow."""
    generator, content = torch.Generator().manual_seed(seed), {}
    for num_tokens in lengths:
        cut = tree.assignment(num_tokens)
        order = torch.randperm(num_tokens, generator=generator)
        content[num_tokens] = (cut.pool[:, order], cut.sizes[order].float())
    return content


def read(folder: Path, content: object) -> tuple[MergeTree | None, str]:
    torch.save(content, folder / "merge.pt")
    return read_tree(folder / "merge.pt", OWN)


FORMS = {
    "tuple": lambda k, pool, sizes: (k, (pool, sizes)),
    "text keys, list, double": lambda k, pool, sizes: (f"K={k}", [sizes, pool.double()]),
    "dictionary": lambda k, pool, sizes: (k, {"proj_mat": pool, "sizes": sizes.long()}),
    "membership": lambda k, pool, sizes: (str(k), (pool > 0).float()),
    "labels": lambda k, pool, sizes: (k, {"sizes": sizes.long(), "labels": pool.argmax(1)}),
    "batched": lambda k, pool, sizes: (k, (pool[None], sizes)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_given_cut_is_reproduced(tmp_path, form):
    lengths = [4, 6, 7, 11, 14]
    content = merge_dictionary(FOREIGN, lengths)
    tree, remark = read(tmp_path, dict(FORMS[form](k, *v) for k, v in content.items()))
    assert tree is not None
    for num_tokens in lengths:
        given, found = FOREIGN.assignment(num_tokens), tree.assignment(num_tokens)
        assert torch.equal(found.labels, given.labels)
        assert torch.equal(found.pool, given.pool)
    assert tree.heights.tolist() == list(range(1, 16))
    assert "K = 4, 6, 7, 11, 14" in remark
    assert "heights are unknown" in remark


def test_the_tokenizers_own_tree_is_kept_where_it_has_the_cuts(tmp_path):
    tree, remark = read(tmp_path, merge_dictionary(OWN, [4, 8, 12, 16]))
    assert tree is None
    assert "the tokenizer's own, which has every cut" in remark


def test_a_tree_of_ours_is_read_too(tmp_path):
    FOREIGN.save(tmp_path / "tree.safetensors")
    tree, _ = read_tree(tmp_path / "tree.safetensors", OWN)
    assert tree is not None
    assert torch.equal(tree.heights, FOREIGN.heights)
    other = MergeTree.from_embeddings(torch.eye(12))
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="12 tokens in 4 blocks; the tokenizer has 16 in 4"):
        read_tree(tmp_path / "other.safetensors", OWN)


def one_hot(*labels: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(labels)).float()


BLOCKS = [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            {
                6: one_hot(0, 0, 4, 4, *BLOCKS[4:12], 3, 3, 5, 5),
                5: one_hot(0, 4, 4, 4, *BLOCKS[4:]),
            },
            "cuts of 6 and 5 tokens are not nested: the cluster of base tokens 0, 1 at 6 is split",
        ),
        ({4: one_hot(0, 1, 1, 1, *BLOCKS[4:])}, "shares a cluster with a token of another"),
        ({3: one_hot(*BLOCKS)[:12, :3]}, "cuts of 12 base tokens; the tokenizer has 16"),
        ({5: one_hot(*BLOCKS)}, r"K = 5: a matrix of shape \[16, 4\], expected \[N, 5\]"),
        ({4: one_hot(*BLOCKS) * 0.3}, "neither averages clusters nor lists members"),
        ({4: torch.ones(16, 4)}, "does not put each token into one cluster"),
        ({5: torch.nn.functional.pad(one_hot(*BLOCKS), (0, 1))}, "4 clusters that are not empty"),
        ({4: (one_hot(*BLOCKS), torch.tensor([4, 4, 5, 3]))}, "sizes are not those"),
        ({4: torch.ones(4)}, r"tensors of shapes \[4\]; needed: an averaging matrix \[N, 4\]"),
        ({4: None}, "tensors of shapes none"),
        ({"all": one_hot(*BLOCKS)}, "key 'all' is no token length"),
        ({4: one_hot(*BLOCKS), "4": one_hot(*BLOCKS)}, "K = 4: given twice"),
        ({}, "it needs one or more cuts"),
    ],
)
def test_wrong_merge_dictionaries_are_refused(tmp_path, content, text):
    with pytest.raises(CheckpointError, match=text):
        read(tmp_path, content)
