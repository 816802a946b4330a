"""The generators' objective: rectified flow, on merged tokens or on a grid.

The only place where t and v are defined:
    t = 0 is noise, t = 1 is data;  z_t = t z + (1 - t) noise;  v = z - noise.

Source: LGM paper (flow matching); noise-scale correction and size weights from the release.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from lgm_scale.merging.tree import MergeAssignment
from lgm_scale.randomness import Purpose, keyed_normal, stream_keys


class NoiseScale(str, Enum):
    """How noise reaches merged tokens.

    CORRECTED: one full-length noise, merged like the data (variance 1 / size), and the loss of a
    token weighted by its size. LEGACY: unit noise per merged token and no weights, as in the
    paper's published numbers.
    """

    CORRECTED = "corrected"
    LEGACY = "legacy"


def interpolate(z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t on the straight path. Shapes: z and noise [B, ...], t [B] in [0, 1] -> [B, ...]."""
    t = t.view(-1, *[1] * (z.ndim - 1))
    return t * z + (1 - t) * noise


def velocity_target(z: Tensor, noise: Tensor) -> Tensor:
    """The velocity dz_t/dt, constant along the path. Shapes: z, noise [B, ...] -> [B, ...]."""
    return z - noise


def sample_timesteps(keys: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Logit-normal timesteps: sigmoid(normal(mean, std)). Shapes: keys [B] -> [B] in (0, 1)."""
    # The middle is drawn most: at the ends one term of the velocity is seen, the other is best
    # guessed by its mean.
    normal = keyed_normal(keys, (1,))[:, 0].double()  # float32 sigmoid depends on the batch size
    return torch.sigmoid(normal * std + mean).float()


def merged_noise(keys: Tensor, assignment: MergeAssignment, dim: int, scale: NoiseScale) -> Tensor:
    """Noise at K tokens, one stream per sample.

    Shapes: keys [B] -> [B, K, dim] float32. CORRECTED draws all N tokens and merges them, so the
    noises of one sample at two lengths are views of one process, and the noisy state at K' < K is
    the merge of that at K. LEGACY noise is too strong for that by sqrt(size) in every cluster.
    """
    if scale == NoiseScale.LEGACY:
        return keyed_normal(keys, (assignment.num_tokens, dim))
    return assignment.project_noise(keyed_normal(keys, (assignment.num_base_tokens, dim)))


def flow_loss(
    v_pred: Tensor, v_target: Tensor, assignment: MergeAssignment, scale: NoiseScale
) -> Tensor:
    """Squared error per sample, token j weighted by sizes_j * K / N under CORRECTED.

    A merged token has noise of variance 1 / size and so an error that is smaller by about as much;
    the weight makes it count as the tokens that it stands for.

    Shapes: v_pred, v_target [B, K, D] -> [B] float32. The weights' mean is 1. The value grows
    with K by construction: compare a length only with itself.
    """
    per_token = (v_pred.float() - v_target.float()).square().mean(-1)  # [B, K]
    if scale == NoiseScale.CORRECTED:
        weight = assignment.sizes * (assignment.num_tokens / assignment.num_base_tokens)
        per_token = per_token * weight.to(per_token.dtype)
    return per_token.mean(-1)


def unweighted_flow_loss(v_pred: Tensor, v_target: Tensor) -> Tensor:
    """Mean squared error per sample, float32. Shapes: two of [B, C, S, S] -> [B]."""
    return (v_pred.float() - v_target.float()).square().flatten(1).mean(-1)


def training_keys(
    seed: int, step: int, sample_ids: Tensor, *others: Purpose
) -> dict[Purpose, Tensor]:
    """Stream keys of one training step: what a sample draws depends on (seed, step, sample id).

    Keys of noise, timestep and label dropout [B], and of `others`.
    """
    purposes = (Purpose.NOISE, Purpose.TIMESTEP, Purpose.LABEL_DROPOUT, *others)
    return {purpose: stream_keys(seed, purpose, step, sample_ids) for purpose in purposes}
