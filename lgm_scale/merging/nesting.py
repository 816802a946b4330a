"""Between two cuts of one merge tree: from fine to coarse, and back.

Cuts are nested: a cluster at K' <= K is a union of clusters at K. So a state at K has one exact
coarse view at K', and what the view lacks can be written in one orthonormal basis with one vector
per merge, its *contrast*: the difference of the two halves' means, scaled to length one. For a
cluster of sizes (s_1, ..., s_m), s in all, white noise merged to its parts and then stripped of
the cluster's mean has covariance diag(1 / s_i) - 11^T / s; in contrasts it is white again.

Source: ours. The basis is the unbalanced Haar basis of the dendrogram.

The other way round, `tree_from_cuts` finds a tree for cuts that came without one.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from lgm_scale.errors import ConfigError
from lgm_scale.merging.tree import MergeAssignment, MergeTree


@dataclass(frozen=True)
class Nesting:
    """A fine cut (K clusters) and a coarse one (K' <= K) of the same tree.

    Its matrix M, the size-weighted mean over a coarse cluster's parts, takes a state at K to one at
    K': z_K' = M z_K, of latents and of noise alike.

    Shapes: parents [K] int64, the coarse cluster of each fine one; pool [K, K'] float32, whose
    columns hold the fine clusters' shares of their coarse one and sum to 1.
    """

    fine: MergeAssignment
    coarse: MergeAssignment
    parents: Tensor
    pool: Tensor = field(repr=False)

    @classmethod
    def between(cls, fine: MergeAssignment, coarse: MergeAssignment) -> Nesting:
        """Relate two cuts. Raises: ConfigError unless every fine cluster lies in one coarse one."""
        # If the cuts are nested, any member tells which coarse cluster its fine one lies in ...
        parents = coarse.labels[_first_members(fine)]  # [K]
        # ... and then all members agree with it.
        split = torch.nonzero(parents[fine.labels] != coarse.labels)
        if len(split):
            cluster = torch.nonzero(fine.labels == fine.labels[split[0]]).flatten().tolist()
            members = ", ".join(map(str, cluster[:8])) + (", ..." if len(cluster) > 8 else "")
            raise ConfigError(
                f"cuts of {fine.num_tokens} and {coarse.num_tokens} tokens are not nested: the "
                f"cluster of base tokens {members} at {fine.num_tokens} is split at "
                f"{coarse.num_tokens}; take both from one merge tree, the coarse one with fewer "
                "tokens"
            )
        shares = torch.zeros(fine.num_tokens, coarse.num_tokens, device=parents.device)
        shares[torch.arange(len(parents), device=parents.device), parents] = (
            fine.sizes / coarse.sizes[parents]
        )
        return cls(fine, coarse, parents, shares)  # shares [K, K']

    def merge(self, z: Tensor) -> Tensor:
        """Size-weighted means: a state at K as seen at K'. Shapes: [B, K, D] -> [B, K', D]."""
        return self.pool.to(z.dtype).T @ z

    def expand(self, z: Tensor) -> Tensor:
        """Give every fine cluster its coarse one's value. Shapes: [B, K', D] -> [B, K, D]."""
        return z.index_select(-2, self.parents)


@dataclass(frozen=True)
class ContrastStats:
    """Mean and standard deviation of the data's contrast at every merge of the tree.

    Shapes: [R, D] each, standardised latents, R = N - num_blocks merges in the tree's order. The
    within-cluster variance of a node with s tokens is the sum of mean^2 + std^2 over the merges
    below it, divided by s - 1.
    """

    mean: Tensor
    std: Tensor


def _first_members(assignment: MergeAssignment) -> Tensor:
    """The smallest member of each cluster, which stands for all of them: [K] int64."""
    return (assignment.pool > 0).to(torch.uint8).argmax(dim=0)


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # the first to ask may be sampling, the next may need gradients
def contrast_basis(tree: MergeTree) -> Tensor:
    """Orthonormal vectors, one per usable merge: [N, N - num_blocks] float64, on the CPU.

    Built once per tree and shared: do not write to it.

    Column r belongs to row r of `tree.merges`, which joins clusters a and b of s_a and s_b tokens:
    sqrt(s_b / (s_a (s_a + s_b))) on a, -sqrt(s_a / (s_b (s_a + s_b))) on b, zero elsewhere.
    The N - K columns from the first on vanish when merged to K; the others are constant within
    the clusters of that cut.
    """
    size = tree.num_base_tokens
    # Tokens of each node, as rows of zeros and ones; float64, for sizes enter by their roots.
    members = torch.zeros(2 * size - 1, size, dtype=torch.float64)
    members[:size] = torch.eye(size, dtype=torch.float64)
    basis = torch.zeros(size, size - tree.num_blocks, dtype=torch.float64)
    for row, (a, b) in enumerate(tree.merges[: basis.shape[1]].tolist()):
        s_a, s_b = members[a].sum(), members[b].sum()
        total = s_a + s_b
        # The mean over both is zero: s_a sqrt(s_b / (s_a total)) = s_b sqrt(s_a / (s_b total)).
        basis[:, row] = members[a] * (s_b / (s_a * total)).sqrt()
        basis[:, row] -= members[b] * (s_a / (s_b * total)).sqrt()
        members[size + row] = members[a] + members[b]
    return basis


def split_clusters(
    z_t: Tensor,
    t: float,
    noise: Tensor,
    nesting: Nesting,
    final: MergeAssignment,
    basis: Tensor,
    stats: ContrastStats,
) -> Tensor:
    """Go from K' to K tokens in the middle of a trajectory.

    The coarse part of the result is z_t, exactly. Each missing contrast is drawn as t mean +
    sqrt((1 - t)^2 + t^2 std^2) u, where u is the contrast of the image's own noise: what the flow
    makes of u when the data's contrasts are independent Gaussians. At t = 0 the result is the
    noise merged to K.

    Shapes: z_t [B, K', D], t in [0, 1], noise [B, K_final, D] at the last length of the
    trajectory, basis [N, R] from `contrast_basis` -> [B, K, D].
    Source: ours. Exact for the noise, Gaussian for the data: the smaller t, the smaller the error.
    """
    size = nesting.fine.num_base_tokens
    rows = slice(size - nesting.fine.num_tokens, size - nesting.coarse.num_tokens)
    columns = basis[:, rows].to(z_t.device, z_t.dtype)  # [N, rows]: merges undone by this step
    # A contrast of these merges is constant within the final clusters, so the full-length inner
    # product is one over clusters, each counted as often as it has tokens.
    analysis = columns[_first_members(final)] * final.sizes[:, None]  # [K_final, rows]
    mean = stats.mean[rows].to(z_t.device, z_t.dtype)
    std = stats.std[rows].to(z_t.device, z_t.dtype)
    contrasts = analysis.T @ noise  # [B, rows, D], white
    # Along the flow from noise u to Gaussian data (mean, std) a contrast is at time t normal with
    # mean t mean and this deviation; u keeps its quantile on the way.
    contrasts = t * mean + ((1 - t) ** 2 + (t * std) ** 2).sqrt() * contrasts
    return nesting.expand(z_t) + columns[_first_members(nesting.fine)] @ contrasts


def tree_from_cuts(cuts: Iterable[MergeAssignment], num_blocks: int) -> MergeTree:
    """A merge tree with the given cuts: its assignment at each of their K is theirs, exactly.

    What the cuts do not say is filled in: between two of them, the two smallest parts of a cluster
    join first; heights, which are unknown, are the merges' ranks 1, 2, ...

    Raises: ConfigError for no cuts, for different N, for a cluster across two blocks, and for two
    cuts that are not nested, naming both K and a cluster that is split.
    """
    cuts = sorted(cuts, key=lambda cut: -cut.num_tokens)
    if len({cut.num_base_tokens for cut in cuts}) != 1:
        raise ConfigError("cuts: one or more are needed, all of the same base tokens")
    size = cuts[0].num_base_tokens
    if num_blocks < 1 or size % num_blocks != 0:
        raise ConfigError(f"cuts: {size} tokens cannot be cut into {num_blocks} equal blocks")
    blocks = torch.arange(size) // (size // num_blocks)
    for cut in cuts:
        across = torch.nonzero(blocks[_first_members(cut)][cut.labels] != blocks)
        if len(across):
            raise ConfigError(
                f"cuts: at {cut.num_tokens} tokens, base token {int(across[0])} shares a cluster "
                f"with a token of another of the {num_blocks} blocks"
            )
    # From single tokens over the given cuts to whole blocks and their union, fine to coarse.
    whole = [MergeAssignment.from_labels(blocks), MergeAssignment.from_labels(blocks * 0)]
    levels = [MergeAssignment.from_labels(torch.arange(size)), *cuts, *whole]
    for fine, coarse in itertools.pairwise(levels):
        Nesting.between(fine, coarse)
    merges = _merges_through([cut.labels for cut in levels[1:]])
    ranks = torch.arange(1, size, dtype=torch.float64)
    return MergeTree(torch.tensor(merges), ranks, num_blocks)


def _merges_through(levels: list[Tensor]) -> list[tuple[int, int]]:
    """Merges that pass through nested partitions [N], from fine to coarse: N - 1 pairs."""
    size = len(levels[0])
    parts = [(1, token, token) for token in range(size)]  # tokens, smallest member, node
    merges: list[tuple[int, int]] = []
    for labels in levels:
        groups: dict[int, list[tuple[int, int, int]]] = {}
        for part in sorted(parts):
            groups.setdefault(int(labels[part[1]]), []).append(part)  # by the cluster to become
        while waiting := [group for group in groups.values() if len(group) > 1]:
            # Ties are decided by the smallest member, so that equal cuts give equal trees.
            group = min(waiting, key=lambda group: (group[0][0] + group[1][0], group[0][1]))
            (s_a, first_a, a), (s_b, first_b, b) = group[:2]
            merges.append((min(a, b), max(a, b)))
            joined = (s_a + s_b, min(first_a, first_b), size + len(merges) - 1)
            group[:2] = []
            bisect.insort(group, joined)
        parts = [group[0] for group in groups.values()]
    return merges
