"""Samples of a cell: noise, solver, decoder, pixels, features; what they cost, and all as npz."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lgm_scale.evaluation.engine.chunks import Arrays, ChunkResult, Job
from lgm_scale.evaluation.engine.stages import Engine
from lgm_scale.evaluation.features.extraction import (
    FeatureSpace,
    Stopwatch,
    chunk_batches,
    device_name,
    extract,
    filled_up,
    joined,
    refuse_broken,
)
from lgm_scale.evaluation.sweep.config import Cell, SweepConfig
from lgm_scale.pipeline import Pipeline
from lgm_scale.pixels import finite_images, to_uint8
from lgm_scale.sampling.config import SamplerConfig
from lgm_scale.storage.files import write_whole

NUM_SHOWN = 20
"""Images, from the first on, that keep their pixels for pictures."""


def sample_images(
    pipe: Pipeline,
    indices: Tensor,
    num_tokens: int,
    sampler: SamplerConfig,
    seed: int,
    truncate: bool = False,
    watch: Stopwatch | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample the images of these indices, of classes `labels`; else image i has i mod num_classes.

    Batches of less than four are filled up while they are computed: on a CPU an image has the
    same bits in a batch of any size.

    Shapes: indices, labels [B] int64 -> uint8 [B, 3, S, S], and bool [B]: whether each is finite.
    """
    count = len(indices)
    indices = filled_up(indices)
    labels = indices % pipe.num_classes if labels is None else filled_up(labels)
    latents = pipe.latents(labels, indices, num_tokens, seed, sampler)
    if watch is not None:
        watch.lap("sampling")
    pixels = pipe.decode(latents)[:count]
    images, finite = to_uint8(pixels, truncate), finite_images(pixels)
    if watch is not None:
        watch.lap("decoding")
    return images, finite


@dataclass
class SampleFeatures:
    """Computes chunks of samples of a cell, and their features."""

    pipe: Pipeline
    spaces: Sequence[FeatureSpace]
    config: SweepConfig

    def __call__(self, cell: Cell, start: int, stop: int) -> ChunkResult:
        """Compute one chunk. Raises: DataError if an image is not finite."""
        watch, config = Stopwatch(self.pipe.device), self.config
        truncate = config.quantise == "truncate"
        features: list[Arrays] = []
        finite: list[np.ndarray] = []
        pixels: list[np.ndarray] = []
        for indices in chunk_batches(start, stop, config.batch_size):
            images, good = sample_images(
                self.pipe, indices, cell.num_tokens, cell.sampler, config.seed, truncate, watch
            )
            finite.append(good.cpu().numpy())
            features.append(extract(self.spaces, images))
            wanted = len(images) if config.save_npz else max(0, NUM_SHOWN - int(indices[0]))
            if wanted:
                pixels.append(images[:wanted].cpu().numpy())
            watch.lap("features")
        refuse_broken(np.concatenate(finite), f"samples at {cell.label}", start)
        arrays = joined(features)
        if pixels:
            arrays["pixels"] = np.concatenate(pixels)
        return ChunkResult(
            arrays, {"seconds": watch.seconds, "device": device_name(self.pipe.device)}
        )


def work_of(pipe: Pipeline, cell: Cell) -> dict[str, Any]:
    """Operations per image of K tokens, counting every network row that is really run."""
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


def write_npz(
    path: Path,
    count: int,
    parts: Iterable[np.ndarray],
    labels: np.ndarray | None = None,
    comment: bytes = b"",
) -> None:
    """Write images as one npz of ADM's form, whole or not at all: `arr_0` uint8 [M, S, S, 3].

    `parts` [m, S, S, 3] hold all `count` images in order, and are written one by one. `labels`
    int64 [M] are `arr_1`; `comment` is the archive's. Equal arguments give equal bytes.
    """

    def write(aside: Path) -> None:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.comment = comment
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                for i, images in enumerate(parts):
                    if i == 0:
                        shape = (count, *images.shape[1:])
                        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
                    file.write(np.ascontiguousarray(images).data)
            if labels is not None:
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                    np.lib.format.write_array(file, labels)

    write_whole(path, write)


def write_samples(engine: Engine, job: Job, out: Path, name: str) -> Path:
    """Write all samples of a cell with `write_npz`, chunk by chunk; return the file."""
    chunks = (engine.chunks.read(job, bounds, ["pixels"]) for bounds in job.bounds)
    path = out / "npz" / f"{name}.npz"
    write_npz(path, job.count, (each.arrays["pixels"].transpose(0, 2, 3, 1) for each in chunks))
    return path
