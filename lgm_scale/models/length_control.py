"""How a tokenizer reaches K tokens. The method: learnable global merging.

Source: LGM paper. Constants of the release: 768-dimensional embeddings, exploration noise
0.1 * clip(normal, -1, 1), straight-through temperature 0.1.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgm_scale.merging import MergeTree, cosine_similarity, straight_through_merge
from lgm_scale.randomness import Purpose

__all__ = ["LearnedMerging", "exploration_noise"]


def exploration_noise(seed: int, step: int, num_tokens: int, scale: float = 0.1) -> np.ndarray:
    """Noise on the similarities of one training step: [N * (N - 1) / 2] float64.

    A function of (seed, step) alone: every rank grows the same tree.
    """
    rng = np.random.default_rng([seed, int(Purpose.EXPLORATION), step])
    count = num_tokens * (num_tokens - 1) // 2
    return scale * np.clip(rng.standard_normal(count), -1.0, 1.0)


class LearnedMerging(nn.Module):
    """One learned embedding per token; clustering them gives the tree for all images.

    Args:
        num_base_tokens: N.
        num_blocks: Blocks within which tokens may merge (the codebook segments).
        embedding_dim: Width of the embeddings.
    """

    def __init__(self, num_base_tokens: int, num_blocks: int, embedding_dim: int = 768) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.embeddings = nn.Parameter(torch.empty(num_base_tokens, embedding_dim))
        self.initialize()

    def initialize(self) -> None:
        """Rows as random unit vectors."""
        with torch.no_grad():
            self.embeddings.normal_()
            self.embeddings.copy_(F.normalize(self.embeddings, dim=-1))

    def tree(self, exploration: np.ndarray | None = None) -> MergeTree:
        """The merge tree of the embeddings as they are now."""
        similarity = cosine_similarity(self.embeddings.detach())
        return MergeTree.from_similarity(similarity, self.num_blocks, exploration)

    def forward(self, z: Tensor, num_tokens: int, exploration: np.ndarray | None = None) -> Tensor:
        """Merge to K tokens and expand again, with a gradient to the embeddings.

        Shapes: z [B, N, D] -> [B, N, D]. K = N means no merging at all: z itself.
        """
        if num_tokens == z.shape[1]:
            return z
        assignment = self.tree(exploration).assignment(num_tokens).to(z.device)
        return straight_through_merge(z, self.embeddings, assignment)
