"""Images from a generator bundle: noise, solver, decoder, pixels; and what they cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.sweep_config import SweepConfig
from lgm_scale.bundle import GeneratorBundle
from lgm_scale.errors import CheckpointError, DataError
from lgm_scale.flops import sampling_flops
from lgm_scale.objectives.flow import NoiseScale
from lgm_scale.sampling import CFGRescale, SamplerConfig, sample_latents

__all__ = [
    "decode_to_uint8",
    "flops_per_image",
    "noise_scale_of",
    "refuse_broken",
    "sample_images",
    "sampler_of",
]


def noise_scale_of(bundle: GeneratorBundle, folder: str | Path) -> NoiseScale:
    """How the generator was trained to see noise. Raises: CheckpointError if it does not say."""
    try:
        return NoiseScale(bundle.info["training"]["config"]["objective"]["noise_scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: bundle.json does not say training.config.objective.noise_scale "
            f"({type(error).__name__}: {error}), and sampling depends on it"
        ) from error


def sampler_of(config: SweepConfig) -> SamplerConfig:
    """The solver's settings."""
    return SamplerConfig(
        num_steps=config.num_steps,
        cfg_scale=config.cfg_scale,
        cfg_interval=config.cfg_interval,
        cfg_rescale=CFGRescale(config.cfg_rescale),
        timestep_shift=config.timestep_shift,
    )


@torch.inference_mode()
def sample_images(
    bundle: GeneratorBundle,
    indices: Tensor,
    num_tokens: int,
    sampler: SamplerConfig,
    scale: NoiseScale,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Sample the images with these indices; image i has class i mod num_classes.

    Shapes: indices [B] int64 -> uint8 [B, 3, S, S], and bool [B]: whether the image is finite.
    """
    net, device = bundle.net, bundle.net.pos_embed.device
    labels = (indices % net.num_classes).to(device)
    z = sample_latents(
        bundle.velocity, bundle.tree, seed, indices, labels, net.null_label,
        num_tokens, net.latent_dim, sampler, scale, bundle.stats.contrasts,
    )  # fmt: skip
    z = z * bundle.stats.std.to(device) + bundle.stats.mean.to(device)  # [B, N, D]
    return decode_to_uint8(bundle.tokenizer.decode(z))


def decode_to_uint8(pixels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Round pixels of [-1, 1] to 8 bits, clipping what lies outside.

    Shapes: [B, 3, S, S] -> uint8 [B, 3, S, S], and bool [B]: whether the image is finite.
    """
    finite = pixels.isfinite().flatten(1).all(1)
    levels = ((pixels.float().nan_to_num() + 1) / 2).clamp(0, 1).mul(255).round()
    return levels.to("cpu", torch.uint8).numpy(), finite.cpu().numpy()


def refuse_broken(finite: np.ndarray, what: str) -> None:
    """Raise DataError naming the images that are not finite."""
    broken = np.flatnonzero(~finite)
    if len(broken):
        more = f" and {len(broken) - 8} more" if len(broken) > 8 else ""
        raise DataError(
            f"{what}: images {broken[:8].tolist()}{more} of {len(finite)} are not finite (NaN or "
            "infinity); the weights are broken or the sampler's settings drive them out of range"
        )


def flops_per_image(bundle: GeneratorBundle, num_tokens: int, sampler: SamplerConfig) -> int:
    """Every network evaluation that the sampler really makes, and one decoding."""
    size = bundle.info["models"]["tokenizer"]["size"]
    return sampling_flops(bundle.net, bundle.tokenizer, size, num_tokens, sampler)
