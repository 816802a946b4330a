"""How far a reconstruction is from its original, image by image: SSIM and LPIPS.

Like PSNR (in `lgm_scale.pixels`) they see 8-bit pixels, rounded and clipped: the images that people
would see and keep.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lgm_scale.evaluation.features.extraction import fixed_batches, network_flags
from lgm_scale.frozen import load_perceptual
from lgm_scale.pixels import to_unit_range
from lgm_scale.storage.files import file_hash

SSIM_WINDOW = 7


@torch.inference_mode()
def ssim(a: Tensor, b: Tensor) -> np.ndarray:
    """Structural similarity per image, in float64: the mean over channels and whole windows.

    A uniform 7 x 7 window that never leaves the image, sample covariance (49 / 48), k1 = 0.01,
    k2 = 0.03, pixels in [0, 1]. One image at a time: its value does not depend on its batch.

    Shapes: uint8 [B, 3, S, S] x 2, S >= 7 -> float64 [B].
    Source: Wang et al. 2004; equal to scikit-image's `structural_similarity` with its defaults.
    """
    # Not scikit-image's, which gives the same to 1e-15: it computes on the host alone, one core at
    # 35 ms per pair of 256 pixels, and a GPU that decodes and extracts features would wait for it.
    values = [_ssim_map(x, y).mean() for x, y in zip(a, b, strict=True)]
    return torch.stack(values).cpu().numpy() if values else np.empty(0)


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

    Raises: CheckpointError if the file is none of these weights.
    """

    def __init__(self, path: str | Path, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.net = load_perceptual(str(path))
        self.weights_hash = file_hash(path)

    @torch.inference_mode()
    def __call__(self, a: Tensor, b: Tensor) -> np.ndarray:
        """Distance per image. Shapes: uint8 [B, 3, S, S] x 2 -> float64 [B]."""
        pairs = zip(*(fixed_batches(images.to(self.device)) for images in (a, b)), strict=True)
        with network_flags():
            found = [
                self.net(to_unit_range(x), to_unit_range(y))[:count].double()
                for (x, count), (y, _) in pairs
            ]
        return torch.cat(found).cpu().numpy() if found else np.empty(0)
