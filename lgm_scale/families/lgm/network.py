"""MergeDiT: the merge-aware diffusion transformer.

What is unusual about it: (a) its input are merged tokens, any K of them; (b) learned positions
are merged like the tokens; (c) log cluster sizes are added to every attention logit. Nothing else
depends on K. No rotary embedding.

Source: LGM paper, merge-aware diffusion transformer, on LightningDiT blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lgm_scale.errors import ConfigError
from lgm_scale.families.lgm.config import DIT_SIZES, LGMModelConfig, RoutingConfig
from lgm_scale.layers import (
    NORM_EPS,
    Attention,
    DiTBlock,
    FinalLayer,
    LabelEmbedding,
    SwiGLU,
    TimestepEmbedding,
    block_flops,
    ends_flops,
    initialize_transformer,
    swiglu_hidden,
)
from lgm_scale.merging.nesting import Nesting, through_coarse
from lgm_scale.merging.tree import MergeAssignment


def _norm(width: int) -> nn.Module:
    """The norm of LightningDiT's blocks; adaLN gives it scale and shift of its own besides."""
    return nn.RMSNorm(width, eps=NORM_EPS)


class MergeDiT(nn.Module):
    """Velocity of merged tokens at any K: one set of weights for every length.

    A transformer knows its tokens as a set. So it runs at any K once each token says what it is
    (the merged position) and how much it stands for (the log size).

    Args:
        width: C. `DIT_SIZES` has the published sizes.
        depth: Number of blocks.
        num_heads: H; C must be divisible by it.
        latent_dim: D.
        num_base_tokens: N, the length of the position table.
        num_classes: Classes without the null label.
        routing: Blocks that see all K tokens where the others run at K' < K; it has no weights.

    Raises: ConfigError if the heads do not divide the width.
    Source: LGM paper, merge-aware diffusion transformer.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        latent_dim: int,
        num_base_tokens: int,
        num_classes: int,
        routing: RoutingConfig | None = None,
    ) -> None:
        super().__init__()
        if width % num_heads != 0:
            raise ConfigError(f"width {width} is not divisible by num_heads {num_heads}")
        self.latent_dim = latent_dim
        self.num_base_tokens = num_base_tokens
        self.num_classes = num_classes
        self.routing = routing
        self.trained_middles: Mapping[int, Mapping[int, float]] = {}
        """Share of each K' of the steps at K, in a network that is trained with `routing`."""
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
        cls,
        size: str,
        latent_dim: int,
        num_base_tokens: int,
        num_classes: int,
        routing: RoutingConfig | None = None,
    ) -> MergeDiT:
        """Build the network of a size that `DIT_SIZES` names."""
        row = DIT_SIZES[size]
        sizes = (row.width, row.depth, row.num_heads, latent_dim, num_base_tokens, num_classes)
        return cls(*sizes, routing)

    @property
    def null_label(self) -> int:
        """The label of the unconditional branch."""
        return self.label_embed.null_label

    def initialize(self) -> None:
        """Start as adaLN-Zero does, with positions of std .02: the output is zero at first."""
        initialize_transformer(self, self.pos_embed)

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        labels: Tensor,
        assignment: MergeAssignment,
        middle: Nesting | None = None,
    ) -> Tensor:
        """Predict the velocity; with `middle`, whose fine cut is `assignment`, by nested routing.

        The blocks between the first and the last then run on the coarse cut, K' tokens. A network
        whose middle has all K tokens is the one without routing, to the bit.

        Shapes: z_t [B, K, D], t [B] in [0, 1], labels [B] int64 (num_classes = null) -> [B, K, D].
        Raises: ConfigError for a smaller middle without `routing`.
        """
        # (a), (b): a cluster stands where its tokens do on average. The same P that merges latents,
        # so the position of a merged token is the merged position, at every K.
        x = self.x_embed(z_t) + assignment.merge(self.pos_embed).to(z_t.dtype)  # [B, K, C]
        condition = self.t_embed(t) + self.label_embed(labels)  # [B, C]

        def run(x: Tensor, first: int, end: int, cut: MergeAssignment) -> Tensor:
            # (c): as a key, a cluster of s tokens weighs as much as s tokens would. At K = N all
            # sizes are 1 and their logarithms 0: plain attention.
            log_sizes = None
            if cut.num_tokens < cut.num_base_tokens:
                log_sizes = cut.sizes.to(torch.float32).log()
            for block in list(self.blocks)[first:end]:
                x = block(x, condition, log_sizes)
            return x

        depth = len(self.blocks)
        if middle is None or middle.coarse.num_tokens == assignment.num_tokens:
            return self.final(run(x, 0, depth, assignment), condition)
        first, end = self._middle()
        x = run(x, 0, first, assignment)
        # No positions again: those of the K tokens are in x, and are merged with it.
        x = through_coarse(x, middle, lambda m: run(m, first, end, middle.coarse))
        return self.final(run(x, end, depth, assignment), condition)

    def _middle(self) -> tuple[int, int]:
        """The blocks that run at K': from the first index up to the second."""
        if self.routing is None:
            raise ConfigError("middle_tokens: this network was built without model.routing")
        return self.routing.first, len(self.blocks) - self.routing.last

    def block_lengths(self, num_tokens: int) -> set[int]:
        """Token counts at which blocks run when K tokens are asked for: K, and in training K'."""
        return {num_tokens, *self.trained_middles.get(num_tokens, ())}

    def flops(self, num_tokens: int, middle_tokens: int | None = None) -> int:
        """Operations of one forward pass of one sample at K tokens, a multiply-add being two.

        `middle_tokens` is K'; without it all blocks run at K, and in a network that is being
        trained with `routing` it is the mean over the K' of the steps at K.

        Merging the position table (2 N K C, once per batch) is left out.
        """
        if middle_tokens is None:
            shares = self.trained_middles.get(num_tokens, {num_tokens: 1})
            return round(sum(share * self.flops(num_tokens, k) for k, share in shares.items()))
        width = self.pos_embed.shape[-1]
        mlp, depth = 3 * width * swiglu_hidden(width), len(self.blocks)
        ends = ends_flops(num_tokens, width, self.t_embed.num_features, self.latent_dim)
        if middle_tokens == num_tokens:
            return depth * block_flops(num_tokens, width, mlp) + ends
        first, end = self._middle()
        outer = (depth - end + first) * block_flops(num_tokens, width, mlp)
        inner = (end - first) * block_flops(middle_tokens, width, mlp)
        return outer + inner + 4 * num_tokens * middle_tokens * width + ends  # to K' and back


def build_merge_dit(config: LGMModelConfig) -> MergeDiT:
    """A generator with fresh weights."""
    return MergeDiT.from_size(
        config.size, config.latent_dim, config.num_base_tokens, config.num_classes, config.routing
    )
