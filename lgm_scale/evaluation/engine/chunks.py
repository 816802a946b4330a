"""Results over images, in chunks of fixed image ranges, each kept in one file.

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

Arrays = dict[str, np.ndarray]
Bounds = tuple[int, int]
_TAKEN = (errno.EACCES, errno.EAGAIN)


class ChunkResult(NamedTuple):
    """What is computed for a chunk: arrays, and notes (seconds, device) that are no result."""

    arrays: Arrays
    notes: dict[str, Any] = {}  # noqa: RUF012  a default of an immutable tuple, never written to


@dataclass(frozen=True)
class Job:
    """A computation over `count` images; image i's result depends on `protocol` and i alone.

    Args:
        name: Beginning of the folder's name, for people to read.
        protocol: Everything that the arrays depend on; JSON values.
        count: Number of images. Not part of the identity: more images keep the whole chunks that
            there are, and add to them.
        compute: (start, stop) -> arrays, whatever their shapes, and notes.
    """

    name: str
    protocol: dict[str, Any]
    count: int
    chunk_size: int
    compute: Callable[[int, int], ChunkResult]

    @cached_property
    def id(self) -> str:
        """SHA-256 of the protocol: equal ids mean interchangeable chunks."""
        return digest(self.protocol)

    @property
    def bounds(self) -> list[Bounds]:
        """Image ranges of all chunks, in order; the last one is shorter. They tile [0, count)."""
        starts = range(0, self.count, self.chunk_size)
        return [(start, min(start + self.chunk_size, self.count)) for start in starts]


class ChunkStore:
    """The chunks below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def folder_of(self, job: Job) -> Path:
        """Folder that holds the chunks of a job."""
        return self.folder / f"{job.name}-{job.id[:12]}"

    def path(self, job: Job, bounds: Bounds) -> Path:
        """File that holds, or will hold, one chunk."""
        return self.folder_of(job) / f"{bounds[0]:08d}-{bounds[1]:08d}.safetensors"

    def write(self, job: Job, bounds: Bounds, result: ChunkResult) -> None:
        """Write a chunk with its checksum, whole or not at all."""
        arrays = {name: np.ascontiguousarray(value) for name, value in result.arrays.items()}
        header = {"job": job.id, "sha256": _checksum(arrays), "notes": json.dumps(result.notes)}
        write_whole(self.path(job, bounds), save(arrays, metadata=header))

    def read(self, job: Job, bounds: Bounds, names: Iterable[str] | None = None) -> ChunkResult:
        """Read a chunk and verify its checksum; with `names`, return these arrays alone.

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
        return ChunkResult(wanted, json.loads(header["notes"]))

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
        """Notes of all chunks of a job, in the order of its images; no array is read."""
        found = []
        for bounds in job.bounds:
            with safe_open(self.path(job, bounds), framework="numpy") as file:
                found.append(json.loads(file.metadata()["notes"]))
        return found

    def gather(self, job: Job, names: Iterable[str], start: int = 0) -> Arrays:
        """Concatenate arrays of a job from image `start` on, chunk after chunk.

        Raises: DataError if the chunks do not tile [start, count), or an array is not as long as
        its chunk: then no number may be made of them.
        """
        names = list(names)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for bounds in job.bounds[start // job.chunk_size :]:
            size = bounds[1] - bounds[0]
            for name, values in self.read(job, bounds, names).arrays.items():
                if len(values) != size:
                    raise DataError(
                        f"{self.path(job, bounds)}: {name} has {len(values)} rows for {size} "
                        "images; delete the file and run the same command again"
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
        path = self.folder_of(job) / "claims"
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
