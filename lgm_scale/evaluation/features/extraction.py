"""Chunks of features: what a feature space is, and how batches go through it to the same bits.

Each space describes itself; a result is kept with these descriptions, and results of other spaces
are never compared with it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lgm_scale.errors import DataError
from lgm_scale.evaluation.engine.chunks import Arrays, ChunkResult
from lgm_scale.evaluation.images import ImageSource

MIN_ROWS = 4
"""Below four rows a matrix product on a CPU takes another route, with other last bits."""


class FeatureSpace(Protocol):
    """Maps images to vectors, each image for itself."""

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


# --- batches ----------------------------------------------------------------------------------


def chunk_batches(start: int, stop: int, size: int) -> list[Tensor]:
    """Indices of a chunk in batches [B].

    Batches begin where the chunk does, never where a rank's share does: on a GPU, where the size
    of a batch may change last bits, results still do not depend on the number of ranks.
    """
    return list(torch.arange(start, stop).split(size))


def filled_up(batch: Tensor) -> Tensor:
    """Repeat the last row until there are four: [B, ...] -> [max(B, 4), ...]."""
    return torch.cat((batch, batch[-1:].expand(max(0, MIN_ROWS - len(batch)), *batch.shape[1:])))


def fixed_batches(images: Tensor) -> list[tuple[Tensor, int]]:
    """Batches for a network, each with the number of its images that count.

    On a GPU the batch as it is. On a CPU fours, the last one filled up: there a product or a
    convolution takes another route in batches of another size, with other last bits, and nothing
    is gained by larger ones. So an image has the same bits at every batch size.
    """
    if images.is_cuda or not len(images):
        return [(images, len(images))] if len(images) else []
    return [(filled_up(part), len(part)) for part in images.split(MIN_ROWS)]


def network_flags() -> Any:
    """Turn off shortened products, and convolution algorithms that are chosen at run time."""
    return torch.backends.cudnn.flags(benchmark=False, allow_tf32=False)


@torch.inference_mode()
def run_network(
    network: Callable[[Tensor], Sequence[Tensor]], images: Tensor, outputs: Mapping[str, int]
) -> Arrays:
    """Features of a network in float32, to the same bits at every batch size.

    Shapes: images uint8 [B, 3, S, S] on the network's device -> float32 [B, F] for each of
    `outputs` (name -> F), which the network gives in this order.
    """
    parts = [{name: np.empty((0, dim), "f4") for name, dim in outputs.items()}]
    with network_flags(), torch.autocast(images.device.type, enabled=False):
        for batch, count in fixed_batches(images):
            found = zip(outputs, network(batch), strict=True)
            parts.append({name: values[:count].float().cpu().numpy() for name, values in found})
    return joined(parts)


def joined(parts: Sequence[Arrays]) -> Arrays:
    """Concatenate the arrays of a chunk's batches, name by name."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def refuse_broken(finite: np.ndarray, what: str, first: int = 0) -> None:
    """Raise DataError with count and indices of the images that are not finite.

    `finite` is bool [M], whether each image is; `first` is the index of the first of them.
    """
    broken = np.flatnonzero(~finite) + first
    if len(broken):
        more = f" and {len(broken) - 8} more" if len(broken) > 8 else ""
        raise DataError(
            f"{what}: {len(broken)} of {len(finite)} images are not finite (NaN or infinity): "
            f"{broken[:8].tolist()}{more}; the weights are broken or the sampler's settings drive "
            "them out of range"
        )


# --- what it costs ----------------------------------------------------------------------------


class Stopwatch:
    """Seconds spent on each stage; on a GPU, until its queued kernels are really done."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {}
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap as spent on this stage."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now


def device_name(device: torch.device) -> str:
    """How a device is called in results: a GPU's product name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# --- images as they are -----------------------------------------------------------------------


@dataclass
class OriginalFeatures:
    """Computes chunks of stored images themselves: features, labels, hashes."""

    images: ImageSource
    spaces: Sequence[FeatureSpace]
    device: torch.device
    batch_size: int

    def __call__(self, start: int, stop: int) -> ChunkResult:
        """Compute one chunk: images `start` to `stop`."""
        watch = Stopwatch(self.device)
        parts: list[Arrays] = []
        for indices in chunk_batches(start, stop, self.batch_size):
            images, labels = self.images.read(indices)
            hashes = [hashlib.sha256(image.tobytes()).digest() for image in images.numpy()]
            watch.lap("reading")
            found = extract(self.spaces, images.to(self.device))
            found["labels"] = labels
            found["hashes"] = np.array([np.frombuffer(each, np.uint8) for each in hashes])
            parts.append(found)
            watch.lap("features")
        return ChunkResult(joined(parts), {"seconds": watch.seconds})
