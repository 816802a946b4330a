"""Between what networks see, pixels in [-1, 1], and the 8-bit images that people keep.

The only place where pixels are rounded: pipeline, evaluation and the choice of K agree on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIXEL_STD = 0.5
"""What a generator of pixels divides pixels in [-1, 1] by: about the deviation of photographs."""


def to_unit_range(images: Tensor) -> Tensor:
    """Map uint8 pixels to [-1, 1]. Shapes: uint8 of any shape -> float32 of that shape."""
    return images.float() / 127.5 - 1.0


def to_uint8(pixels: Tensor, truncate: bool = False) -> Tensor:
    """Eight bits per value: (x + 1) / 2, clipped to [0, 1], times 255, rounded (half to even).

    Any shape will do. NaN becomes mid-grey; `finite_images` tells whether there was any. `truncate`
    cuts the fraction off instead, as some published samples were stored: half a level darker on
    average.

    Shapes: floats of any shape -> uint8 of that shape, on the same device.
    """
    # In float32: bfloat16 has 8 bits of precision, too few to choose among 256 levels.
    levels = ((pixels.float().nan_to_num() + 1) / 2).clamp(0, 1).mul(255)
    return (levels.trunc() if truncate else levels.round()).to(torch.uint8)


def finite_images(pixels: Tensor) -> Tensor:
    """Whether each image has neither NaN nor infinity. Shapes: [B, ...] -> bool [B]."""
    return pixels.isfinite().flatten(1).all(1)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per pair of 8-bit images, in dB and in float64.

    Two equal images have none; they count as if a single value were one level off.

    Shapes: two of uint8 [B, ...] -> float64 [B].
    """
    difference = images.flatten(1).double() - others.flatten(1).double()
    error = difference.square().mean(1)
    # At least one level in one value: an error of zero would be an infinite PSNR.
    return 10 * torch.log10(255.0**2 / error.clamp_min(1 / max(1, difference.shape[1])))
