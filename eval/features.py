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

from eval.chunks import Arrays

__all__ = ["FeatureSpace", "extract", "images_hash", "one_by_one"]


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


def one_by_one(images: Tensor) -> list[Tensor]:
    """The batch as it is on a GPU, and image by image on a CPU.

    There a convolution takes another route in batches of another size, with other last bits, and
    nothing is gained by a batch: one image at a time gives the same bits at every batch size.
    """
    return [images] if images.is_cuda else list(images.split(1))


def images_hash(images: np.ndarray | Tensor) -> str:
    """SHA-256 of shape and pixels of uint8 images."""
    values = images.cpu().numpy() if isinstance(images, Tensor) else images
    total = hashlib.sha256(str(values.shape).encode())
    total.update(np.ascontiguousarray(values).tobytes())
    return total.hexdigest()


def network_flags() -> Any:
    """Convolutions without shortened products and without sums chosen at run time."""
    return torch.backends.cudnn.flags(benchmark=False, allow_tf32=False)
