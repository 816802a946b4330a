"""MergeDiT: the merge-aware diffusion transformer.

What is unusual about it: (a) its input are merged tokens, any K of them; (b) learned positions
are merged like the tokens; (c) log cluster sizes are added to every attention logit. Nothing else
depends on K. No rotary embedding.

Source: LGM paper, merge-aware diffusion transformer, on LightningDiT blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lgm_scale.errors import ConfigError
from lgm_scale.families.lgm.config import DIT_SIZES, LGMModelConfig
from lgm_scale.layers import (
    NO_END_TIME,
    NORM_EPS,
    Attention,
    DiTBlock,
    EndTimeEmbedding,
    FinalLayer,
    LabelEmbedding,
    SwiGLU,
    TimestepEmbedding,
    block_flops,
    ends_flops,
    initialize_transformer,
    swiglu_hidden,
)
from lgm_scale.merging.tree import MergeAssignment
from lgm_scale.packing import Packing


def _norm(width: int) -> nn.Module:
    """The norm of LightningDiT's blocks; adaLN gives it scale and shift of its own besides."""
    return nn.RMSNorm(width, eps=NORM_EPS)


def _log_sizes(assignment: MergeAssignment) -> Tensor | None:
    """Logarithms of the sizes [K] float32. At K = N they are 0, and attention is the plain one."""
    if assignment.num_tokens == assignment.num_base_tokens:
        return None
    return assignment.sizes.to(torch.float32).log()


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
        end_time: Give the average velocity up to a time that is passed besides (`mean_flow`).

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
        end_time: bool = False,
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
        self.end_embed = EndTimeEmbedding(width) if end_time else None
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
        end_time: bool = False,
    ) -> MergeDiT:
        """Build the network of a size that `DIT_SIZES` names."""
        row = DIT_SIZES[size]
        common = (latent_dim, num_base_tokens, num_classes, end_time)
        return cls(row.width, row.depth, row.num_heads, *common)

    @property
    def null_label(self) -> int:
        """The label of the unconditional branch."""
        return self.label_embed.null_label

    def initialize(self) -> None:
        """Start as adaLN-Zero does, with positions of std .02: the output is zero at first."""
        initialize_transformer(self, self.pos_embed)

    def forward(
        self,
        z_t: Tensor | Sequence[Tensor],
        t: Tensor,
        labels: Tensor,
        assignment: MergeAssignment | Sequence[MergeAssignment],
        end: Tensor | None = None,
        features_after: int | None = None,
    ) -> Any:
        """Predict the velocity, or of a network with `end_time` its average from t to `end`.

        Shapes: z_t [B, K, D], t [B] in [0, 1], labels [B] int64 (num_classes = null), end [B] from
        t to 1 -> [B, K, D]. Of several K at once, z_t is one [B_g, K_g, D] for each assignment,
        and so is the result; t and labels are those of all groups, one after the other.
        With `features_after`, the result is a pair: the second are the features after so many
        blocks, in the shape of the first with C channels.
        """
        # (a), (b): a cluster stands where its tokens do on average. The same P that merges latents,
        # so the position of a merged token is the merged position, at every K.
        # (c): as a key, a cluster of s tokens weighs as much as s tokens would.
        if isinstance(assignment, MergeAssignment):
            assert isinstance(z_t, Tensor)
            sizes = _log_sizes(assignment)
            x = self.x_embed(z_t) + self._positions(assignment, z_t)  # [B, K, C]
        else:
            counts, lengths = zip(*[z.shape[:2] for z in z_t], strict=True)
            sizes = Packing(counts, lengths, tuple(map(_log_sizes, assignment)))
            groups = sizes.groups(self.x_embed(sizes.join(z_t)))
            pairs = zip(groups, assignment, strict=True)
            x = sizes.join([z + self._positions(own, z_t[0]) for z, own in pairs])  # [T, C]
        condition = self.t_embed(t) + self.label_embed(labels)  # [B, C]
        if self.end_embed is not None:
            condition = condition + self.end_embed(t, end)
        elif end is not None:
            raise ConfigError(NO_END_TIME)
        features = None
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, condition, sizes)
            if number == features_after:
                features = x
        velocity = self.final(x, condition, sizes)
        found = [velocity] if features is None else [velocity, features]
        if isinstance(sizes, Packing):
            found = list(map(sizes.groups, found))
        return found[0] if features is None else tuple(found)

    def _positions(self, assignment: MergeAssignment, like: Tensor) -> Tensor:
        """Merged positions [1, K, C] in the dtype of the state."""
        return assignment.merge(self.pos_embed).to(like.dtype)

    def block_lengths(self, num_tokens: int) -> set[int]:
        """Token counts at which blocks run when K tokens are asked for: K alone."""
        return {num_tokens}

    def flops(self, num_tokens: int) -> int:
        """Operations of one forward pass of one sample at K tokens, a multiply-add being two.

        Merging the position table (2 N K C, once per batch) is left out.
        """
        width = self.pos_embed.shape[-1]
        block = block_flops(num_tokens, width, 3 * width * swiglu_hidden(width))
        times = 1 if self.end_embed is None else 2
        ends = ends_flops(num_tokens, width, self.t_embed.num_features, self.latent_dim, times)
        return len(self.blocks) * block + ends


def build_merge_dit(config: LGMModelConfig) -> MergeDiT:
    """A generator with fresh weights."""
    return MergeDiT.from_size(
        config.size,
        config.latent_dim,
        config.num_base_tokens,
        config.num_classes,
        config.end_time,
    )
