"""From jobs to rows, in three stages that any number of processes share.

1. Chunks: every rank makes features of its share of all missing chunks; nobody waits.
2. Sums: mean and scatter of about 4000 images at a time, from the chunks, dealt like them.
3. Rows: sums are put together in order, distances and scores computed; one process per row.

Only files connect the stages. So a stage may be finished by other processes than began it, at
another number of ranks, after an interruption: the numbers are the same to the last bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from tqdm import tqdm

from lgm_scale.errors import DataError
from lgm_scale.evaluation.engine.chunks import ChunkStore, Job, Made
from lgm_scale.evaluation.engine.parts import Part, Task, make_missing, missing_tasks
from lgm_scale.evaluation.engine.rows import RowStore
from lgm_scale.evaluation.metrics.moments import Moments, Sums

__all__ = ["Engine", "Finish", "RowPlan"]

IMAGES_PER_SUM = 4000
"""Scatter matrices are 34 MB each for Inception: rather few of them than one per chunk."""

Finish = Callable[["RowPlan", "Engine"], tuple[dict[str, Any], dict[str, Any]]]


@dataclass(frozen=True)
class RowPlan:
    """A row to be: the job it is made of, and how.

    Args:
        name: Beginning of the row's file names.
        job: Its chunks.
        protocol: Everything that its numbers depend on.
        sums: Features whose moments it needs.
        finish: (plan, engine) -> the row without its protocol, and pictures.
        title: For people.
    """

    name: str
    job: Job
    protocol: dict[str, Any]
    sums: tuple[str, ...]
    finish: Finish
    title: str


class Engine:
    """Makes rows below one folder.

    Args:
        out: Folder; chunks, sums and rows are below it.
        device: Where sums are computed.
        quiet: No progress bar, no lines.
    """

    def __init__(self, out: Path, device: torch.device, quiet: bool = False) -> None:
        self.device, self.quiet = device, quiet
        self.chunks = ChunkStore(out / "chunks")
        self.rows = RowStore(out / "rows")
        self.first = dist.get_global_rank() == 0

    # --- stages -------------------------------------------------------------------------------

    def make_chunks(self, jobs: Sequence[Job], part: Part, what: str, may_work: bool) -> int:
        """Make what is missing of this part; the number of images that were missing.

        Raises: DataError naming what is missing if `may_work` is False.
        """
        tasks = missing_tasks(jobs, self.chunks, part)
        images = sum(task.num_images for task in tasks)
        if not tasks:
            return 0
        if not may_work:
            names = sorted({jobs[task.job].name for task in tasks})
            raise DataError(
                f"{len(tasks)} chunks ({images} images) are missing, of {', '.join(names[:6])}"
                f"{' and others' if len(names) > 6 else ''}: run every part, or the command "
                "without --reduce, which makes them"
            )
        own = tasks[dist.get_global_rank() :: dist.get_world_size()]
        total = sum(task.num_images for task in own)
        with tqdm(total=total, desc=what, unit="img", disable=self.quiet or not self.first) as bar:

            def done(task: Task) -> None:
                bar.set_postfix_str(jobs[task.job].name, refresh=False)
                bar.update(task.num_images)

            make_missing(jobs, self.chunks, tasks, done)
        dist.barrier()
        return images

    def make_sums(self, wanted: Sequence[tuple[Job, tuple[str, ...]]]) -> None:
        """Mean and scatter of these features of these jobs, whose chunks are there."""
        jobs = [self._sums(job, features) for job, features in wanted if features]
        make_missing(jobs, self.chunks, missing_tasks(jobs, self.chunks, Part()), lambda _: None)
        dist.barrier()

    def make_rows(self, plans: Sequence[RowPlan]) -> list[dict[str, Any]]:
        """Rows of finished chunks, one rank each; the same list on every rank, in order.

        Rows that are there are kept.
        """
        own = range(dist.get_global_rank(), len(plans), dist.get_world_size())
        for i in own:
            plan = plans[i]
            if self.rows.find(plan.name, plan.protocol) is None:
                self.rows.save(plan.name, plan.protocol, *plan.finish(plan, self))
        dist.barrier()
        found: list[Any] = [None]
        if self.first:
            found = [[self.rows.find(plan.name, plan.protocol) for plan in plans]]
        dist.broadcast_object_list(found)
        assert all(row is not None for row in found[0])
        return found[0]

    def open_plans(self, plans: Sequence[RowPlan]) -> list[RowPlan]:
        """Plans whose row is not there yet, on every rank alike."""
        found: list[Any] = [None]
        if self.first:
            found = [[self.rows.find(plan.name, plan.protocol) is None for plan in plans]]
        dist.broadcast_object_list(found)
        return [plan for plan, is_open in zip(plans, found[0], strict=True) if is_open]

    def clean(self, plans: Sequence[RowPlan], keep_features: bool) -> None:
        """Delete what the chunks of finished rows can make again; on one rank."""
        if not self.first:
            return
        for plan in plans:
            if plan.sums:
                shutil.rmtree(self.chunks.of(self._sums(plan.job, plan.sums)), ignore_errors=True)
            if not keep_features:
                shutil.rmtree(self.chunks.of(plan.job), ignore_errors=True)

    # --- what a row is made of ----------------------------------------------------------------

    def _sums(self, job: Job, features: tuple[str, ...]) -> Job:
        size = job.chunk_size * max(1, IMAGES_PER_SUM // job.chunk_size)

        def work(start: int, stop: int) -> Made:
            part = Job(job.name, job.protocol, stop, job.chunk_size, job.work)
            rows: dict[str, list[np.ndarray]] = {name: [] for name in features}
            for bounds in part.bounds[start // job.chunk_size :]:
                found = self.chunks.read(part, bounds, features).arrays
                for name in features:
                    rows[name].append(_whole(found[name], bounds[1] - bounds[0], job, name))
            arrays = {}
            for name in features:
                total = Sums.of(np.concatenate(rows[name]), self.device)
                arrays |= {f"{name}.mean": total.mean, f"{name}.scatter": total.scatter}
            return Made(arrays)

        protocol = {"sums_of": job.id, "features": features, "chunk_size": job.chunk_size}
        return Job(f"sums-{job.name}", protocol, job.count, size, work)

    def moments(self, job: Job, features: tuple[str, ...]) -> dict[str, Moments]:
        """Moments of a job's features, from its sums, in the order of the images."""
        if not features:
            return {}
        sums = self._sums(job, features)
        parts: dict[str, list[Sums]] = {name: [] for name in features}
        for bounds in sums.bounds:
            arrays = self.chunks.read(sums, bounds).arrays
            for name in features:
                mean, scatter = arrays[f"{name}.mean"], arrays[f"{name}.scatter"]
                parts[name].append(Sums(bounds[1] - bounds[0], mean, scatter))
        return {name: Sums.joined(found) for name, found in parts.items()}

    def features(self, job: Job, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Whole features of a job, in the order of its images."""
        return self.chunks.gather(job, names)

    def first_arrays(self, job: Job, name: str, count: int) -> np.ndarray:
        """The first `count` entries of an array that only the first chunks hold."""
        parts: list[np.ndarray] = []
        for bounds in job.bounds:
            if bounds[0] >= count:
                break
            parts.append(self.chunks.read(job, bounds, [name]).arrays[name])
        return np.concatenate(parts)[:count]

    def seconds(self, job: Job) -> tuple[dict[str, float], list[str]]:
        """Seconds on each stage over all chunks, and the devices they were made on."""
        total: dict[str, float] = {}
        devices = set()
        for notes in self.chunks.notes(job):
            devices.add(str(notes.get("device", "")))
            for stage, value in notes.get("seconds", {}).items():
                total[stage] = total.get(stage, 0.0) + value
        return total, sorted(devices - {""})


def _whole(values: np.ndarray, count: int, job: Job, name: str) -> np.ndarray:
    if len(values) != count:
        raise DataError(f"{job.name}: {name} has {len(values)} rows for {count} images")
    return values
