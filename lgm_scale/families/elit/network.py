"""ELIT: a diffusion transformer on a grid, with a latent sequence of variable length inside.

`SiT` is the host: patches of a [channels, side, side] state, fixed positions, adaLN-Zero blocks.
`ELIT` runs its first blocks on all N spatial tokens, reads them into latents, runs the core on
K = k G of these, writes back, and runs its last blocks on N tokens again. The state itself has one
size at every K: what changes is work.

Time. The release's networks are told s = 1 - t (0 is data) and predict noise - data. This is the
border: `forward` speaks our convention (`objectives.flow`), `forward_released` theirs.

Source: ELIT (arXiv 2603.12245); SiT (arXiv 2401.08740). Built from a description of the release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lgm_scale.errors import ConfigError
from lgm_scale.families.elit.interface import LAYER_NORM_EPS, Read, Write
from lgm_scale.layers import (
    MLP,
    Attention,
    DiTBlock,
    FinalLayer,
    LabelEmbedding,
    TimestepEmbedding,
    initialize_transformer,
)

__all__ = [
    "ELIT",
    "RELEASED_POSITION_ROWS",
    "SIT_SIZES",
    "SPLITS",
    "SiT",
    "SiTSize",
    "sincos_table",
]

DropMode = Literal["skip_core", "remove"]
RELEASED_POSITION_ROWS = 4096
"""Rows of the latents' position table in every released checkpoint; N of them are ever read."""
_MLP_RATIO = 4


@dataclass(frozen=True)
class SiTSize:
    """Width, blocks and heads; millions of parameters at 256 px, patch 2, with the fixed table."""

    width: int
    depth: int
    num_heads: int
    params_m: float
    elit_params_m: float


SIT_SIZES = {
    #               width depth heads SiT ELIT (published; tiny is ours)
    "tiny": SiTSize(128, 6, 4, 2.03, 2.87),
    "s": SiTSize(384, 12, 6, 32.96, 37.36),
    "b": SiTSize(768, 12, 12, 130.50, 144.90),
    "l": SiTSize(1024, 24, 16, 458.09, 482.27),
    "xl": SiTSize(1152, 28, 16, 675.11, 705.12),
}

SPLITS: dict[str, dict[str, tuple[int, int, int]]] = {
    "released": {"s": (8, 2, 2), "b": (8, 2, 2), "l": (8, 12, 4), "xl": (8, 16, 4)},
    "declared": {
        "tiny": (1, 4, 1),
        "s": (2, 8, 2),
        "b": (2, 8, 2),
        "l": (4, 16, 4),
        "xl": (4, 20, 4),
    },
    "paper": {"b": (3, 6, 3), "xl": (4, 20, 4)},
}
"""Blocks before Read, in the core, after Write.

released: what the released code runs, and with it every released checkpoint: it puts Read where an
argument of another method says. declared: what its own arguments say. paper: what the paper says.
"""


def sincos_table(width: int, grid: int) -> Tensor:
    """Fixed positions: the first half of a row holds the column, the second the row of the grid.

    Shapes: -> [grid grid, width] float32; width divisible by 4.
    """
    quarter = width // 4
    rates = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * rates  # [h, C/4]
    waves = torch.cat((angles.sin(), angles.cos()), dim=-1)  # [h, C/2]
    columns = waves[None, :, :].expand(grid, -1, -1)
    rows = waves[:, None, :].expand(-1, grid, -1)
    return torch.cat((columns, rows), dim=-1).reshape(grid**2, width).float()


def _norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=LAYER_NORM_EPS, elementwise_affine=False)


class SiT(nn.Module):
    """Velocity of a state on a grid; one token count, N.

    Args:
        width: C, divisible by 4 and by num_heads. See `SIT_SIZES`.
        depth: Number of blocks.
        num_heads: H.
        channels: Of the state: 4 for SD-VAE latents, 3 for pixels.
        side: Of the state; divisible by patch_size.
        patch_size: p; N = (side / p)^2.
        num_classes: Classes without the null label.

    Raises: ConfigError for sizes that do not divide.
    """

    pos_embed: Tensor

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        channels: int,
        side: int,
        patch_size: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        if width % num_heads != 0 or width % 4 != 0:
            raise ConfigError(f"width: {width} is not divisible by 4 and by {num_heads} heads")
        if side % patch_size != 0:
            raise ConfigError(f"patch_size: {patch_size} does not divide the state's side {side}")
        self.channels, self.side, self.patch_size = channels, side, patch_size
        self.grid = side // patch_size
        self.num_classes = num_classes
        self.x_embed = nn.Conv2d(channels, width, patch_size, patch_size)
        self.register_buffer("pos_embed", sincos_table(width, self.grid), persistent=False)
        self.t_embed = TimestepEmbedding(width)
        self.label_embed = LabelEmbedding(num_classes, width)
        self.blocks = nn.ModuleList(
            DiTBlock(
                width,
                Attention(width, num_heads, qk_norm=False),
                MLP(width, _MLP_RATIO * width),
                _norm,
            )
            for _ in range(depth)
        )
        self.final = FinalLayer(width, patch_size**2 * channels, _norm)
        initialize_transformer(self)
        nn.init.xavier_uniform_(self.x_embed.weight.view(width, -1))  # as the linear layer it is
        nn.init.zeros_(self.x_embed.bias)  # type: ignore[arg-type]

    @property
    def num_base_tokens(self) -> int:
        """N, spatial tokens."""
        return self.grid**2

    @property
    def token_lengths(self) -> tuple[int, ...]:
        """Every K that the network runs at, rising."""
        return (self.num_base_tokens,)

    @property
    def null_label(self) -> int:
        """The label of the unconditional branch."""
        return self.label_embed.null_label

    def check_length(self, num_tokens: int) -> None:
        """Raise ConfigError unless the network runs at `num_tokens` tokens."""
        if num_tokens not in self.token_lengths:
            raise ConfigError(
                f"num_tokens: {num_tokens}; a SiT has no latents and runs at {self.num_base_tokens}"
            )

    def block_lengths(self, num_tokens: int) -> set[int]:
        """Token counts at which blocks run at a budget of K: ELIT's outer blocks run at N."""
        return {self.num_base_tokens, num_tokens}

    def forward(self, z_t: Tensor, t: Tensor, labels: Tensor, num_tokens: int) -> Tensor:
        """Predict the velocity, data - noise.

        Shapes: z_t [B, channels, side, side], t [B] in [0, 1] (1 is data), labels [B] int64
        (num_classes = null) -> as z_t. `num_tokens` is K, an int.
        Raises: ConfigError for a K that the network does not have.
        """
        return -self.forward_released(z_t, 1 - t, labels, num_tokens)

    def forward_released(self, x: Tensor, s: Tensor, labels: Tensor, num_tokens: int) -> Tensor:
        """The network in the release's convention: s = 0 is data; predicts noise - data."""
        self.check_length(num_tokens)
        # Contiguous: the residual stream of all blocks would keep the convolution's layout.
        tokens = self.x_embed(x).flatten(2).transpose(1, 2).contiguous()  # [B, N, C]
        tokens = tokens + self.pos_embed.to(tokens.dtype)
        condition = self.t_embed(s) + self.label_embed(labels)  # [B, C]
        tokens = self.transform(tokens, condition, num_tokens)
        return self._unpatchify(self.final(tokens, condition))

    def transform(self, x: Tensor, condition: Tensor, num_tokens: int) -> Tensor:
        """All blocks. Shapes: x [B, N, C], condition [B, C] -> [B, N, C]."""
        for block in self.blocks:
            x = block(x, condition)
        return x

    def _unpatchify(self, x: Tensor) -> Tensor:
        """[B, N, p p channels], channel fastest -> [B, channels, side, side]."""
        p, grid = self.patch_size, self.grid
        x = x.view(len(x), grid, grid, p, p, self.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.channels, self.side, self.side)


class ELIT(SiT):
    """A SiT whose core runs on K latents.

    Args:
        width: As `SiT`, and so are the next six.
        depth: Number of blocks, head, core and tail together.
        num_heads: H.
        channels: Of the state.
        side: Of the state.
        patch_size: p.
        num_classes: Classes without the null label.
        head_blocks: Blocks before Read.
        tail_blocks: Blocks after Write.
        group_size: g, the side of a window in tokens; divides side / p. J = g^2 latents each.
        drop_mode: What Write sees of the latents that the core did not. `skip_core`, as released:
            all, those as Read left them. `remove`: none of them.
        position_rows: Of the latents' position table.

    Raises: ConfigError for sizes that do not divide, or no block left for the core.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        channels: int,
        side: int,
        patch_size: int,
        num_classes: int,
        *,
        head_blocks: int,
        tail_blocks: int,
        group_size: int,
        drop_mode: DropMode = "skip_core",
        position_rows: int = RELEASED_POSITION_ROWS,
    ) -> None:
        super().__init__(width, depth, num_heads, channels, side, patch_size, num_classes)
        if min(head_blocks, tail_blocks) < 0 or head_blocks + tail_blocks >= depth:
            raise ConfigError(
                f"head_blocks and tail_blocks: {head_blocks} + {tail_blocks} of {depth} blocks "
                "leave none for the core"
            )
        if group_size < 1 or self.grid % group_size != 0:
            raise ConfigError(
                f"group_size: windows of {group_size} x {group_size} tokens do not divide the "
                f"grid of {self.grid} x {self.grid}; valid: {_divisors(self.grid)}"
            )
        if position_rows < self.num_base_tokens:
            raise ConfigError(
                f"position_rows: {position_rows} rows for {self.num_base_tokens} latents; needs "
                "one each"
            )
        if drop_mode not in ("skip_core", "remove"):
            raise ConfigError(f"drop_mode: {drop_mode!r} is unknown; use skip_core or remove")
        self.head_blocks, self.tail_blocks = head_blocks, tail_blocks
        self.group_size, self.drop_mode = group_size, drop_mode
        self.read = Read(width, num_heads, self.grid, group_size, position_rows)
        self.write = Write(width, num_heads, self.grid, group_size)

    @property
    def num_windows(self) -> int:
        """G."""
        return (self.grid // self.group_size) ** 2

    @property
    def max_budget(self) -> int:
        """J, latents per window."""
        return self.group_size**2

    @property
    def token_lengths(self) -> tuple[int, ...]:
        """K = k G for k = 1 .. J."""
        return tuple(k * self.num_windows for k in range(1, self.max_budget + 1))

    def check_length(self, num_tokens: int) -> None:
        """Raise ConfigError unless `num_tokens` is a budget of 1 to J latents per window."""
        self.budget(num_tokens)

    def budget(self, num_tokens: int) -> int:
        """k, latents per window, of K tokens. Raises: ConfigError."""
        k, rest = divmod(num_tokens, self.num_windows)
        if rest or not 1 <= k <= self.max_budget:
            raise ConfigError(
                f"num_tokens: {num_tokens} is no budget of this network; it is k x "
                f"{self.num_windows} windows with k from 1 to {self.max_budget}: "
                f"{self.num_windows}, {2 * self.num_windows}, ..., {self.num_base_tokens}"
            )
        return k

    def transform(self, x: Tensor, condition: Tensor, num_tokens: int) -> Tensor:
        """Head, Read, core on K latents, Write, tail. Shapes: as in `SiT`."""
        k, blocks = self.budget(num_tokens), list(self.blocks)
        first, last = self.head_blocks, len(blocks) - self.tail_blocks
        for block in blocks[:first]:
            x = block(x, condition)
        latents, spatial = self.read(x, condition)  # [B, G, J, C]
        kept = latents[:, :, :k].flatten(1, 2).contiguous()  # [B, K, C], one layout at every k
        for block in blocks[first:last]:
            kept = block(kept, condition)
        kept = kept.unflatten(1, (self.num_windows, k))
        if self.drop_mode == "skip_core" and k < self.max_budget:
            kept = torch.cat((kept, latents[:, :, k:]), dim=2)
        x = self.write(spatial, kept)
        for block in blocks[last:]:
            x = block(x, condition)
        return x


def _divisors(number: int) -> str:
    return ", ".join(str(g) for g in range(1, number + 1) if number % g == 0)
