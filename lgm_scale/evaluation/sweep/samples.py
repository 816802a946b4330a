"""Samples of a cell: noise, solver, decoder, pixels, features; and what they cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lgm_scale.errors import DataError
from lgm_scale.evaluation.engine.chunks import Made
from lgm_scale.evaluation.features.base import MIN_ROWS, FeatureSpace, extract
from lgm_scale.evaluation.sweep.config import Cell
from lgm_scale.pipeline import Pipeline
from lgm_scale.pixels import finite_images, to_uint8
from lgm_scale.sampling.config import SamplerConfig

__all__ = [
    "SampleWork",
    "Stopwatch",
    "batches",
    "refuse_broken",
    "sample_images",
    "work_of",
]


class Stopwatch:
    """Seconds spent on each stage; on a GPU, until its work is really done."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {}
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap to a stage."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now


def batches(start: int, stop: int, size: int) -> list[Tensor]:
    """Indices of a chunk in batches; where they begin depends on the chunk alone."""
    return list(torch.arange(start, stop).split(size))


def sample_images(
    pipe: Pipeline,
    indices: Tensor,
    num_tokens: int,
    sampler: SamplerConfig,
    seed: int,
    truncate: bool = False,
    watch: Stopwatch | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample the images with these indices; image i has class i mod num_classes.

    Batches of less than four are filled up while they are computed: on a CPU an image has the
    same bits in a batch of any size.

    Shapes: indices [B] int64 -> uint8 [B, 3, S, S], and bool [B]: whether the image is finite.
    """
    count = len(indices)
    if count < MIN_ROWS:
        indices = torch.cat((indices, indices[-1:].expand(MIN_ROWS - count)))
    labels = indices % pipe.num_classes
    latents = pipe.latents(labels, indices, num_tokens, seed, sampler)
    if watch is not None:
        watch.lap("sampling")
    pixels = pipe.decode(latents)[:count]
    images, finite = to_uint8(pixels, truncate), finite_images(pixels)
    if watch is not None:
        watch.lap("decoding")
    return images, finite


def refuse_broken(finite: np.ndarray, what: str, first: int = 0) -> None:
    """Raise DataError with count and indices of the images that are not finite."""
    broken = np.flatnonzero(~finite) + first
    if len(broken):
        more = f" and {len(broken) - 8} more" if len(broken) > 8 else ""
        raise DataError(
            f"{what}: {len(broken)} of {len(finite)} images are not finite (NaN or infinity): "
            f"{broken[:8].tolist()}{more}; the weights are broken or the sampler's settings drive "
            "them out of range"
        )


@dataclass
class SampleWork:
    """Makes chunks of samples of a cell.

    Args:
        pipe: The generator.
        spaces: Feature spaces, on the pipeline's device.
        seed: Of the noise.
        batch_size: Images at once.
        truncate: How pixels become 8 bits.
        num_shown: Images from the first on whose pixels are kept for pictures.
        keep_pixels: Keep the pixels of all.
    """

    pipe: Pipeline
    spaces: Sequence[FeatureSpace]
    seed: int
    batch_size: int
    truncate: bool = False
    num_shown: int = 0
    keep_pixels: bool = False

    def __call__(self, cell: Cell, start: int, stop: int) -> Made:
        """One chunk. Raises: DataError if an image is not finite."""
        watch = Stopwatch(self.pipe.device)
        features: list[dict[str, np.ndarray]] = []
        finite: list[np.ndarray] = []
        pixels: list[np.ndarray] = []
        for indices in batches(start, stop, self.batch_size):
            images, good = sample_images(
                self.pipe, indices, cell.num_tokens, cell.sampler, self.seed, self.truncate, watch
            )
            finite.append(good.cpu().numpy())
            features.append(extract(self.spaces, images))
            wanted = len(images) if self.keep_pixels else max(0, self.num_shown - int(indices[0]))
            if wanted:
                pixels.append(images[:wanted].cpu().numpy())
            watch.lap("features")
        refuse_broken(np.concatenate(finite), f"samples at {cell.label}", start)
        arrays = {name: np.concatenate([part[name] for part in features]) for name in features[0]}
        if pixels:
            arrays["pixels"] = np.concatenate(pixels)
        return Made(arrays, {"seconds": watch.seconds, "device": device_name(self.pipe.device)})


def device_name(device: torch.device) -> str:
    """For people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def work_of(pipe: Pipeline, cell: Cell) -> dict[str, Any]:
    """Operations per image of K tokens, with every network row that is really run."""
    sampler = cell.sampler
    evaluations = sampler.evaluations()
    return {
        "tflops_per_image": pipe.image_flops(sampler, cell.num_tokens) / 1e12,
        "decoder_tflops": pipe.decoder_flops() / 1e12,
        "tflops_per_row": {
            str(k): pipe.row_flops(k) / 1e12 for k in sorted(sampler.rows(cell.num_tokens))
        },
        "steps": sampler.num_steps - 1,
        "evaluations": len(evaluations),
        "guided_evaluations": sum(sampler.guided(t) for _, t in evaluations),
        "rows": sampler.num_forwards(),
        "rows_if_always_guided": (2 if sampler.cfg_scale > 1 else 1) * len(evaluations),
    }
