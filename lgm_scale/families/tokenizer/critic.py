"""The critic of the adversarial loss: trained heads on the features of a frozen DINO ViT-S/16.

Why frozen features: they tell natural images apart from the first step on, and heads this small
cannot overfit before the tokenizer learns from them (Projected GAN, StyleGAN-T).

Source: SoftVQ and the LGM release. Batch norm runs over the global batch; how to average over
ranks is handed in (`reduce_mean`), so that nothing here knows of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lgm_scale.frozen import to_imagenet

ReduceMean = Callable[[Tensor], Tensor]
"""Mean of equally shaped tensors over ranks, with a gradient."""


def one_rank(x: Tensor) -> Tensor:
    """The `ReduceMean` of a single process."""
    return x


class GlobalBatchNorm(nn.Module):
    """Batch norm by the moments of the whole batch, on all ranks.

    torch's SyncBatchNorm needs a GPU. There are no running moments: a critic is never evaluated.

    Shapes: [B, C, L] -> [B, C, L], in the input's dtype.
    """

    def __init__(self, channels: int, reduce_mean: ReduceMean = one_rank, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.reduce_mean = reduce_mean
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, L], in float32."""
        wide = x.float()
        # Two averages over ranks, one after the other: the square of the centred values loses no
        # digits, as the difference of two mean squares would.
        centred = wide - self.reduce_mean(wide.mean((0, 2)))[:, None]
        variance = self.reduce_mean(centred.square().mean((0, 2)))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None] + self.bias[:, None]).to(x.dtype)


def _convolution(channels: int, out_channels: int, kernel_size: int) -> nn.Module:
    """1-D over the patches in raster order; spectral norm bounds how steep the critic can get."""
    return spectral_norm(
        nn.Conv1d(
            channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            padding_mode="circular" if kernel_size > 1 else "zeros",
        )
    )


def _block(channels: int, kernel_size: int, reduce_mean: ReduceMean) -> nn.Module:
    """Convolution, norm, LeakyReLU. Shapes: [B, C, L] -> [B, C, L]."""
    return nn.Sequential(
        _convolution(channels, channels, kernel_size),
        GlobalBatchNorm(channels, reduce_mean),
        nn.LeakyReLU(0.2),
    )


class CriticHead(nn.Module):
    """One logit per token of one depth. Shapes: features [B, C, L] -> [B, L]."""

    def __init__(self, channels: int, reduce_mean: ReduceMean, kernel_size: int = 9) -> None:
        super().__init__()
        self.point = _block(channels, 1, reduce_mean)
        self.context = _block(channels, kernel_size, reduce_mean)
        self.out = _convolution(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Judge features [B, C, L] of one depth."""
        x = self.point(features)
        x = (self.context(x) + x) / math.sqrt(2)  # a sum of two has twice the variance of one
        return self.out(x).squeeze(1)  # [B, 1, L] -> [B, L]


class CriticHeads(nn.Module):
    """The trained part of the critic, one head per depth.

    Args:
        channels: C, width of the backbone.
        num_depths: Feature maps per image.

    Shapes: num_depths times [B, C, L] -> logits [B, num_depths * L].
    """

    full_precision = True

    def __init__(
        self, channels: int = 384, num_depths: int = 5, reduce_mean: ReduceMean = one_rank
    ) -> None:
        super().__init__()
        self.channels = channels
        self.heads = nn.ModuleList(CriticHead(channels, reduce_mean) for _ in range(num_depths))

    def idle_features(self, device: torch.device) -> list[Tensor]:
        """The smallest input there is, for a pass of which only the zero gradient matters."""
        return [torch.zeros(1, self.channels, 9, device=device) for _ in self.heads]

    def forward(self, features: list[Tensor]) -> Tensor:
        """Judge at every depth, in float32: spectral norm does not run under autocast.

        Shapes: num_depths times [B, C, L] -> [B, num_depths * L].
        """
        with torch.autocast(features[0].device.type, enabled=False):
            return torch.cat(
                [head(map_.float()) for head, map_ in zip(self.heads, features, strict=True)], dim=1
            )


def critic_view(images: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """Bring images to the critic's size, the whole batch alike.

    Larger ones are cropped at random with probability one half, else shrunk by area; smaller
    ones are enlarged (bicubic).

    Shapes: [B, 3, S, S] -> [B, 3, size, size], float32. `rng` must be equal on all ranks.
    """
    images = images.float()
    given = images.shape[-1]
    if given == size:
        return images
    if given < size:
        return F.interpolate(images, (size, size), mode="bicubic")
    if rng.random() < 0.5:
        top, left = rng.integers(0, given - size + 1, size=2).tolist()
        return images[..., top : top + size, left : left + size]
    return F.interpolate(images, (size, size), mode="area")


class CriticBackbone(nn.Module):
    """Features at several depths, each patch token plus the class token.

    Read before block 0 and after the blocks of `depths`, without the final norm: early depths judge
    texture, late ones what is seen.

    Shapes: images [B, 3, S, S] in [-1, 1], S the transformer's own size -> len(depths) + 1
    times [B, C, L].
    Source: the DINO critic of SoftVQ and the LGM release (after StyleGAN-T).
    """

    def __init__(self, vit: VisionTransformer, depths: tuple[int, ...] = (2, 5, 8, 11)) -> None:
        super().__init__()
        self.vit = vit
        self.depths = depths

    @property
    def image_size(self) -> int:
        """Pixels per side that it reads."""
        size = self.vit.patch_embed.img_size
        assert size is not None
        return size[0]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images [B, 3, S, S], from shallow to deep."""
        vit = self.vit
        assert vit.cls_token is not None
        assert vit.pos_embed is not None
        x = vit.patch_embed(to_imagenet(images))
        x = torch.cat((vit.cls_token.expand(len(x), -1, -1), x), dim=1) + vit.pos_embed
        features = [_with_class(x)]
        for index, block in enumerate(vit.blocks):
            x = block(x)
            if index in self.depths:
                features.append(_with_class(x))
        return features


def _with_class(x: Tensor) -> Tensor:
    """Tokens [B, 1 + L, C] -> [B, C, L], the class token added to every patch, float32."""
    return (x[:, 1:].float() + x[:, :1].float()).transpose(1, 2)
