"""A tokenizer with every loss on, small enough for a test of milliseconds. All weights random."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from lgm_scale.config.schema import OptimizerConfig
from lgm_scale.families.tokenizer.assets import FrozenNets, Teacher
from lgm_scale.families.tokenizer.config import (
    TokenizerModelConfig,
    TokenizerObjectiveConfig,
    TokenizerSize,
)
from lgm_scale.families.tokenizer.critic import CriticBackbone, CriticHeads, ReduceMean, one_rank
from lgm_scale.families.tokenizer.network import Decoder, Tokenizer
from lgm_scale.families.tokenizer.training import TokenizerTrainingModel
from lgm_scale.frozen import Frozen

IMAGE_SIZE, PATCH_SIZE, NUM_TOKENS, LATENT_DIM, FEATURES = 32, 8, 16, 8, 24

OBJECTIVE = TokenizerObjectiveConfig(
    perceptual=1.0,
    perceptual_warmup=4,
    representation=1.0,
    adversarial=0.4,
    adversarial_start=2,
)
OPTIMIZER = OptimizerConfig(lr=1e-4, weight_decay=1e-2)
LENGTHS = (8, 4, 16, 12)


class SmallPerceptual(torch.nn.Module):
    """In place of LPIPS: a squared distance of random features, per image."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Conv2d(3, 8, 5, stride=2)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        a, b = self.features(first).relu(), self.features(second).relu()
        return (a - b).square().mean((1, 2, 3))


def vision_transformer(size: int, patch: int, width: int, depth: int) -> VisionTransformer:
    return VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=2, num_classes=0
    )


def small_model(
    objective: TokenizerObjectiveConfig = OBJECTIVE,
    reduce_mean: ReduceMean = one_rank,
    seed: int = 0,
) -> TokenizerTrainingModel:
    """The same weights for the same seed. The critic sees 24 pixels of the 32."""
    torch.manual_seed(seed)
    net = Tokenizer(
        TokenizerModelConfig(
            size="tiny",
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            num_base_tokens=NUM_TOKENS,
            latent_dim=LATENT_DIM,
            codebook_size=32,
        )
    )
    with torch.no_grad():
        # As after some training: reconstructions that differ, codes that are chosen.
        net.decoder.out.weight.mul_(3)
        net.quantizer.codes.normal_()
    frozen = FrozenNets(
        perceptual=Frozen(SmallPerceptual()),
        teacher=Frozen(Teacher(vision_transformer(IMAGE_SIZE, PATCH_SIZE, FEATURES, 1))),
        critic=Frozen(CriticBackbone(vision_transformer(24, 4, 16, 2), depths=(0, 1))),
    )
    auxiliary = Decoder(
        TokenizerSize(24, 1, 2, None), IMAGE_SIZE, PATCH_SIZE, NUM_TOKENS, LATENT_DIM, FEATURES
    )
    critic = CriticHeads(channels=16, num_depths=3, reduce_mean=reduce_mean)
    return TokenizerTrainingModel(net, objective, seed, frozen, auxiliary, critic, reduce_mean)


def small_batch(step: int, rank: int = 0, world_size: int = 1, size: int = 4) -> dict[str, Any]:
    """Batch of a step: smooth random images, the share of one rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    coarse = torch.rand(size, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    share = slice(rank * size // world_size, (rank + 1) * size // world_size)
    return {
        "images": (255 * images).to(torch.uint8)[share],
        "sample_ids": torch.arange(size)[share] + 100 * step,
        "step": step,
        "num_tokens": LENGTHS[step % len(LENGTHS)],
    }
