"""Networks that are used and never trained: the perceptual net, the teacher, the critic's eyes.

A `Frozen` is no nn.Module: what it holds is in no parameters(), no state_dict, no checkpoint and
no bundle, is not sharded, and never leaves eval mode. Their files are in `models.assets`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

__all__ = ["LPIPS", "CriticBackbone", "Frozen", "FrozenNets", "Teacher", "to_imagenet"]


class Frozen:
    """Calls a module in eval mode and without parameter gradients, on its input's device."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval().requires_grad_(False)
        self._device: torch.device | None = None

    def __call__(self, x: Tensor, *others: Tensor) -> Any:
        """Gradients reach the inputs, as far as they ask for any."""
        if self._device != x.device:
            self.module.to(x.device)
            self._device = x.device
        return self.module(x, *others)


@dataclass(frozen=True)
class FrozenNets:
    """What the losses look through; None where a loss is off."""

    perceptual: Frozen | None = None
    teacher: Frozen | None = None
    critic: Frozen | None = None
    random_assets: tuple[str, ...] = ()
    """Config keys of the assets that were missing and got random weights."""


def to_imagenet(images: Tensor) -> Tensor:
    """From [-1, 1] to ImageNet's normalisation, float32. Shapes: [B, 3, S, S] -> the same."""
    mean = images.new_tensor(IMAGENET_DEFAULT_MEAN, dtype=torch.float32).view(3, 1, 1)
    std = images.new_tensor(IMAGENET_DEFAULT_STD, dtype=torch.float32).view(3, 1, 1)
    return ((images.float() + 1) / 2 - mean) / std


class LPIPS(nn.Module):
    """Perceptual distance on VGG16 with the published linear heads, which torchmetrics ships.

    Shapes: images in [-1, 1], [B, 3, S, S], twice -> [B].
    Source: Zhang et al. 2018, version 0.1; equal to torchmetrics' own (private) module.
    """

    shift: Tensor
    scale: Tensor

    SLICES = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))
    """Layers of VGG16 up to relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
    CHANNELS = (64, 128, 256, 512, 512)

    def __init__(self) -> None:
        super().__init__()
        self.features = make_layers(cfgs["D"], batch_norm=False)[:30]
        self.heads = nn.ModuleList(
            nn.Conv2d(channels, 1, 1, bias=False) for channels in self.CHANNELS
        )
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self._load_heads()

    def _load_heads(self) -> None:
        if self.shift.is_meta:  # only counted
            return
        spec = find_spec("torchmetrics")
        assert spec is not None, "Composer depends on torchmetrics"
        assert spec.origin is not None
        path = Path(spec.origin).parent / "functional/image/lpips_models/vgg.pth"
        state = torch.load(path, map_location="cpu", weights_only=True)
        for index, head in enumerate(self.heads):
            head.load_state_dict({"weight": state[f"lin{index}.model.1.weight"]})

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distance of each pair."""
        x = (torch.cat((first, second)) - self.shift) / self.scale
        total = first.new_zeros(len(first), dtype=torch.float32)
        weights = self.heads.parameters()  # [1, C, 1, 1] each
        for (start, end), weight in zip(self.SLICES, weights, strict=True):
            x = self.features[start:end](x)
            unit = x.float() / torch.sqrt(1e-8 + x.float().square().sum(1, keepdim=True))
            a, b = unit.chunk(2)
            # Not as a convolution: autocast would make it bfloat16.
            total = total + ((a - b).square() * weight[0]).sum(1).mean((1, 2))
        return total


class Teacher(nn.Module):
    """Per-patch features of a vision transformer, after its last norm, prefix tokens dropped.

    Shapes: images [B, 3, S, S] in [-1, 1] -> [B, P, F].
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        """Look."""
        return self.vit.forward_features(to_imagenet(images))[:, self.vit.num_prefix_tokens :]


class CriticBackbone(nn.Module):
    """Features at several depths, each patch token plus the class token.

    Read before block 0 and after the blocks of `depths`, without the final norm.

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
        """Look."""
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
