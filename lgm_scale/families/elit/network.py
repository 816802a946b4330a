"""ELIT: a diffusion transformer on a grid, with a latent sequence of variable length inside.

`SiT` is the host: patches of a [channels, side, side] state, fixed positions, adaLN-Zero blocks.
`ELIT` runs its first blocks on all N spatial tokens, reads them into latents, runs the core on
K = k G of these, writes back, and runs its last blocks on N tokens again. The state itself has one
size at every K: what changes is work.

Time. The release's networks are told s = 1 - t (0 is data) and predict noise - data. This is the
border: `forward` speaks our convention (`lgm_scale.flow`), `forward_released` theirs.

Source: ELIT (arXiv 2603.12245); SiT (arXiv 2401.08740). Built from a description of the release.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lgm_scale.errors import ConfigError
from lgm_scale.families.elit.config import SIT_SIZES, SPLITS, ELITModelConfig, SpaceConfig
from lgm_scale.families.elit.interface import LAYER_NORM_EPS, Read, Write
from lgm_scale.layers import (
    MLP,
    NO_END_TIME,
    Attention,
    DiTBlock,
    EndTimeEmbedding,
    FinalLayer,
    LabelEmbedding,
    TimestepEmbedding,
    block_flops,
    ends_flops,
    initialize_transformer,
)

DropMode = Literal["skip_core", "remove"]
RELEASED_POSITION_ROWS = 4096
"""Rows of the latents' position table in every released checkpoint; N of them are ever read."""
_MLP_RATIO = 4


def sincos_table(width: int, grid: int) -> Tensor:
    """Fixed positions: the first half of a row holds the column, the second the row of the grid.

    Shapes: -> [grid grid, width] float32; width divisible by 4.
    """
    quarter = width // 4  # sine and cosine of column and of row
    # With values also where a plan builds on the meta device: there torch would compile `arange`.
    steps = partial(torch.arange, dtype=torch.float64, device="cpu")
    rates = 10000.0 ** -(steps(quarter) / quarter)
    angles = steps(grid)[:, None] * rates  # [h, C/4]
    waves = torch.cat((angles.sin(), angles.cos()), dim=-1)  # [h, C/2]
    columns = waves[None, :, :].expand(grid, -1, -1)
    rows = waves[:, None, :].expand(-1, grid, -1)
    return torch.cat((columns, rows), dim=-1).reshape(grid**2, width).float()


def _norm(width: int) -> nn.Module:
    """LayerNorm without weights of its own: adaLN brings scale and shift."""
    return nn.LayerNorm(width, eps=LAYER_NORM_EPS, elementwise_affine=False)


class SiT(nn.Module):
    """Velocity of a state on a grid; one token count, N.

    Args:
        width: C, divisible by 4 and by num_heads. `SIT_SIZES` has the published sizes.
        depth: Number of blocks.
        num_heads: H.
        channels: Channels of the state: 4 for SD-VAE latents, 3 for pixels.
        side: Side of the state in latent pixels, divisible by patch_size.
        patch_size: p; N = (side / p)^2.
        num_classes: Classes without the null label.
        end_time: Give the average velocity up to a time that is passed besides (`mean_flow`).

    Raises: ConfigError for sizes that do not divide.
    Source: SiT (arXiv 2401.08740), on DiT's adaLN-Zero blocks.
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
        end_time: bool = False,
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
        # Computed, so in no state: old checkpoints and other sides need no table.
        self.register_buffer("pos_embed", sincos_table(width, self.grid), persistent=False)
        self.t_embed = TimestepEmbedding(width)
        self.end_embed = EndTimeEmbedding(width) if end_time else None
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
        """Token counts at which blocks run when K tokens are asked for: N always, and K."""
        return {self.num_base_tokens, num_tokens}

    def flops(self, num_tokens: int) -> int:
        """Operations of one forward pass of one sample at K tokens, a multiply-add being two.

        Raises: ConfigError for a K that the network does not have.
        """
        self.check_length(num_tokens)
        width, tokens = self.pos_embed.shape[-1], self.num_base_tokens
        patch = self.patch_size**2 * self.channels
        times = 1 if self.end_embed is None else 2
        ends = ends_flops(tokens, width, self.t_embed.num_features, patch, times)
        return ends + self._transform_flops(width, num_tokens)

    def _transform_flops(self, width: int, num_tokens: int) -> int:
        """Operations of `transform` for one sample."""
        block = block_flops(self.num_base_tokens, width, 2 * _MLP_RATIO * width * width)
        return len(self.blocks) * block

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        labels: Tensor,
        num_tokens: int,
        end: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity, data - noise, or with `end_time` its average from t to `end`.

        Shapes: z_t [B, channels, side, side], t [B] in [0, 1] (1 is data), labels [B] int64
        (num_classes = null), end [B] -> [B, channels, side, side]. `num_tokens` is K, an int.
        Raises: ConfigError for a K that the network does not have.
        """
        if self.end_embed is None and end is not None:
            raise ConfigError(NO_END_TIME)
        ahead = None if self.end_embed is None else self.end_embed(t, end)
        return -self.forward_released(z_t, 1 - t, labels, num_tokens, ahead)

    def forward_released(
        self,
        x: Tensor,
        s: Tensor,
        labels: Tensor,
        num_tokens: int,
        ahead: Tensor | None = None,
    ) -> Tensor:
        """The network in the release's convention: s [B] is 0 at data; predicts noise - data.

        Shapes: x [B, channels, side, side], labels [B] int64, ahead [B, C], the embedded end time
        of a network that has one -> [B, channels, side, side].
        """
        self.check_length(num_tokens)
        # Contiguous: the residual stream of all blocks would keep the convolution's layout.
        tokens = self.x_embed(x).flatten(2).transpose(1, 2).contiguous()  # [B, N, C]
        tokens = tokens + self.pos_embed.to(tokens.dtype)
        condition = self.t_embed(s) + self.label_embed(labels)  # [B, C]
        if ahead is not None:
            condition = condition + ahead
        tokens = self.transform(tokens, condition, num_tokens)
        return self._unpatchify(self.final(tokens, condition))  # [B, N, p p channels] before

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
    """A SiT whose core runs on K latents: head on N tokens, Read, core on K, Write, tail on N.

    Every window of J tokens has J latents, and at budget k the core computes on the first k of
    each. Trained at random k, the first latents learn to carry most (as in nested dropout), and
    one network serves every budget. Depth counts head, core and tail together.

    Args:
        width, depth, num_heads, channels, side, patch_size, num_classes, end_time: Arguments of
            `SiT`.
        head_blocks: Blocks before Read.
        tail_blocks: Blocks after Write.
        group_size: g, the side of a window in tokens; divides side / p. J = g^2 latents each.
        drop_mode: What Write sees of the latents that the core did not. `skip_core`, as released:
            all, those as Read left them. `remove`: none of them.
        position_rows: Rows of the latents' position table, N or more.

    Raises: ConfigError for sizes that do not divide, or no block left for the core.
    Source: ELIT (arXiv 2603.12245).
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
        end_time: bool = False,
        *,
        head_blocks: int,
        tail_blocks: int,
        group_size: int,
        drop_mode: DropMode = "skip_core",
        position_rows: int = RELEASED_POSITION_ROWS,
    ) -> None:
        size = (width, depth, num_heads, channels, side, patch_size, num_classes)
        super().__init__(*size, end_time)
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
        """G, windows of the grid."""
        return (self.grid // self.group_size) ** 2

    @property
    def max_budget(self) -> int:
        """J, latents per window."""
        return self.group_size**2

    @property
    def token_lengths(self) -> tuple[int, ...]:
        """Every K that the network runs at, rising: k G for k = 1 .. J."""
        return tuple(k * self.num_windows for k in range(1, self.max_budget + 1))

    def check_length(self, num_tokens: int) -> None:
        """Raise ConfigError unless `num_tokens` is a budget of 1 to J latents per window."""
        self.budget(num_tokens)

    def budget(self, num_tokens: int) -> int:
        """Latents per window, k, at K tokens. Raises: ConfigError for a K that is no budget."""
        k, rest = divmod(num_tokens, self.num_windows)
        if rest or not 1 <= k <= self.max_budget:
            raise ConfigError(
                f"num_tokens: {num_tokens} is no budget of this network; it is k x "
                f"{self.num_windows} windows with k from 1 to {self.max_budget}: "
                f"{self.num_windows}, {2 * self.num_windows}, ..., {self.num_base_tokens}"
            )
        return k

    def transform(self, x: Tensor, condition: Tensor, num_tokens: int) -> Tensor:
        """Head, Read, core on K latents, Write, tail. Shapes: x [B, N, C] -> [B, N, C]."""
        k, blocks = self.budget(num_tokens), list(self.blocks)
        first, last = self.head_blocks, len(blocks) - self.tail_blocks
        for block in blocks[:first]:
            x = block(x, condition)
        latents, spatial = self.read(x, condition)  # [B, G, J, C]
        # Always the first k, the same in every window: a slice, no gather, and no mask in the core.
        kept = latents[:, :, :k].flatten(1, 2).contiguous()  # [B, K, C], one layout at every k
        for block in blocks[first:last]:
            kept = block(kept, condition)
        kept = kept.unflatten(1, (self.num_windows, k))  # [B, G, k, C]
        # As released: a latent beyond the budget skips the core, but Write sees what Read put into
        # it. So even k = 1 loses nothing of the image, only computation on it.
        if self.drop_mode == "skip_core" and k < self.max_budget:
            kept = torch.cat((kept, latents[:, :, k:]), dim=2)  # [B, G, J, C]
        x = self.write(spatial, kept)  # [B, N, C]
        for block in blocks[last:]:
            x = block(x, condition)
        return x

    def _transform_flops(self, width: int, num_tokens: int) -> int:
        """Operations of head and tail at N tokens, of the core at K, and of Read and Write."""
        mlp, outer = 2 * _MLP_RATIO * width * width, self.head_blocks + self.tail_blocks
        return (
            outer * block_flops(self.num_base_tokens, width, mlp)
            + (len(self.blocks) - outer) * block_flops(num_tokens, width, mlp)
            + self._interface_flops(width, num_tokens)
        )

    def _interface_flops(self, width: int, num_tokens: int) -> int:
        """Read and Write for one sample: attention inside windows, MLPs as wide as the network."""
        tokens, window = self.num_base_tokens, self.max_budget
        written = tokens if self.drop_mode == "skip_core" else num_tokens
        read = (
            2 * width * 7 * width  # modulation, of which a seventh is not used
            + tokens * 2 * width * (width + 2 * width + width)
            + 4 * tokens * window * width
        )
        write = (
            tokens * 2 * width * (width + width)
            + written * 2 * width * 2 * width
            + 4 * tokens * (written // self.num_windows) * width
        )
        return read + write + 2 * tokens * 2 * 2 * width * width  # and both MLPs


def _divisors(number: int) -> str:
    """The divisors of a number, for a message."""
    return ", ".join(str(g) for g in range(1, number + 1) if number % g == 0)


def build_elit(model: ELITModelConfig, space: SpaceConfig) -> SiT:
    """A generator with fresh weights: an `ELIT`, or without an interface a `SiT`.

    Raises: ConfigError for sizes that do not divide, or a split that the size does not have.
    """
    row = SIT_SIZES[model.size]
    common = (
        row.width, row.depth, row.num_heads,
        space.channels, space.side, model.patch_size, model.num_classes, model.end_time,
    )  # fmt: skip
    interface = model.interface
    if interface is None:
        return SiT(*common)
    known = SPLITS[interface.split]
    if model.size not in known:
        raise ConfigError(
            f"model.interface.split: {interface.split!r} knows no size {model.size!r}; it has "
            f"{', '.join(known)}"
        )
    head_blocks, _, tail_blocks = known[model.size]
    return ELIT(
        *common,
        head_blocks=head_blocks,
        tail_blocks=tail_blocks,
        group_size=interface.group_size,
        drop_mode=interface.drop_mode,
        position_rows=interface.position_rows,
    )
