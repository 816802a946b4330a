"""Samples as one npz of ADM's form: `arr_0`, uint8 [M, S, S, 3], in the order of the images."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from lgm_scale.evaluation.engine.chunks import Job
from lgm_scale.evaluation.engine.stages import Engine

__all__ = ["write_samples"]


def write_samples(engine: Engine, job: Job, out: Path, name: str) -> Path:
    """Write the pixels of a job chunk by chunk, never all in memory; returns the file."""
    path = out / "npz" / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with (
        zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        for i, bounds in enumerate(job.bounds):
            pixels = engine.chunks.read(job, bounds, ["pixels"]).arrays["pixels"]
            images = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
            if i == 0:
                shape = (job.count, *images.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
            file.write(images.tobytes())
    aside.replace(path)
    return path
