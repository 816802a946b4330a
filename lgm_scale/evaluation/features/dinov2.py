"""DINOv2's class token, for FD-DINOv2.

Protocol: bicubic with antialiasing to 224 x 224 on values 0 to 255, ImageNet's mean and deviation,
the class token after the last norm. torch-fidelity's own DINOv2 resizes without antialiasing and
downloads its weights, hence this one. The weights are a file of the user's
(`dinov2_vitl14_pretrain.pth`); the network is timm's, with the position grid resampled by the rule
of DINOv2's authors.

Source: Stein et al. 2023 (FD-DINOv2); Oquab et al. 2023 (DINOv2).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor
from typing_extensions import override

from lgm_scale.errors import CheckpointError
from lgm_scale.evaluation.engine.chunks import Arrays
from lgm_scale.evaluation.features.extraction import (
    FeatureSpace,
    run_network,
)
from lgm_scale.frozen import read_weights
from lgm_scale.published import DINOV2_URL
from lgm_scale.storage.files import file_hash

__all__ = ["DINOv2Features"]

SIDE, PATCH = 224, 14
_SIZES = {384: "small", 768: "base", 1024: "large"}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OFFSET = 0.1  # of the authors' interpolation, against a rounding of theirs


def resample_positions(table: Tensor, side: int) -> Tensor:
    """The position table for a grid of side x side patches.

    Bicubic without antialiasing, with the authors' offset in the scale.

    Shapes: [1, 1 + M, C] with M a square -> [1, 1 + side^2, C].
    """
    own = math.isqrt(table.shape[1] - 1)
    if own == side:
        return table
    grid = table[:, 1:].reshape(1, own, own, -1).permute(0, 3, 1, 2).float()
    scale = (side + _OFFSET) / own
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    assert grid.shape[-2:] == (side, side)
    flat = grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)
    return torch.cat((table[:, :1].float(), flat), 1).to(table.dtype)


class DINOv2Features(FeatureSpace):
    """The class token, as a `FeatureSpace`; the network's size comes from the file.

    Args:
        path: DINOv2 weights as its authors publish them; ViT-L is what FD-DINOv2 is defined by.
        device: Where to compute; always in float32.

    Raises: CheckpointError if the file is none of these weights.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        state = read_weights(path)
        self.weights_hash = file_hash(path)
        table = state.get("pos_embed")
        if not isinstance(table, Tensor) or table.ndim != 3 or table.shape[-1] not in _SIZES:
            raise CheckpointError(
                f"{path} is no DINOv2 checkpoint: it has no pos_embed of width "
                f"{', '.join(map(str, _SIZES))}; get the file from {DINOV2_URL}"
            )
        self.size = _SIZES[table.shape[-1]]
        state = state | {"pos_embed": resample_positions(table, SIDE // PATCH)}
        vit = timm.create_model(
            f"vit_{self.size}_patch14_dinov2", pretrained=False, img_size=SIDE, num_classes=0
        )
        assert isinstance(vit, VisionTransformer)
        try:
            vit.load_state_dict(checkpoint_filter_fn(state, vit))
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{path} does not fit DINOv2 ({self.size}): {reason}") from error
        self.net = vit.eval().requires_grad_(False).to(self.device)
        self.mean, self.std = (
            torch.tensor(values, device=self.device)[:, None, None] for values in (_MEAN, _STD)
        )

    @property
    @override
    def outputs(self) -> dict[str, int]:
        return {"dinov2": self.net.embed_dim}

    @override
    def __call__(self, images: Tensor) -> Arrays:
        return run_network(self._class_token, images.to(self.device), self.outputs)

    def _class_token(self, batch: Tensor) -> tuple[Tensor]:
        pixels = F.interpolate(
            batch.float(), (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False
        )
        return (self.net.forward_features((pixels / 255 - self.mean) / self.std)[:, 0],)

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "space": "dinov2",
            "network": f"DINOv2 ViT ({self.size}), class token; bicubic with antialiasing to "
            f"{SIDE}, not rounded",
            "precision": "float32, no TF32",
            "weights_sha256": self.weights_hash,
        }
