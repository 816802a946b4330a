"""Part of a scaled image as a tensor: Pillow's bicubic filter to the bit, faster.

Pillow scales in 8-bit integers: each value is a sum of few neighbours times weights of 22 bits
after the point, rounded; first along rows, then along columns. Here the weights are cut into halves
of 11 bits, so that sums in float32 are exact, and only what the part needs is computed, by the
vector instructions of `embedding_bag`: one channel at a time, which a core's own cache holds. The
halves and this use of that function are ours.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import embedding_bag

_BITS = 22  # of Pillow's weights
_UNIT = 2.0 ** -(_BITS // 2)


def scaled_part(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]
) -> Tensor:
    """Give the pixels of `image.resize(size, BICUBIC).crop(box)`, to the bit.

    Args:
        image: An RGB image, at most eight times as wide and high as `size`.
        size: Width and height after scaling.
        box: Left, top, right and bottom of the part, inside of `size`.

    Returns: uint8 [3, bottom - top, right - left], contiguous.
    """
    if image.size == size:
        whole = box == (0, 0, *size)
        lines = _lines(image if whole else image.crop(box))
        return torch.from_numpy(lines.transpose(1, 0, 2).copy())
    left, top, right, bottom = box
    x0, x1, *across = _window(image.width, size[0], left, right)
    y0, y1, *down = _window(image.height, size[1], top, bottom)
    lines = _lines(image.crop((x0, y0, x1, y1)).transpose(Image.Transpose.TRANSPOSE))
    pixels = np.empty((3, bottom - top, right - left), np.uint8)
    for channel in range(3):
        columns = _filtered(lines[:, channel], *across)
        pixels[channel] = _filtered(columns.T, *down)
    return torch.from_numpy(pixels)


def _lines(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels line by line, the channels of a line one after the other, read-only: [H, 3, W]."""
    data = image.tobytes("raw", "RGB;L")
    return np.frombuffer(data, np.uint8).reshape(image.height, 3, image.width)


def _filtered(
    values: NDArray[np.uint8], taps: Tensor, high: Tensor, low: Tensor
) -> NDArray[np.uint8]:
    """Weighted sums of rows, rounded. Shapes: [N, M] and thrice [S, taps] -> [S, M]."""
    rows = torch.from_numpy(values.astype(np.float32, order="C"))
    sums = embedding_bag(taps, rows, mode="sum", per_sample_weights=high)
    rest = embedding_bag(taps, rows, mode="sum", per_sample_weights=low)
    # Rounding the small part down to a multiple of the unit leaves a sum that float32 holds, and
    # does not change the rounding of the whole, as one half is such a multiple.
    sums.add_(rest.floor_(), alpha=_UNIT).add_(0.5).clamp_(0, 255)
    return sums.numpy().astype(np.uint8)


def _window(
    size: int, scaled: int, start: int, stop: int
) -> tuple[int, int, Tensor, Tensor, Tensor]:
    """What positions `start` to `stop` of a scaled axis need.

    Returns: First position of the axis that is needed and the one after the last; the positions,
        from that first one on, and the weights' two halves, [stop - start, taps] each.
    """
    taps, high, low = _weights(size, scaled)
    first, last = int(taps[start, 0]), int(taps[stop - 1, -1])
    return first, last + 1, taps[start:stop] - first, high[start:stop], low[start:stop]


@lru_cache(256)
def _weights(size: int, scaled: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pillow's weights for scaling an axis.

    Returns: [scaled, taps] each: int64 positions; float32 multiples of 2^-11; and, in units of
        2^-11, what the weights are beyond that.
    """
    scale = size / scaled
    stretch = max(scale, 1.0)
    centers = (np.arange(scaled)[:, None] + 0.5) * scale
    first = np.maximum((centers - 2 * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((centers + 2 * stretch + 0.5).astype(np.int64), size)
    taps = first + np.arange((end - first).max())
    x = np.abs((taps - centers + 0.5) * (1.0 / stretch))
    near = ((-0.5 + 2) * x - (-0.5 + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0)) * (taps < end)
    # Added one after the other, as Pillow does: the order decides about the last bit.
    weights /= np.cumsum(weights, 1)[:, -1:]
    whole = np.trunc(weights * 2.0**_BITS + np.copysign(0.5, weights)) * _UNIT
    high = np.rint(whole)
    return (
        torch.from_numpy(np.minimum(taps, end - 1)),
        torch.from_numpy(high * _UNIT).float(),
        torch.from_numpy(whole - high).float(),
    )
