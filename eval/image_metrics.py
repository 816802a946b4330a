"""How far a reconstruction is from its original, image by image: PSNR, SSIM, LPIPS.

All three see 8-bit pixels, rounded and clipped: the images that people would see and keep.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lgm_scale.bundle import file_hash
from lgm_scale.models.assets import load_perceptual
from lgm_scale.training.tokenizer import to_unit_range

__all__ = ["SSIM_WINDOW", "PerceptualDistance", "psnr", "ssim"]

SSIM_WINDOW = 7


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio per image, in dB, of rounded pixels and in float64.

    Two equal images have none; they count as if a single value were one level off.

    Shapes: uint8 [B, 3, S, S] x 2 -> float64 [B].
    """
    difference = a.astype(np.float64) - b.astype(np.float64)
    error = np.square(difference).reshape(len(a), -1).mean(axis=1)
    return 10 * np.log10(255.0**2 / error.clip(min=len(a) / max(1, a.size)))


@torch.inference_mode()
def ssim(a: np.ndarray, b: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """Structural similarity per image, in float64: the mean over channels and whole windows.

    A uniform 7 x 7 window that never leaves the image, sample covariance (49 / 48), k1 = 0.01,
    k2 = 0.03, pixels in [0, 1]. One image at a time: its value does not depend on its batch.

    Shapes: uint8 [B, 3, S, S] x 2, S >= 7 -> float64 [B].
    Source: Wang et al. 2004; equal to scikit-image's `structural_similarity` with its defaults.
    """
    pairs = zip(torch.from_numpy(a).to(device), torch.from_numpy(b).to(device), strict=True)
    return np.array([float(_ssim_map(x, y).mean()) for x, y in pairs], dtype=np.float64)


def _ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """One pair of images: uint8 [C, S, S] x 2 -> float64 [C, S - 6, S - 6]."""
    x, y = a.double() / 255, b.double() / 255
    moments = torch.stack((x, y, x * x, y * y, x * y))  # [5, C, S, S]
    rows = F.avg_pool2d(moments, (1, SSIM_WINDOW), stride=1)
    mean_x, mean_y, xx, yy, xy = F.avg_pool2d(rows, (SSIM_WINDOW, 1), stride=1)
    count = SSIM_WINDOW**2
    to_sample = count / (count - 1)
    variance_x = to_sample * (xx - mean_x * mean_x)
    variance_y = to_sample * (yy - mean_y * mean_y)
    covariance = to_sample * (xy - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return above / below


class PerceptualDistance:
    """LPIPS with VGG16, of rounded pixels.

    The release takes the decoder's raw output instead, neither rounded nor clipped.

    Args:
        path: VGG16 weights, as torchvision publishes them.
        device: Where to compute.

    Raises: CheckpointError if the file is none of these weights.
    """

    def __init__(self, path: str | Path, device: torch.device | str) -> None:
        self.net, self.device = load_perceptual(str(path)), device
        self.weights_hash = file_hash(path)

    @torch.inference_mode()
    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Distance per image. Shapes: uint8 [B, 3, S, S] x 2 -> float64 [B]."""
        pair = [to_unit_range(torch.from_numpy(images).to(self.device)) for images in (a, b)]
        return self.net(*pair).double().cpu().numpy()
