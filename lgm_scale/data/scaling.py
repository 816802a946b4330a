"""The random crop on the device that trains: a worker draws and cuts, the device scales and flips.

The bits are Pillow's. It scales 8-bit images in integers: a value is a sum of few neighbours times
weights with 22 bits after the point, rounded and clipped, along lines first and then along columns.
Such sums are the same on any device and in any order; the weights are made in float64 by Pillow's
steps, in their order. That a batch is scaled at once, where it trains, is ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lgm_scale.data.decoding import Crop, draw_crop, random_resized_crop
from lgm_scale.errors import ConfigError, DataError

_BITS = 22
_REACH = 2.0  # of the bicubic filter, in pixels of the smaller image


def largest_window(size: int) -> int:
    """Side of the part of an image of which S x S pixels are made, at most.

    After halving, the smaller side is less than twice as long as it becomes, and the other one,
    rounded to a whole number, less than 2 + 1 / S times: (S + 3) (2 + 1 / S) + 1 pixels.
    """
    return 2 * size + 11


def cut_window(crop: Crop, flip: bool, size: int, side: int, name: str) -> dict[str, Any]:
    """What a worker hands on in place of a crop: the pixels that it is made of, and its place.

    Args:
        crop: Of an RGB image.
        flip: Whether it is to be mirrored.
        size: Side S of the crop.
        side: Side of what is handed on, at least that of the pixels needed.
        name: What messages call the image.

    Returns: images uint8 [side, side, 3], read-only perhaps; crops int64 [9]: of columns and then
        rows, first pixel handed on, and length before and after scaling, and place of the crop;
        whether it is flipped.
    Raises: DataError if more pixels are needed.
    """
    image, scaled, corner = crop
    starts = [0, 0]
    if image.size == (side, side):
        pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(side, side, 3)
    else:
        ends = list(image.size)
        for axis, (old, new, at) in enumerate(zip(image.size, scaled, corner, strict=True)):
            scale = old / new
            reach = _REACH * max(scale, 1.0)
            starts[axis] = max(int((at + 0.5) * scale - reach + 0.5), 0)
            ends[axis] = min(int((at + size - 0.5) * scale + reach + 0.5), old)
        width, height = ends[0] - starts[0], ends[1] - starts[1]
        if max(width, height) > side:
            raise DataError(
                f"{name} is {image.width} x {image.height} pixels, and the manifest says that all "
                f"images are {side} x {side}: the folder is damaged. Make it anew"
            )
        window = image.crop((starts[0], starts[1], ends[0], ends[1]))
        pixels = np.zeros((side, side, 3), np.uint8)
        pixels[:height, :width] = np.asarray(window)
    axes = zip(starts, image.size, scaled, corner, strict=True)
    place = [value for axis in axes for value in axis]
    return {"images": pixels, "crops": np.array([*place, flip], np.int64)}


class DeviceCrop:
    """Finish batches of `cut_window` on the device where they are, without waiting for it.

    Args:
        size: Side S of the images given.
        side: Side of what workers hand on: that of all images, or `largest_window`.
    """

    def __init__(self, size: int, side: int) -> None:
        self.size = size
        # No side becomes more than side / size times smaller.
        self.num_taps = int(2 * _REACH * max(side / size, 1.0)) + 1

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Scale, cut and flip.

        Shapes: images uint8 [B, H, W, 3], crops int64 [B, 9] -> images uint8 [B, 3, S, S]; what
        else is in the batch stays.
        """
        batch = dict(batch)
        pixels, crops = batch["images"], batch.pop("crops")
        place = torch.arange(self.size, device=pixels.device)
        columns = torch.where(crops[:, 8:] > 0, self.size - 1 - place, place)
        for dim, kept, axis in ((2, columns, crops[:, :4]), (1, place, crops[:, 4:8])):
            start, old, new, corner = axis.unsqueeze(1).unbind(2)
            first, weights = bicubic_taps(corner + kept, old, new, self.num_taps)
            pixels = _scaled(pixels, dim, first - start, weights)
        batch["images"] = pixels.permute(0, 3, 1, 2).contiguous()
        return batch


def bicubic_taps(place: Tensor, old: Tensor, new: Tensor, num_taps: int) -> tuple[Tensor, Tensor]:
    """Of what Pillow makes a pixel, where `old` pixels are scaled to `new`.

    Shapes: three of int64 [B, S] (or such that become it) -> the first neighbour int64 [B, S], and
    int32 weights [B, S, num_taps] of it and those that follow, times 2^22.
    """
    scale = old.double() / new.double()
    stretch = scale.clamp_min(1.0)
    centre, reach = (place + 0.5) * scale, _REACH * stretch
    first = (centre - reach + 0.5).long().clamp_min(0)
    end = torch.minimum((centre + reach + 0.5).long(), old)
    index = first.unsqueeze(2) + torch.arange(num_taps, device=place.device)
    x = ((index - centre.unsqueeze(2) + 0.5) * (1.0 / stretch).unsqueeze(2)).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    values = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    values = torch.where(index < end.unsqueeze(2), values, 0.0)
    total = torch.zeros_like(centre)
    for tap in range(num_taps):  # in Pillow's order
        total = total + values[..., tap]
    values = values / total.unsqueeze(2) * (1 << _BITS)
    return first, (values + torch.where(values < 0, -0.5, 0.5)).int()


def _scaled(pixels: Tensor, dim: int, first: Tensor, weights: Tensor) -> Tensor:
    """One pass. Shapes: uint8 [B, H, W, 3], [B, S], [B, S, taps] -> uint8, S long in `dim`."""
    shape, size = [len(first), 1, 1, 1], list(pixels.shape)
    shape[dim] = size[dim] = first.shape[1]
    total = torch.full(size, 1 << _BITS - 1, dtype=torch.int32, device=pixels.device)
    for tap in range(weights.shape[2]):  # those beyond the pixels have no weight
        index = (first + tap).clamp_max(pixels.shape[dim] - 1).view(shape).expand(size)
        total += pixels.gather(dim, index) * weights[..., tap].view(shape)
    return (total >> _BITS).clamp_(0, 255).to(torch.uint8)


def check_pillow() -> None:
    """See that the Pillow that is installed has the same bits. Raises: ConfigError."""
    size, rng = 16, np.random.default_rng(0)
    side = largest_window(size)
    for shape in ((24, 20, 3), (47, 31, 3)):
        image = Image.fromarray(rng.choice([0, 85, 255], shape).astype(np.uint8))
        crop = draw_crop(image, size, np.random.default_rng(1))
        window = cut_window(crop, False, size, side, "noise")
        batch = {name: torch.from_numpy(value)[None] for name, value in window.items()}
        made = DeviceCrop(size, side)(batch)["images"][0].permute(1, 2, 0)
        expected = random_resized_crop(image, size, np.random.default_rng(1))
        if not np.array_equal(made, np.asarray(expected)):
            raise ConfigError(
                "crop_on: device has other bits than this build of Pillow; set it to workers"
            )
