"""The heart of the method: one merge tree, and the assignment of tokens to clusters at every K.

What lives here: the dendrogram over the N base tokens (`MergeTree`), one cut of it
(`MergeAssignment`), the straight-through merge of training. Pure tensors: no module, no trainer.
Nothing here depends on an image: one tree serves all of them.

Source: LGM paper (arXiv 2606.20076), learnable global merging. That all cuts come from one
dendrogram, and hence are nested, is our observation; the paper clusters anew for every K.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.merging.linkage import average_linkage, in_block_triangle
from lgm_scale.storage.files import follow_umask

TREE_NAME = "merge_tree.safetensors"
"""File of a merge tree, in folders of latents and in bundles."""


@dataclass(frozen=True, eq=False)
class MergeAssignment:
    """Which cluster each base token belongs to, at one K.

    The paper's A in {0, 1}^[N, K] as one label per token, with s_j = sum_i A_ij the sizes and
    P = A / s the averaging matrix: z_K = P^T z merges, A z_K unmerges.

    Shapes: labels [N] int64 in [0, K), sizes [K] int64 with sizes.sum() == N.
    Clusters are numbered by their smallest member, so equal partitions are equal tensors.
    Source: LGM paper, learnable global merging.
    """

    labels: Tensor
    sizes: Tensor
    pool: Tensor = field(repr=False)
    """Averaging matrix [N, K] float32; its columns sum to 1."""

    @classmethod
    def from_labels(cls, labels: Tensor) -> MergeAssignment:
        """Build from any labelling [N]; clusters are renumbered by their smallest member."""
        # What computes with clusters does not care about their order, so any fixed one will do;
        # with one fixed, cuts can be compared, cached and stored wherever they come from.
        labels = torch.as_tensor(_canonical(labels.cpu().numpy()), device=labels.device)
        sizes = torch.bincount(labels)  # [K]
        one_hot = F.one_hot(labels, len(sizes)).to(torch.float32)  # [N, K]
        return cls(labels=labels, sizes=sizes, pool=one_hot / sizes)

    @property
    def num_base_tokens(self) -> int:
        """N, base tokens of an image."""
        return self.labels.shape[0]

    @property
    def num_tokens(self) -> int:
        """K, clusters of this cut."""
        return self.sizes.shape[0]

    def to(self, device: torch.device | str) -> MergeAssignment:
        """Return the same assignment on another device."""
        return MergeAssignment(self.labels.to(device), self.sizes.to(device), self.pool.to(device))

    def merge(self, z: Tensor) -> Tensor:
        """Average base tokens into their merged tokens.

        Shapes: z [B, N, D] -> [B, K, D], in z's dtype. Exact identity at K == N.
        A matrix product, not a scatter: the result is deterministic on a GPU, too.
        Raises: ConfigError if z does not have N tokens.
        Source: LGM paper, token mean.
        """
        if z.shape[-2] != self.num_base_tokens:
            raise ConfigError(
                f"merge: got {z.shape[-2]} tokens, the merge tree has {self.num_base_tokens}; "
                "use latents and tree of the same tokenizer"
            )
        if self.num_tokens == self.num_base_tokens:
            return z
        with torch.autocast(z.device.type, enabled=False):  # or a float32 mean comes in bfloat16
            return self.pool.to(z.dtype).T @ z  # [K, N] @ [B, N, D] -> [B, K, D]

    def unmerge(self, z_merged: Tensor) -> Tensor:
        """Give every base token the value of its cluster.

        Shapes: z_merged [B, K, D] -> [B, N, D].
        Raises: ConfigError if z_merged does not have K tokens.
        """
        if z_merged.shape[-2] != self.num_tokens:
            raise ConfigError(
                f"unmerge: got {z_merged.shape[-2]} tokens, the assignment has {self.num_tokens}"
            )
        return z_merged.index_select(-2, self.labels)  # A z_K: a copy per token, no product

    def project_noise(self, noise: Tensor) -> Tensor:
        """Project full-length noise to K tokens: variance 1 / size per merged token.

        Shapes: noise [B, N, D] ~ N(0, 1) -> [B, K, D].
        Source: the release's noise-scale correction. P^T (t z + (1 - t) noise) is the state of the
        merged latents only if their noise is P^T noise, too: one process, seen at every length.
        """
        return self.merge(noise)


def _canonical(labels: np.ndarray) -> np.ndarray:
    """Renumber clusters by their smallest member: labels [N] -> [N] int64."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty_like(first)  # [K]: place of each given label among the smallest members
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse].astype(np.int64)


class MergeTree:
    """One dendrogram over the base tokens; `assignment(K)` cuts it at any K.

    Agglomerative clustering joins the closest two clusters, again and again. To stop at K clusters
    is to take the first N - K joins of one and the same list, which is what is kept here.

    Shapes: merges [N - 1, 2] int64 (row i joins two nodes into node N + i; leaves are 0..N-1),
    heights [N - 1] float64, ascending: average-linkage cosine distance of each merge.
    The last num_blocks - 1 merges join whole blocks and are never used: K >= num_blocks.
    Source: LGM paper, learnable global merging; keeping the tree instead of its cuts is ours.
    """

    def __init__(self, merges: Tensor, heights: Tensor, num_blocks: int) -> None:
        self.merges = merges.to("cpu", torch.int64)
        self.heights = heights.to("cpu", torch.float64)
        self.num_blocks = int(num_blocks)
        self._cuts: dict[tuple[int, str], MergeAssignment] = {}  # by K and device
        self._check()

    @property
    def num_base_tokens(self) -> int:
        """N, base tokens of an image."""
        return self.merges.shape[0] + 1

    @classmethod
    def from_embeddings(cls, embeddings: Tensor, num_blocks: int = 4) -> MergeTree:
        """Cluster the learned embeddings.

        Shapes: embeddings [N, E], any scale. Tokens of different blocks never merge.
        Raises: ConfigError if N is not divisible by num_blocks, or for values not finite.
        """
        return cls.from_similarity(cosine_similarity(embeddings), num_blocks)

    @classmethod
    def from_similarity(
        cls, similarity: Tensor, num_blocks: int = 4, exploration: np.ndarray | None = None
    ) -> MergeTree:
        """Cluster by cosine similarity, average linkage.

        Shapes: similarity [N, N], of which the upper triangle is read;
        exploration [N * (N - 1) / 2], added to that triangle, row by row (training only, so that
        the reconstruction can judge merges that the embeddings do not favour yet).
        Source: LGM paper; noise from the release, 0.1 * clip(normal, -1, 1).
        """
        size = similarity.shape[0]
        triangle = in_block_triangle(similarity, num_blocks).cpu()
        return cls.from_triangle(triangle, size, exploration)

    @classmethod
    def from_triangle(
        cls, triangle: Tensor, size: int, exploration: np.ndarray | None = None
    ) -> MergeTree:
        """Cluster by the similarities that count, on the host.

        Shapes: triangle [num_blocks, M * (M - 1) / 2] from `in_block_triangle`, M = size /
        num_blocks, size = N; exploration [N * (N - 1) / 2].
        """
        merges, heights = average_linkage(triangle, size, exploration)
        return cls(torch.from_numpy(merges), torch.from_numpy(heights), len(triangle))

    def assignment(self, num_tokens: int, device: torch.device | str = "cpu") -> MergeAssignment:
        """Cut the tree at K clusters. Cuts are kept, so a step costs a dictionary look-up.

        Raises: ConfigError unless num_blocks <= K <= N.
        """
        size = self.num_base_tokens
        if not self.num_blocks <= num_tokens <= size:
            raise ConfigError(
                f"num_tokens: {num_tokens} is outside [{self.num_blocks}, {size}], the range of "
                f"this merge tree ({self.num_blocks} blocks that never merge, {size} base tokens)"
            )
        key = (num_tokens, str(device))
        if key not in self._cuts:
            labels = torch.from_numpy(self._roots(size - num_tokens))  # N - K joins leave K nodes
            self._cuts[key] = MergeAssignment.from_labels(labels).to(device)
        return self._cuts[key]

    def near_ties(self, rounding: float) -> int:
        """Merges whose height lies within `rounding` of the next one's, joins of blocks left out.

        Similarities that are rounded otherwise may exchange two such merges, or make others.
        """
        inside = self.heights[: self.num_base_tokens - self.num_blocks]
        return int((inside.diff() <= rounding).sum())

    def _roots(self, num_merges: int) -> np.ndarray:
        """For each leaf, the node that holds it after the first `num_merges` merges: [N]."""
        size = self.num_base_tokens
        parent = np.arange(size + num_merges)  # a node that was never merged is its own root
        merges = self.merges[:num_merges].numpy()
        parent[merges] = np.arange(size, size + num_merges)[:, None]
        while True:  # pointer jumping: each round doubles the reach, so log2(depth) of them
            above = parent[parent]
            if np.array_equal(above, parent):
                return parent[:size]
            parent = above

    def _check(self) -> None:
        """Refuse tensors that are no dendrogram over equal blocks."""
        size, blocks = self.merges.shape[0] + 1, self.num_blocks
        if self.merges.ndim != 2 or self.merges.shape[1] != 2 or self.heights.shape != (size - 1,):
            raise CheckpointError("merge tree: merges must be [N - 1, 2] and heights [N - 1]")
        if blocks < 1 or size % blocks != 0:
            raise CheckpointError(
                f"merge tree: {size} tokens cannot be cut into {blocks} equal blocks"
            )
        # A binary tree: every node but the root is a child exactly once, of a later node.
        children = self.merges.flatten().sort().values
        made_later = self.merges.max(dim=1).values >= size + torch.arange(size - 1)
        if not torch.equal(children, torch.arange(2 * size - 2)) or bool(made_later.any()):
            raise CheckpointError("merge tree: its merges do not form a binary tree")
        if not torch.isfinite(self.heights).all() or bool((self.heights.diff() < 0).any()):
            raise CheckpointError("merge tree: heights must be finite and ascending")
        # With one cluster per block left, each must be its block, and no token of another.
        crossing = _canonical(self._roots(size - blocks)) != np.arange(size) // (size // blocks)
        if crossing.any():
            raise CheckpointError(f"merge tree: merges cross its {blocks} blocks")

    def save(self, path: str | Path) -> None:
        """Write the tree as safetensors."""
        tensors = {
            "merges": self.merges.contiguous(),
            "heights": self.heights.contiguous(),
            "num_blocks": torch.tensor(self.num_blocks),
        }
        # One metadata entry only: safetensors writes several in random order, and equal trees
        # are to be equal files.
        save_file(tensors, str(path), metadata={"format": "lgm_scale.merge_tree"})
        follow_umask(Path(path))

    @classmethod
    def load(cls, path: str | Path) -> MergeTree:
        """Read a tree written by `save`.

        Raises: CheckpointError if the file is missing, damaged or holds something else.
        """
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != "lgm_scale.merge_tree":
                    raise CheckpointError(f"{path}: not a merge tree")
                merges, heights = file.get_tensor("merges"), file.get_tensor("heights")
                num_blocks = int(file.get_tensor("num_blocks"))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read as a merge tree ({error})") from error
        return cls(merges, heights, num_blocks)


def cosine_similarity(vectors: Tensor) -> Tensor:
    """Cosine similarity of all pairs: [..., N, E] -> [..., N, N], float32 or wider."""
    # In half precision the similarities of close pairs would tie, and ties decide the tree.
    wide = vectors if vectors.dtype == torch.float64 else vectors.float()
    unit = F.normalize(wide, dim=-1)
    return unit @ unit.transpose(-1, -2)


def in_block_pairs(size: int, num_blocks: int, device: torch.device | str = "cpu") -> Tensor:
    """Mask [N, N] bool of the pairs of tokens that may merge (same block, self included)."""
    block = torch.arange(size, device=device) // (size // num_blocks)
    return block[:, None] == block[None, :]


def straight_through_merge(
    z: Tensor, embeddings: Tensor, assignment: MergeAssignment, temperature: float = 0.1
) -> Tensor:
    """Merge and unmerge with a gradient to the embeddings.

    Which cluster a token is in has no gradient. So the value is that of `unmerge(merge(z))`, up to
    rounding, and the gradient that of a soft assignment by similarity to the cluster centroids:
    A + soft - sg(soft), with soft = softmax(e c^T / temperature).

    Shapes: z [B, N, D], embeddings [N, E] -> [B, N, D].
    Source: LGM paper, straight-through estimator.
    """
    with torch.autocast(z.device.type, enabled=False):
        unit = F.normalize(embeddings.float(), dim=-1)  # [N, E]
        # Detached: a token moves between fixed clusters. Were the centroids to follow, every
        # token would agree with its cluster by dragging it along.
        centroids = F.normalize(assignment.pool.T @ unit.detach(), dim=-1)  # [K, E]
        soft = torch.softmax(unit @ centroids.T / temperature, dim=-1)  # [N, K]
        clusters = torch.arange(assignment.num_tokens, device=soft.device)
        hard = (assignment.labels[:, None] == clusters).to(soft.dtype)  # [N, K]; reads no number
        member = hard + soft - soft.detach()  # [N, K], the straight-through A
        # It enters twice, as in A P^T z: who is averaged, and who receives the average.
        mean = (member / member.sum(0)).T @ z.float()  # [B, K, D]
        return (member @ mean).to(z.dtype)
