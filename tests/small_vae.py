"""A small autoencoder of Stable Diffusion's kind, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch


def save_small_vae(folder: Path, seed: int = 0, blocks: int = 4) -> Path:
    """Write one as diffusers does: 8 pixels per latent (of 4 blocks), 4 channels."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = AutoencoderKL(
            block_out_channels=(32,) * blocks,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            latent_channels=4,
            norm_num_groups=8,
        )
    net.save_pretrained(folder, safe_serialization=True)
    return folder
