"""A small autoencoder of Stable Diffusion's kind, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch


def save_small_vae(folder: Path, seed: int = 0) -> Path:
    """Write one as diffusers does: 8 pixels per latent, 4 channels, 0.6 million weights."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=8,
        )
    net.save_pretrained(folder, safe_serialization=True)
    return folder
