"""Token merging per image, against a loop over one image at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_length_control import BLOCKS, N, control, latents

from lgm_scale.families.tokenizer.bipartite_merging import bipartite_labels, spread_means


def same_partition(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a[:, None] == a[None, :], b[:, None] == b[None, :])


def naive_token_merging(z: np.ndarray, num_tokens: int, num_blocks: int, share: float) -> list[set]:
    """One image [N, D], one round after the other, with lists and loops."""
    size = len(z)
    clusters = [[i] for i in range(size)]  # ordered by the token that gave the cluster its place
    while len(clusters) > num_tokens:
        links = []
        for block in range(num_blocks):
            inside = [c for c in clusters if c[0] // (size // num_blocks) == block]
            for source in inside[::2]:
                candidates = []
                for target in inside[1::2]:
                    a, b = z[source].mean(0), z[target].mean(0)
                    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                    candidates.append((cosine, target))
                if candidates:
                    best = max(candidates, key=lambda pair: pair[0])
                    links.append((best[0], source, best[1]))
        links.sort(key=lambda link: -link[0])
        most = math.ceil((len(clusters) - num_blocks + 1) * share)
        for _, source, target in links[: min(most, len(clusters) - num_tokens)]:
            target.extend(source)  # the target keeps its place: its first member is its own
            clusters = [c for c in clusters if c is not source]
    return [set(c) for c in clusters]


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
@pytest.mark.parametrize("num_tokens", [4, 5, 11, 17, 31, 32])
def test_bipartite_merging_equals_the_loop_over_images(num_tokens, share):
    z = latents(4, 32, seed=num_tokens).double()
    labels = bipartite_labels(z, num_tokens, 4, share)
    for image in range(4):
        expected = naive_token_merging(z[image].numpy(), num_tokens, 4, share)
        found = [set((labels[image] == c).nonzero()[:, 0].tolist()) for c in labels[image].unique()]
        assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


def test_images_of_a_batch_merge_on_their_own():
    z, tome = latents(5), control("tome")
    together = tome.full_length(z, 7)
    for image in range(5):
        alone = tome.full_length(z[image : image + 1], 7)
        torch.testing.assert_close(together[image : image + 1], alone)
    labels = tome.cluster_labels(z, 7)
    assert labels is not None
    assert not all(same_partition(labels[0], labels[image]) for image in range(1, 5))


def test_equal_tokens_merge_first_and_gradient_reaches_the_members():
    z = latents(2).repeat_interleave(2, dim=1)[:, :N].clone().requires_grad_()
    full = control("tome").full_length(z, N // 2)
    torch.testing.assert_close(full, z)
    full[0, 0].sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad[0, :3, 0], torch.tensor([0.5, 0.5, 0.0]))


def test_means_keep_the_dtype_and_ignore_autocast():
    z = latents()
    labels = bipartite_labels(z, 6, BLOCKS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(spread_means(z, labels), spread_means(z.clone(), labels))
        assert spread_means(z, labels).dtype == torch.float32
    assert spread_means(z.bfloat16(), labels).dtype == torch.bfloat16
