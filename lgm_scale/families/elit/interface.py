"""The latent interface of ELIT: read windows of spatial tokens into latents, and write them back.

The h x w spatial tokens are cut into G square windows of g x g = J tokens. Every window has J
latents, which share J learned queries with the other windows; latent j lies at the window's cell j.
At budget k the transformer's core sees the first k latents of every window, K = k G in all.

Source: ELIT (arXiv 2603.12245), Read and Write as the authors' release computes them: Read is
modulated by t and label, Write is not and has no norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgm_scale.layers import MLP, zero

LAYER_NORM_EPS = 1e-6
QK_NORM_EPS = 1e-5
_CHUNKS = 7
"""Modulations that Read computes; the seventh is never used, but is in the release's weights."""


def to_windows(x: Tensor, grid: int, group_size: int) -> Tensor:
    """Cut a square grid of tokens into windows. Shapes: [B, h h, C] -> [B, G, J, C]."""
    batch, _, width = x.shape
    across = grid // group_size
    # [B, row of windows, row inside, column of windows, column inside, C], then the middle swapped
    x = x.view(batch, across, group_size, across, group_size, width).transpose(2, 3)
    return x.reshape(batch, across**2, group_size**2, width)


def from_windows(x: Tensor, grid: int, group_size: int) -> Tensor:
    """The inverse of `to_windows`. Shapes: [B, G, J, C] -> [B, h h, C]."""
    batch, _, _, width = x.shape
    across = grid // group_size
    x = x.view(batch, across, across, group_size, group_size, width).transpose(2, 3)
    return x.reshape(batch, grid**2, width)


class WideRMSNorm(nn.Module):
    """x / (rms + eps), over all heads at once, with a learned gain: [..., C] -> [..., C]."""

    # Not torch's RMSNorm, which takes the root of rms^2 + eps: released weights expect this one.

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, in float32."""
        wide = x.float()
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return (wide / (rms + QK_NORM_EPS) * self.weight).to(x.dtype)


class CrossAttention(nn.Module):
    """Attention inside each window: x [B, G, Q, C], context [B, G, J, C] -> [B, G, Q, C]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm = WideRMSNorm(width)
        self.k_norm = WideRMSNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Let the Q tokens of each window look at its J others."""
        k, v = self.kv(context).chunk(2, dim=-1)
        q, k = self.q_norm(self.q(x)), self.k_norm(k)
        out = F.scaled_dot_product_attention(self._heads(q), self._heads(k), self._heads(v))
        return self.proj(out.transpose(1, 2).reshape(x.shape))  # heads side by side again

    def _heads(self, x: Tensor) -> Tensor:
        """[B, G, J, C] -> [B G, H, J, C / H]: a window is a row of its own, so N J and not N^2."""
        return x.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Read(nn.Module):
    """Latents that have looked at their window, and the spatial tokens that Write goes on with.

        z = queries + gate_1 attn(queries, norm(x) (1 + scale_1) + shift_1)
        z = z + gate_2 mlp(norm(z) (1 + scale_2) + shift_2) + positions

    Args:
        width: C.
        num_heads: H.
        grid: h; there are h h spatial tokens.
        group_size: g.
        position_rows: Rows of the latents' position table, N or more; the first N are used.
    """

    def __init__(
        self, width: int, num_heads: int, grid: int, group_size: int, position_rows: int
    ) -> None:
        super().__init__()
        self.grid, self.group_size = grid, group_size
        self.queries = nn.Parameter(torch.empty(group_size**2, width))
        self.offset = nn.Parameter(torch.empty(group_size**2, width))
        self.positions = nn.Parameter(torch.empty(position_rows, width))
        self.attn = CrossAttention(width, num_heads)
        self.mlp = MLP(width, width, bias=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, _CHUNKS * width))
        self.initialize()

    def initialize(self) -> None:
        """Tables with std .02; gates at zero, so that latents start as queries and positions."""
        for table in (self.queries, self.offset, self.positions):
            nn.init.normal_(table, std=0.02)
        zero(self.modulation[-1])

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Read the spatial tokens into latents.

        Shapes: x [B, N, C], condition [B, C] -> latents and spatial tokens, both [B, G, J, C].
        """
        chunks = self.modulation(condition)[:, None, None, :].chunk(_CHUNKS, dim=-1)  # [B, 1, 1, C]
        shift_x, scale_x, gate_attn, shift_z, scale_z, gate_mlp, _ = chunks
        spatial = to_windows(x, self.grid, self.group_size) + self.offset
        # One query per cell, the same in all windows: what tells windows apart comes from `seen`.
        latents = self.queries.to(spatial.dtype).expand_as(spatial)
        seen = _norm(spatial) * (1 + scale_x) + shift_x
        latents = latents + gate_attn * self.attn(latents, seen)
        latents = latents + gate_mlp * self.mlp(_norm(latents) * (1 + scale_z) + shift_z)
        # Positions come last: the core mixes all windows, and must know where each latent is from.
        rows = self.positions[None, : self.grid**2]  # [1, N, C]
        return latents + to_windows(rows, self.grid, self.group_size), spatial


class Write(nn.Module):
    """Spatial tokens that have looked at their window's latents: x + attn(x, z), then x + mlp(x).

    Args:
        width: C.
        num_heads: H.
        grid: h.
        group_size: g.
    """

    def __init__(self, width: int, num_heads: int, grid: int, group_size: int) -> None:
        super().__init__()
        self.grid, self.group_size = grid, group_size
        self.offset = nn.Parameter(torch.empty(group_size**2, width))
        self.attn = CrossAttention(width, num_heads)
        self.mlp = MLP(width, width, bias=False)
        self.initialize()

    def initialize(self) -> None:
        """Table with std .02; outputs at zero, so that only the offset is written at first."""
        nn.init.normal_(self.offset, std=0.02)
        zero(self.attn.proj)
        zero(self.mlp.fc2)

    def forward(self, spatial: Tensor, latents: Tensor) -> Tensor:
        """Write the latents into the spatial tokens.

        Shapes: spatial [B, G, J, C], latents [B, G, k, C], k <= J -> [B, N, C].
        """
        # The spatial tokens are the residual stream from head to tail; latents only add to them.
        spatial = spatial + self.offset
        spatial = spatial + self.attn(spatial, latents)
        spatial = spatial + self.mlp(spatial)
        return from_windows(spatial, self.grid, self.group_size)


def _norm(x: Tensor) -> Tensor:
    """LayerNorm over channels, without parameters: [..., C] -> [..., C]."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
