"""Feature spaces: networks or projections that map 8-bit images to vectors.

Each describes itself; a result is kept with these descriptions, and results of other spaces are
never compared with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lgm_scale.evaluation.engine.chunks import Arrays

__all__ = ["MIN_ROWS", "FeatureSpace", "extract", "fixed_batches", "images_hash", "network_flags"]


MIN_ROWS = 4
"""Below four rows a matrix product on a CPU takes another route, with other last bits."""


class FeatureSpace(Protocol):
    """Images to vectors, each image for itself."""

    @property
    def outputs(self) -> dict[str, int]:
        """Names of the features it gives, and their dimensions."""
        ...

    def __call__(self, images: Tensor) -> Arrays:
        """Features of a batch. Shapes: uint8 [B, 3, S, S] -> float32 or float64 [B, F] each."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a result must be kept with to be comparable; JSON values."""
        ...


def extract(spaces: Sequence[FeatureSpace], images: Tensor) -> Arrays:
    """Features of a batch in all spaces. Shapes: uint8 [B, 3, S, S] -> [B, F] each."""
    return {name: values for space in spaces for name, values in space(images).items()}


def fixed_batches(images: Tensor) -> list[tuple[Tensor, int]]:
    """Batches for a network, each with the number of its images that count.

    On a GPU the batch as it is. On a CPU fours, the last one filled up: there a product or a
    convolution takes another route in batches of another size, with other last bits, and nothing
    is gained by larger ones. So an image has the same bits at every batch size.
    """
    if images.is_cuda or not len(images):
        return [(images, len(images))] if len(images) else []
    parts = []
    for part in images.split(MIN_ROWS):
        fill = part[-1:].expand(MIN_ROWS - len(part), *part.shape[1:])
        parts.append((torch.cat((part, fill)), len(part)))
    return parts


def images_hash(images: np.ndarray | Tensor) -> str:
    """SHA-256 of shape and pixels of uint8 images."""
    values = images.cpu().numpy() if isinstance(images, Tensor) else images
    total = hashlib.sha256(str(values.shape).encode())
    total.update(np.ascontiguousarray(values).tobytes())
    return total.hexdigest()


def network_flags() -> Any:
    """Convolutions without shortened products and without sums chosen at run time."""
    return torch.backends.cudnn.flags(benchmark=False, allow_tf32=False)
