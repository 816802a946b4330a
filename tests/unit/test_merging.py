"""The merge tree, its cuts, and the straight-through merge."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.cluster.hierarchy
import torch

from lgm_scale.merging.tree import (
    MergeAssignment,
    MergeTree,
    cosine_similarity,
    in_block_pairs,
    straight_through_merge,
)

GOLDEN_CUTS = [(64, k) for k in (4, 8, 12, 16, 24, 32, 48)]
GOLDEN_CUTS += [(256, k) for k in (4, 8, 16, 32, 48, 64, 96, 128, 196)]


def random_tree(size: int = 64, num_blocks: int = 4, seed: int = 0) -> MergeTree:
    generator = torch.Generator().manual_seed(seed)
    return MergeTree.from_embeddings(torch.randn(size, 12, generator=generator), num_blocks)


def random_latents(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def canonical(labels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Number clusters in the order in which they appear; the slow and obvious way."""
    number: dict[int, int] = {}
    return torch.tensor([number.setdefault(int(label), len(number)) for label in labels])


def naive_average_linkage(distances: np.ndarray, num_clusters: int) -> torch.Tensor:
    """Average linkage from its definition: join the pair of clusters with the least mean distance.

    Shapes: distances [N, N] -> labels [N].
    """
    clusters = [[i] for i in range(len(distances))]
    while len(clusters) > num_clusters:
        _, i, j = min(
            (distances[np.ix_(clusters[i], clusters[j])].mean(), i, j)
            for j in range(len(clusters))
            for i in range(j)
        )
        clusters[i] += clusters.pop(j)
    labels = np.empty(len(distances), dtype=np.int64)
    for number, members in enumerate(clusters):
        labels[members] = number
    return canonical(labels)


# --- against the release ---------------------------------------------------------------------


@pytest.mark.parametrize(("size", "num_tokens"), GOLDEN_CUTS)
def test_partition_equals_the_release(golden, size, num_tokens):
    file = golden("merge_assignments")
    cut = MergeTree.from_embeddings(file[f"n{size}.embeddings"]).assignment(num_tokens)
    expected = MergeAssignment.from_labels(file[f"n{size}.k{num_tokens}.labels"])
    assert torch.equal(cut.labels, expected.labels)
    assert torch.equal(cut.sizes, expected.sizes)


def test_every_golden_cut_is_compared(golden):
    stored = {key for key in golden("merge_assignments") if key.endswith(".labels")}
    assert stored == {f"n{size}.k{k}.labels" for size, k in GOLDEN_CUTS}


@pytest.mark.parametrize("num_tokens", [8, 16, 32])
def test_straight_through_merge_equals_the_release(golden, num_tokens):
    file = golden("straight_through_merge")
    x = file[f"k{num_tokens}.x"].requires_grad_()
    embeddings = file["embeddings"].requires_grad_()
    assignment = MergeTree.from_embeddings(embeddings).assignment(num_tokens)

    out = straight_through_merge(x, embeddings, assignment)
    (out * file[f"k{num_tokens}.upstream"]).sum().backward()

    for ours, name in ((out, "out"), (x.grad, "grad_x"), (embeddings.grad, "grad_embeddings")):
        torch.testing.assert_close(ours, file[f"k{num_tokens}.{name}"], atol=5e-6, rtol=0)


@pytest.mark.parametrize("num_tokens", [4, 16, 64])
def test_straight_through_merge_has_the_value_of_the_hard_merge(num_tokens):
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(64, 12, generator=generator)
    cut = MergeTree.from_embeddings(embeddings).assignment(num_tokens)
    z = random_latents(2, 64, 5)
    hard = cut.unmerge(cut.merge(z))
    torch.testing.assert_close(straight_through_merge(z, embeddings, cut), hard)
    assert straight_through_merge(z.bfloat16(), embeddings, cut).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(straight_through_merge(z, embeddings, cut), hard)


# --- one cut ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [4, 32, 64])
def test_sizes_and_pool(num_tokens):
    cut = random_tree().assignment(num_tokens)
    assert (cut.num_tokens, cut.num_base_tokens) == (num_tokens, 64)
    assert cut.sizes.sum() == 64
    assert cut.sizes.min() >= 1
    assert torch.equal(cut.sizes, torch.bincount(cut.labels, minlength=num_tokens))
    torch.testing.assert_close(cut.pool.sum(0), torch.ones(num_tokens))
    member = cut.labels[:, None] == torch.arange(num_tokens)
    assert torch.equal(cut.pool > 0, member)
    torch.testing.assert_close(cut.pool[member], 1 / cut.sizes[cut.labels])


@pytest.mark.parametrize("num_tokens", [4, 32, 63])
def test_merge_is_the_cluster_mean_and_unmerge_spreads_it(num_tokens):
    cut = random_tree().assignment(num_tokens)
    z = random_latents(3, 64, 5)
    merged = cut.merge(z)
    means = [z[:, cut.labels == j].mean(1) for j in range(num_tokens)]
    torch.testing.assert_close(merged, torch.stack(means, dim=1))
    full = cut.unmerge(merged)
    assert all(torch.equal(full[:, i], merged[:, cut.labels[i]]) for i in range(64))
    torch.testing.assert_close(cut.merge(full), merged)


def test_no_merging_is_the_exact_identity():
    cut = random_tree().assignment(64)
    z = random_latents(3, 64, 5)
    assert torch.equal(cut.labels, torch.arange(64))
    assert torch.equal(cut.sizes, torch.ones(64, dtype=torch.int64))
    assert torch.equal(cut.merge(z), z)
    assert torch.equal(cut.unmerge(cut.merge(z)), z)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_merge_keeps_the_dtype(dtype):
    cut = random_tree().assignment(16)
    z = random_latents(2, 64, 5)
    assert cut.merge(z.to(dtype)).dtype == dtype
    torch.testing.assert_close(cut.merge(z.to(dtype)).float(), cut.merge(z), atol=0.02, rtol=0)


def test_merge_ignores_autocast():
    cut, z = random_tree().assignment(16), random_latents(2, 64, 5)
    with torch.autocast("cpu", torch.bfloat16):
        merged = cut.merge(z)
    assert torch.equal(merged, cut.merge(z))


def test_clusters_are_numbered_by_their_smallest_member():
    for num_tokens in (4, 17, 40):
        cut = random_tree().assignment(num_tokens)
        assert torch.equal(cut.labels, canonical(cut.labels))
        renamed = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(5))
        again = MergeAssignment.from_labels(renamed[cut.labels] * 7 - 3)
        assert torch.equal(again.labels, cut.labels)
        assert torch.equal(again.sizes, cut.sizes)
        assert torch.equal(again.pool, cut.pool)


@pytest.mark.parametrize("num_tokens", [8, 32, 128])
def test_variance_of_merged_noise_is_one_over_size(num_tokens):
    cut = random_tree(256).assignment(num_tokens)
    noise = cut.project_noise(random_latents(1000, 256, 8, seed=9))
    noise = noise.transpose(1, 2).reshape(-1, num_tokens).double()  # [8000, K]
    # Five standard errors of a mean, a variance and a correlation from 8000 draws.
    scaled = noise * cut.sizes.sqrt()
    assert scaled.mean(0).abs().max() < 5 / 8000**0.5
    assert (scaled.var(0) - 1).abs().max() < 5 * (2 / 8000) ** 0.5
    between = torch.corrcoef(noise.T) - torch.eye(num_tokens, dtype=torch.float64)
    assert between.abs().max() < 5 / 8000**0.5


# --- the tree ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [1, 2, 4, 8])
def test_every_length_is_available_and_no_cluster_crosses_a_block(num_blocks):
    tree = random_tree(64, num_blocks, seed=num_blocks)
    may_merge = in_block_pairs(64, num_blocks)
    assert may_merge.sum() == 64 * 64 // num_blocks
    for num_tokens in range(num_blocks, 65):
        cut = tree.assignment(num_tokens)
        assert cut.num_tokens == num_tokens
        together = cut.labels[:, None] == cut.labels[None, :]
        assert not (together & ~may_merge).any()
    assert torch.equal(tree.assignment(num_blocks).labels, torch.arange(64) // (64 // num_blocks))


def test_cuts_are_nested():
    tree = random_tree(256)
    coarse, fine = tree.assignment(32), tree.assignment(128)
    parent = torch.empty(128, dtype=torch.int64)
    parent[fine.labels] = coarse.labels
    assert torch.equal(parent[fine.labels], coarse.labels), "a fine cluster in two coarse ones"

    z = random_latents(2, 256, 8).double()
    weighted = fine.merge(z) * fine.sizes[:, None]
    from_fine = torch.zeros(2, 32, 8, dtype=torch.float64).index_add(1, parent, weighted)
    torch.testing.assert_close(
        from_fine / coarse.sizes[:, None], coarse.merge(z), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("seed", range(5))
def test_linkage_equals_scipy_within_one_block(seed):
    embeddings = random_latents(48, 6, seed=seed)
    tree = MergeTree.from_embeddings(embeddings, num_blocks=1)
    upper = np.triu_indices(48, 1)
    distances = 1 - cosine_similarity(embeddings).double().numpy()[upper]
    linkage = scipy.cluster.hierarchy.linkage(distances, "average")
    assert np.array_equal(tree.merges.numpy(), linkage[:, :2])
    np.testing.assert_allclose(tree.heights.numpy(), linkage[:, 2], rtol=1e-12)
    for num_tokens in range(1, 49):
        expected = scipy.cluster.hierarchy.fcluster(linkage, num_tokens, "maxclust")
        assert torch.equal(tree.assignment(num_tokens).labels, canonical(expected))


@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_clustered_on_their_own(seed):
    embeddings = random_latents(32, 6, seed=seed)
    tree = MergeTree.from_embeddings(embeddings, num_blocks=4)
    heights = [
        MergeTree.from_embeddings(block, num_blocks=1).heights for block in embeddings.split(8)
    ]
    expected = torch.cat(heights).sort().values
    torch.testing.assert_close(tree.heights[:28], expected, atol=1e-6, rtol=0)
    assert (tree.heights[28:] > 2).all()


@pytest.mark.parametrize(("size", "num_blocks"), [(64, 4), (64, 8), (96, 2), (20, 5)])
@pytest.mark.parametrize("explore", [False, True])
def test_blocks_together_give_the_tree_of_one_clustering_of_all(size, num_blocks, explore):
    """Clustering all tokens at once, with other blocks far away, is what the release does."""
    rng = np.random.default_rng(size)
    similarity = cosine_similarity(random_latents(size, 12, seed=num_blocks))
    noise = 0.1 * rng.standard_normal(size * (size - 1) // 2).clip(-1, 1) if explore else None
    tree = MergeTree.from_similarity(similarity, num_blocks, noise)

    upper = np.triu_indices(size, 1)
    distances = 1 - similarity.double().numpy()[upper] - (0 if noise is None else noise)
    distances[~in_block_pairs(size, num_blocks).numpy()[upper]] = 101.0
    linkage = scipy.cluster.hierarchy.linkage(distances + 1, "average")
    inside = size - num_blocks
    assert np.array_equal(tree.merges.numpy()[:inside], linkage[:inside, :2])
    assert np.array_equal(tree.heights.numpy()[:inside], linkage[:inside, 2] - 1)


@pytest.mark.parametrize("seed", range(5))
def test_exploration_may_make_distances_negative(seed):
    """Tokens closer than the noise get negative distances, which change nothing in the rule."""
    size, rng = 16, np.random.default_rng(seed)
    center = random_latents(1, 8, seed=seed)
    similarity = cosine_similarity(center + 0.05 * random_latents(size, 8, seed=seed + 100))
    noise = 0.1 * rng.standard_normal(size * (size - 1) // 2).clip(-1, 1)
    tree = MergeTree.from_similarity(similarity, num_blocks=2, exploration=noise)
    assert tree.heights.min() < 0, "the case has no negative distance"

    upper = np.triu_indices(size, 1)
    distances = np.zeros((size, size))
    distances[upper] = 1 - similarity.double().numpy()[upper] - noise
    distances += distances.T
    distances[~in_block_pairs(size, 2).numpy()] = 100.0
    for num_tokens in range(2, size + 1):
        expected = naive_average_linkage(distances, num_tokens)
        assert torch.equal(tree.assignment(num_tokens).labels, expected)


def test_exploration_never_joins_blocks():
    noise = np.full(64 * 63 // 2, 0.1)
    similarity = cosine_similarity(torch.ones(64, 3))
    cut = MergeTree.from_similarity(similarity, 4, noise).assignment(4)
    assert torch.equal(cut.labels, torch.arange(64) // 16)


@pytest.mark.parametrize("gap", [0.0, 1e-8, 1e-4])
def test_near_coincident_embeddings_merge_first(gap):
    """Rounding can bring a similarity above 1, which must not stop the clustering."""
    base = random_latents(32, 24).repeat_interleave(2, dim=0) * 3.7
    embeddings = base + gap * random_latents(64, 24, seed=2)
    cut = MergeTree.from_embeddings(embeddings).assignment(32)
    assert torch.equal(cut.labels, torch.arange(64) // 2)


def test_only_directions_of_embeddings_count():
    embeddings = random_latents(64, 12)
    lengths = torch.logspace(-3, 3, 64)[:, None]
    tree = MergeTree.from_embeddings(embeddings)
    scaled = MergeTree.from_embeddings(embeddings * lengths)
    assert torch.equal(tree.merges, scaled.merges)


def test_only_the_upper_triangle_is_read():
    similarity = cosine_similarity(random_latents(64, 12))
    below = torch.ones(64, 64).tril().bool()
    tree = MergeTree.from_similarity(similarity)
    for garbage in (float("nan"), 50.0):
        other = MergeTree.from_similarity(similarity.masked_fill(below, garbage))
        assert torch.equal(other.merges, tree.merges)
        assert torch.equal(other.heights, tree.heights)


def test_save_and_load(tmp_path):
    tree = random_tree(64, num_blocks=8)
    tree.save(tmp_path / "tree.safetensors")
    again = MergeTree.load(tmp_path / "tree.safetensors")
    assert again.num_blocks == 8
    assert torch.equal(again.merges, tree.merges)
    assert torch.equal(again.heights, tree.heights)
    for num_tokens in range(8, 65):
        assert torch.equal(again.assignment(num_tokens).labels, tree.assignment(num_tokens).labels)
