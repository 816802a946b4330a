"""Work over images, in chunks of fixed image ranges whose results are kept in files.

A chunk is one file, `<job>-<id>/<start>-<stop>.safetensors`, that is there whole or not at all.
Its name says what it holds, so a chunk that two processes make is still one chunk. Where a chunk
begins and ends depends on the job alone, never on the number of processes; results are put
together in the order of the images: any number of ranks, any number of interruptions, the same
bits.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lgm_scale.errors import DataError
from lgm_scale.storage.files import digest, write_whole

__all__ = ["Arrays", "Bounds", "ChunkStore", "Job", "Made", "chunk_bounds"]

Arrays = dict[str, np.ndarray]
Bounds = tuple[int, int]
_TAKEN = (errno.EACCES, errno.EAGAIN)


class Made(NamedTuple):
    """What work over a chunk gives: arrays, and notes (seconds, device) that are no result."""

    arrays: Arrays
    notes: dict[str, Any] = {}  # noqa: RUF012  a default of an immutable tuple, never written to


def chunk_bounds(count: int, size: int) -> list[Bounds]:
    """Ranges of `size` images, the last one shorter: they tile [0, count)."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


@dataclass(frozen=True)
class Job:
    """Work over `count` images, whose result for image i depends on `protocol` and i alone.

    Args:
        name: For people, and the beginning of a folder's name.
        protocol: Everything that the arrays depend on; JSON values.
        count: Number of images. Not part of the identity: more images keep the chunks there are.
        chunk_size: Images per chunk.
        work: (start, stop) -> arrays, whatever their shapes, and notes.
    """

    name: str
    protocol: dict[str, Any]
    count: int
    chunk_size: int
    work: Callable[[int, int], Made]

    @cached_property
    def id(self) -> str:
        """Hash of what the arrays depend on."""
        return digest(self.protocol)

    @property
    def bounds(self) -> list[Bounds]:
        """The chunks."""
        return chunk_bounds(self.count, self.chunk_size)


class ChunkStore:
    """The chunks below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, job: Job) -> Path:
        """Folder of a job."""
        return self.folder / f"{job.name}-{job.id[:12]}"

    def path(self, job: Job, bounds: Bounds) -> Path:
        """File of a chunk."""
        return self.of(job) / f"{bounds[0]:08d}-{bounds[1]:08d}.safetensors"

    def write(self, job: Job, bounds: Bounds, made: Made) -> None:
        """Keep a chunk."""
        arrays = {name: np.ascontiguousarray(value) for name, value in made.arrays.items()}
        header = {"job": job.id, "sha256": _checksum(arrays), "notes": json.dumps(made.notes)}
        write_whole(self.path(job, bounds), save(arrays, metadata=header))

    def read(self, job: Job, bounds: Bounds, names: Iterable[str] | None = None) -> Made:
        """A chunk, verified; with `names`, these arrays alone.

        Raises: DataError if it is missing, damaged or of another job.
        """
        path = self.path(job, bounds)
        try:
            with safe_open(path, framework="numpy") as file:
                header = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); run the same command again"
            ) from error
        if header.get("job") != job.id or header.get("sha256") != _checksum(arrays):
            raise DataError(f"{path} is damaged; run the same command again to make it anew")
        wanted = arrays if names is None else {name: arrays[name] for name in names}
        return Made(wanted, json.loads(header["notes"]))

    def has(self, job: Job, bounds: Bounds) -> bool:
        """Whether the chunk is there, whole and undamaged."""
        if not self.path(job, bounds).is_file():
            return False
        try:
            self.read(job, bounds)
        except DataError:
            return False
        return True

    def notes(self, job: Job) -> list[dict[str, Any]]:
        """Notes of all chunks of a job, in order; the arrays are not read."""
        found = []
        for bounds in job.bounds:
            with safe_open(self.path(job, bounds), framework="numpy") as file:
                found.append(json.loads(file.metadata()["notes"]))
        return found

    def gather(self, job: Job, names: Iterable[str]) -> Arrays:
        """Arrays of a whole job, in the order of its images.

        Raises: DataError if the chunks do not tile [0, count), or an array is not as long as its
        chunk: then no number may be made of them.
        """
        names = list(names)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for start, stop in job.bounds:
            arrays = self.read(job, (start, stop), names).arrays
            for name, values in arrays.items():
                if len(values) != stop - start:
                    raise DataError(
                        f"{self.path(job, (start, stop))}: {name} has {len(values)} rows for "
                        f"{stop - start} images; delete the file and run the same command again"
                    )
                parts[name].append(values)
        return {name: np.concatenate(values) for name, values in parts.items()}

    @contextmanager
    def claim(self, job: Job, bounds: Bounds, wait: bool) -> Iterator[bool]:
        """Keep other processes from making the same chunk at the same time.

        Gives False if another process has it and `wait` is False. The claim is a lock of the
        operating system and ends with the process, however it ends. It saves work and nothing
        else: where a file system has no locks, a chunk may be made twice, to the same bytes.
        """
        path = self.of(job) / "claims"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            try:
                flags = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
                fcntl.lockf(file, flags, 1, bounds[0])
            except OSError as error:
                if error.errno in _TAKEN:
                    yield False
                    return
            yield True  # closing the file ends the lock


def _checksum(arrays: Arrays) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        values = arrays[name]
        total.update(f"{name} {values.dtype} {values.shape}".encode())
        total.update(np.ascontiguousarray(values).data)
    return total.hexdigest()
