"""Two cuts of one tree, the contrasts between them, and the state of a split cluster."""

from __future__ import annotations

import pytest
import torch

from lgm_scale.errors import ConfigError
from lgm_scale.merging.nesting import (
    ContrastStats,
    Nesting,
    contrast_basis,
    split_clusters,
    tree_from_cuts,
)
from lgm_scale.merging.tree import MergeAssignment, MergeTree

DRAWS = 20_000


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def tree() -> MergeTree:
    return MergeTree.from_embeddings(randn(32, 6), num_blocks=2)


def covariance(samples: torch.Tensor) -> torch.Tensor:
    """Of the tokens: [B, K, D] -> [K, K]."""
    return samples.permute(1, 0, 2).flatten(1).cov()


# --- nesting ----------------------------------------------------------------------------------


def test_merging_in_two_stages_is_merging_at_once_for_all_pairs(tree):
    z = randn(3, 32, 4)
    for fine, coarse in ((k, below) for k in range(2, 33) for below in range(2, k + 1)):
        cut, below = tree.assignment(fine), tree.assignment(coarse)
        nesting = Nesting.between(cut, below)
        torch.testing.assert_close(nesting.merge(cut.merge(z)), below.merge(z), atol=1e-6, rtol=0)
        merged = below.merge(z)
        assert torch.equal(cut.unmerge(nesting.expand(merged)), below.unmerge(merged))
        back = nesting.merge(nesting.expand(merged))
        torch.testing.assert_close(back, merged, atol=1e-6, rtol=0)


def test_cuts_that_are_not_nested_are_refused(tree):
    other = MergeAssignment.from_labels(torch.arange(32) % 5)
    with pytest.raises(ConfigError, match="cuts of 12 and 5 tokens are not nested"):
        Nesting.between(tree.assignment(12), other)
    with pytest.raises(ConfigError, match="not nested"):
        Nesting.between(tree.assignment(5), tree.assignment(12))


# --- contrasts --------------------------------------------------------------------------------


def test_contrasts_are_orthonormal_and_complete(tree):
    basis = contrast_basis(tree)
    assert basis.shape == (32, 30)
    torch.testing.assert_close(basis.T @ basis, torch.eye(30, dtype=torch.float64))
    for num_tokens in (2, 5, 12, 31):
        cut = tree.assignment(num_tokens)
        lost, kept = basis[:, : 32 - num_tokens], basis[:, 32 - num_tokens :]
        assert cut.merge(lost.T[..., None]).abs().max() < 1e-7
        again = cut.unmerge(cut.merge(kept.T[..., None]))[..., 0]
        torch.testing.assert_close(again, kept.T, atol=1e-6, rtol=0)


def test_contrasts_give_the_variance_within_every_cluster(tree):
    """The brute-force within-cluster sum of squares is the energy of the merges below."""
    z = randn(1, 32, 3)
    energy = (contrast_basis(tree).T @ z)[0].square().sum(-1)  # [R]
    cut = tree.assignment(4)
    centred = (z - cut.unmerge(cut.merge(z)))[0].square().sum(-1)  # [N]
    for cluster in range(4):
        leaves = set((cut.labels == cluster).nonzero().flatten().tolist())
        members = {leaf: {leaf} for leaf in range(32)}
        below = 0.0
        for row, (a, b) in enumerate(tree.merges[:28].tolist()):
            members[32 + row] = members[a] | members[b]
            if members[32 + row] <= leaves:
                below += energy[row].item()
        assert below == pytest.approx(centred[list(leaves)].sum().item(), abs=1e-5)


# --- splitting --------------------------------------------------------------------------------


def zero_stats(tree: MergeTree, dim: int) -> ContrastStats:
    shape = (tree.num_base_tokens - tree.num_blocks, dim)
    return ContrastStats(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize(("coarse", "fine", "final"), [(4, 11, 20), (2, 32, 32), (7, 8, 32)])
def test_a_split_of_pure_noise_gives_the_noise_of_the_larger_length(tree, coarse, fine, final):
    noise = randn(2, 32, 3)
    at = {k: tree.assignment(k) for k in (coarse, fine, final)}
    split = split_clusters(
        at[coarse].merge(noise), 0.0, at[final].merge(noise),
        Nesting.between(at[fine], at[coarse]), at[final], contrast_basis(tree), zero_stats(tree, 3),
    )  # fmt: skip
    torch.testing.assert_close(split, at[fine].merge(noise), atol=1e-6, rtol=0)


def test_a_split_keeps_the_coarse_state_and_has_the_noise_covariance_of_the_parts(tree):
    """With independent coarse state: diag(1 / s_i) - 11^T / s, scaled by (1 - t)^2."""
    t, coarse, fine = 0.4, tree.assignment(3), tree.assignment(10)
    nesting = Nesting.between(fine, coarse)
    z_t = torch.zeros(DRAWS, 3, 1, dtype=torch.float64)
    noise = fine.project_noise(randn(DRAWS, 32, 1, seed=1))
    split = split_clusters(z_t, t, noise, nesting, fine, contrast_basis(tree), zero_stats(tree, 1))
    assert nesting.merge(split).abs().max() < 1e-6
    same = nesting.parents[:, None] == nesting.parents[None, :]
    expected = torch.diag(1 / fine.sizes) - same / coarse.sizes[nesting.parents][:, None]
    # standard error of a covariance of unit variables from DRAWS draws: 0.01
    torch.testing.assert_close(
        covariance(split), (0.6**2 * expected).double(), atol=0.36 * 5 * 0.01, rtol=0
    )
    assert (covariance(split) - 0.36 * torch.diag(1 / fine.sizes)).abs().max() > 0.02


def test_a_split_state_is_distributed_like_the_fine_state_of_gaussian_data(tree):
    """Data with independent contrasts: splitting the coarse x_t equals merging the true x_t."""
    t, basis = 0.5, contrast_basis(tree)
    coarse, fine = tree.assignment(4), tree.assignment(12)
    std = torch.linspace(0.2, 2.0, 30, dtype=torch.float64)[:, None]
    mean = torch.linspace(-1.0, 1.0, 30, dtype=torch.float64)[:, None]
    z = basis @ (mean + std * randn(DRAWS, 30, 1, seed=2))
    x_t = t * z + (1 - t) * randn(DRAWS, 32, 1, seed=3)
    split = split_clusters(
        coarse.merge(x_t), t, fine.project_noise(randn(DRAWS, 32, 1, seed=4)),
        Nesting.between(fine, coarse), fine, basis, ContrastStats(mean, std),
    )  # fmt: skip
    truth = fine.merge(x_t)
    scale = covariance(truth).diagonal().max().item()
    torch.testing.assert_close(covariance(split), covariance(truth), atol=0.06 * scale, rtol=0)
    torch.testing.assert_close(split.mean(0), truth.mean(0), atol=0.05 * scale**0.5, rtol=0)


# --- a tree from cuts -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 256])
def test_a_tree_from_the_releases_cuts_reproduces_them(golden, size):
    file = golden("merge_assignments")
    names = [name for name in file if name.startswith(f"n{size}.k")]
    cuts = [MergeAssignment.from_labels(file[name]) for name in names]
    tree = tree_from_cuts(cuts, num_blocks=4)
    for cut in cuts:
        assert torch.equal(tree.assignment(cut.num_tokens).labels, cut.labels)
    own = MergeTree.from_embeddings(file[f"n{size}.embeddings"])
    for cut in cuts:
        assert torch.equal(own.assignment(cut.num_tokens).labels, cut.labels)


def test_what_the_cuts_leave_open_is_filled_in_by_size():
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    tree = tree_from_cuts([MergeAssignment.from_labels(labels)], num_blocks=2)
    assert torch.equal(tree.assignment(3).labels, labels)
    assert tree.assignment(4).sizes.tolist() == [3, 1, 2, 2]
    assert tree.heights.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_two_equal_cuts_are_one_and_two_unequal_ones_of_one_length_are_refused():
    one = MergeAssignment.from_labels(torch.tensor([0, 0, 1, 2, 3, 3]))
    two = MergeAssignment.from_labels(torch.tensor([0, 1, 1, 2, 3, 3]))
    assert tree_from_cuts([one, one], num_blocks=2).num_base_tokens == 6
    with pytest.raises(ConfigError, match="cluster of base tokens 0, 1 at 4 is split at 4"):
        tree_from_cuts([one, two], num_blocks=2)
    with pytest.raises(ConfigError, match="one or more are needed"):
        tree_from_cuts([], num_blocks=2)
    with pytest.raises(ConfigError, match="6 tokens cannot be cut into 4 equal blocks"):
        tree_from_cuts([one], num_blocks=4)
