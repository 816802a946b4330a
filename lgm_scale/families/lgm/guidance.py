"""Guidance on merged tokens: both branches at one length, or the weak one at fewer tokens.

Source: LGM release (per-position guidance); coarse guidance is ours. Autoguidance (Karras et al.
2024, arXiv 2406.02507) with fewer tokens as the weaker model: ELIT (arXiv 2603.12245).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lgm_scale.merging.nesting import Nesting
from lgm_scale.merging.tree import MergeAssignment
from lgm_scale.sampling.config import CFGRescale

Velocity = Callable[..., Tensor]
"""(z_t [B, K, D], t [B], labels [B], assignment) -> v [B, K, D]: a `MergeDiT` or its like.

Of an average velocity, end [B] comes last."""


def guided_velocity(
    velocity: Velocity,
    z_t: Tensor,
    t: Tensor,
    labels: Tensor,
    null_label: int,
    assignment: MergeAssignment,
    cfg_scale: float,
    cfg_rescale: CFGRescale,
) -> Tensor:
    """Both branches in one batch, and their combination on all D channels.

        NONE           v = v_u + w (v_c - v_u)
        PER_POSITION   v_j = v_c + (w - 1) / s_j (v_c - v_u)

    Why by size: under corrected noise a cluster of s tokens has noise of variance 1 / s, and is
    known much sooner along the path; full guidance would overshoot it.

    Shapes: z_t [B, K, D], t [B], labels [B] -> [B, K, D].
    Source: LGM release.
    """
    both = torch.cat((labels, torch.full_like(labels, null_label)))
    # One pass over 2 B rows: at small K two passes of B would leave a GPU half idle.
    v_cond, v_uncond = velocity(torch.cat((z_t, z_t)), torch.cat((t, t)), both, assignment).chunk(2)
    if cfg_rescale is CFGRescale.NONE:
        return v_uncond + cfg_scale * (v_cond - v_uncond)
    strength = (cfg_scale - 1) / assignment.sizes.to(v_cond.dtype)  # [K]
    return v_cond + strength[:, None] * (v_cond - v_uncond)


def coarse_guided_velocity(
    velocity: Velocity,
    z_t: Tensor,
    t: Tensor,
    labels: Tensor,
    null_label: int | None,
    nesting: Nesting,
    cfg_scale: float,
    cfg_rescale: CFGRescale,
) -> Tensor:
    """Weak branch at K' tokens; guidance in the subspace that both branches share.

    delta = M v_c(x_t) - v_u(M x_t), with M the size-weighted mean over the coarse clusters, is
    expanded to K and added to v_c as guidance would be. (Expanding v_u and subtracting it from v_c
    would push v_c's fine detail up by w - 1.) PER_POSITION divides by the *fine* cluster's size.
    The weak branch is unconditional; without a `null_label` it keeps the class (autoguidance): then
    what pushes is the difference between much and little detail, not between class and any.

    Shapes: z_t [B, K, D], t [B], labels [B] -> [B, K, D] float32. Plain guidance at K' = K.
    Source: ours. Costs K' / K of guidance's second half.
    """
    # The weak branch may run at K': the cuts are nested and noise was merged like the data, so
    # M x_t is a state of the kind that the network was trained on.
    weak = labels if null_label is None else torch.full_like(labels, null_label)
    v_cond = velocity(z_t, t, labels, nesting.fine).float()  # [B, K, D]
    v_uncond = velocity(nesting.merge(z_t), t, weak, nesting.coarse).float()  # [B, K', D]
    delta = nesting.expand(nesting.merge(v_cond) - v_uncond)  # [B, K', D] -> [B, K, D]
    if cfg_rescale is CFGRescale.NONE:
        return v_cond + (cfg_scale - 1) * delta
    return v_cond + ((cfg_scale - 1) / nesting.fine.sizes)[:, None] * delta
