"""Networks that are used and never trained, how their files are read, and the perceptual distance.

A `Frozen` is no nn.Module: what it holds is in no parameters(), no state_dict, no checkpoint and
no bundle, is not sharded, and never leaves eval mode. Nothing is downloaded here. Files are read as
safetensors or with `torch.load(weights_only=True)`: reading one executes nothing.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from lgm_scale.errors import CheckpointError


class Frozen:
    """Calls a module in eval mode and without parameter gradients, on its input's device."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval().requires_grad_(False)
        self._device: torch.device | None = None

    def __call__(self, x: Tensor, *others: Tensor) -> Any:
        """Call the module. Gradients reach the inputs, as far as they ask for any."""
        if self._device != x.device:
            self.module.to(x.device)
            self._device = x.device
        return self.module(x, *others)


def to_imagenet(images: Tensor) -> Tensor:
    """From [-1, 1] to ImageNet's normalisation. Shapes: [B, 3, S, S] -> float32 [B, 3, S, S]."""
    mean = images.new_tensor(IMAGENET_DEFAULT_MEAN, dtype=torch.float32).view(3, 1, 1)
    std = images.new_tensor(IMAGENET_DEFAULT_STD, dtype=torch.float32).view(3, 1, 1)
    return ((images.float() + 1) / 2 - mean) / std


class LPIPS(nn.Module):
    """Perceptual distance on VGG16 with the published linear heads, which torchmetrics ships.

        sum over layers of mean over places of w . (unit(f(x)) - unit(f(y)))^2

    Shapes: two of [B, 3, S, S] in [-1, 1] -> [B] float32.
    Source: Zhang et al. 2018, version 0.1; equal to torchmetrics' own (private) module.
    """

    shift: Tensor
    scale: Tensor

    SLICES = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))
    """Layers of VGG16 up to relu1_2, relu2_2, relu3_3, relu4_3, relu5_3, read after each slice."""
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
        """Read the heads from torchmetrics' own files, without importing it: that takes seconds."""
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
        """Distances [B] of B pairs of images [B, 3, S, S]."""
        x = (torch.cat((first, second)) - self.shift) / self.scale
        total = first.new_zeros(len(first), dtype=torch.float32)
        weights = self.heads.parameters()  # [1, C, 1, 1] each
        for (start, end), weight in zip(self.SLICES, weights, strict=True):
            x = self.features[start:end](x)  # [2 B, C, h, w], both images of all pairs
            # Along the channels: what counts is which features answer, not how loudly.
            unit = x.float() / torch.sqrt(1e-8 + x.float().square().sum(1, keepdim=True))
            a, b = unit.chunk(2)
            # Not as a convolution: autocast would make it bfloat16.
            total = total + ((a - b).square() * weight[0]).sum(1).mean((1, 2))
        return total


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file, without executing anything in it. Raises: CheckpointError."""
    try:
        if str(path).endswith(".safetensors"):
            return load_file(str(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as weights: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no dictionary of weights")
    return state


def load_pretrained(vit: VisionTransformer, path: str | Path) -> None:
    """Load a DINO or DINOv2 checkpoint, named as by timm or by its authors.

    timm resamples the patch kernel and the position grid.

    Raises: CheckpointError if a weight of the network is missing in the file, or does not fit.
    """
    state = checkpoint_filter_fn(read_weights(path), vit)
    try:
        result = vit.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the network: {error}") from error
    if result.missing_keys:
        names = ", ".join(result.missing_keys[:3])
        raise CheckpointError(f"{path}: {len(result.missing_keys)} weights are missing ({names})")


def load_perceptual(path: str | None) -> Frozen:
    """LPIPS on VGG16 weights as torchvision publishes them; None for random ones.

    Raises: CheckpointError.
    """
    lpips = LPIPS()
    if path is not None:
        prefix = "features."
        state = {
            name.removeprefix(prefix): value
            for name, value in read_weights(path).items()
            if name.startswith(prefix)
        }
        try:
            lpips.features.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not fit the network: {error}") from error
    return Frozen(lpips)
