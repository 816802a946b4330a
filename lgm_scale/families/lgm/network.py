"""MergeDiT: the merge-aware diffusion transformer.

What is unusual about it: (a) its input are merged tokens, any K of them; (b) learned positions
are merged like the tokens; (c) log cluster sizes are added to every attention logit. Nothing else
depends on K. No rotary embedding.

Source: LGM paper, merge-aware diffusion transformer, on LightningDiT blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lgm_scale.errors import ConfigError
from lgm_scale.layers import (
    NORM_EPS,
    Attention,
    DiTBlock,
    FinalLayer,
    LabelEmbedding,
    SwiGLU,
    TimestepEmbedding,
    initialize_transformer,
)
from lgm_scale.merging.tree import MergeAssignment

__all__ = ["DIT_SIZES", "DiTSize", "MergeDiT"]


@dataclass(frozen=True)
class DiTSize:
    """Width, layers and heads; parameters in millions at D = 32, N = 256, 1000 classes."""

    width: int
    depth: int
    num_heads: int
    params_m: float


DIT_SIZES = {
    #            width depth heads params
    "tiny": DiTSize(128, 4, 4, 1.4),
    "s": DiTSize(512, 8, 8, 39.4),
    "b": DiTSize(768, 12, 12, 130.6),
    "l": DiTSize(1024, 24, 16, 458.2),
    "xl": DiTSize(1152, 28, 16, 675.3),
    "h": DiTSize(1280, 32, 16, 951.4),
}


def _norm(width: int) -> nn.Module:
    return nn.RMSNorm(width, eps=NORM_EPS)


class MergeDiT(nn.Module):
    """Velocity of merged tokens at any K.

    Args:
        width: C. See `DIT_SIZES` for the published sizes.
        depth: Number of blocks.
        num_heads: H; C must be divisible by it.
        latent_dim: D.
        num_base_tokens: N, the length of the position table.
        num_classes: Classes without the null label.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        latent_dim: int,
        num_base_tokens: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        if width % num_heads != 0:
            raise ConfigError(f"width {width} is not divisible by num_heads {num_heads}")
        self.latent_dim = latent_dim
        self.num_base_tokens = num_base_tokens
        self.num_classes = num_classes
        self.x_embed = nn.Linear(latent_dim, width)
        self.pos_embed = nn.Parameter(torch.empty(1, num_base_tokens, width))
        self.t_embed = TimestepEmbedding(width)
        self.label_embed = LabelEmbedding(num_classes, width)
        self.blocks = nn.ModuleList(
            DiTBlock(width, Attention(width, num_heads), SwiGLU(width), _norm) for _ in range(depth)
        )
        self.final = FinalLayer(width, latent_dim, _norm)
        self.initialize()

    @classmethod
    def from_size(
        cls, size: str, latent_dim: int, num_base_tokens: int, num_classes: int
    ) -> MergeDiT:
        """Build a row of `DIT_SIZES`."""
        row = DIT_SIZES[size]
        return cls(row.width, row.depth, row.num_heads, latent_dim, num_base_tokens, num_classes)

    @property
    def null_label(self) -> int:
        """The label of the unconditional branch."""
        return self.label_embed.null_label

    def block_lengths(self, num_tokens: int) -> set[int]:
        """Token counts at which blocks run when the network runs at K: all of them at K."""
        return {num_tokens}

    def initialize(self) -> None:
        """See `initialize_transformer`."""
        initialize_transformer(self, self.pos_embed)

    def forward(
        self, z_t: Tensor, t: Tensor, labels: Tensor, assignment: MergeAssignment
    ) -> Tensor:
        """Predict the velocity.

        Shapes: z_t [B, K, D], t [B] in [0, 1], labels [B] int64 (num_classes = null) -> [B, K, D].
        """
        x = self.x_embed(z_t) + assignment.merge(self.pos_embed).to(z_t.dtype)  # [B, K, C]
        condition = self.t_embed(t) + self.label_embed(labels)  # [B, C]
        log_sizes = None
        if assignment.num_tokens < assignment.num_base_tokens:
            log_sizes = assignment.sizes.to(torch.float32).log()
        for block in self.blocks:
            x = block(x, condition, log_sizes)
        return self.final(x, condition)
