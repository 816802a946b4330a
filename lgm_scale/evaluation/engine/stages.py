"""From jobs to rows, in three stages that any number of processes share.

1. Chunks: every rank makes features of its share of all missing chunks; nobody waits.
2. Sums: mean and scatter of about 4000 images at a time, from the chunks, dealt like them. To
   read 50 000 vectors and multiply them takes longer than the distance: so all ranks share it.
3. Rows: sums are put together in order, distances and scores computed; one process per row.

Only files connect the stages. So a stage may be finished by other processes than began it, at
another number of ranks, after an interruption: the numbers are the same to the last bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from tqdm import tqdm

from lgm_scale.errors import DataError
from lgm_scale.evaluation.engine.chunks import ChunkResult, ChunkStore, Job
from lgm_scale.evaluation.engine.parts import (
    Part,
    Task,
    from_rank_zero,
    make_missing,
    missing_tasks,
)
from lgm_scale.evaluation.engine.rows import RowStore
from lgm_scale.evaluation.engine.statistics import FeatureStatistics, Sums

IMAGES_PER_SUM = 4000
"""Scatter matrices are 34 MB each for Inception: rather few of them than one per chunk."""

Finish = Callable[["RowPlan", "Engine"], tuple[dict[str, Any], dict[str, Any]]]


@dataclass(frozen=True)
class RowPlan:
    """How one row is to be made from the finished chunks of a job.

    Args:
        name: Beginning of the row's file names.
        protocol: Everything that its numbers depend on.
        sums: Names of the features whose mean and covariance it needs.
        finish: (plan, engine) -> the row without its protocol, and pictures.
        title: How the row is called on the console.
    """

    name: str
    job: Job
    protocol: dict[str, Any]
    sums: tuple[str, ...]
    finish: Finish
    title: str


class Engine:
    """Makes chunks, sums and rows below one folder."""

    def __init__(self, out: Path, device: torch.device, quiet: bool = False) -> None:
        self.device, self.quiet = device, quiet
        self.chunks = ChunkStore(out / "chunks")
        self.rows = RowStore(out / "rows")
        self.first = dist.get_global_rank() == 0

    # --- stages -------------------------------------------------------------------------------

    def make_chunks(self, jobs: Sequence[Job], part: Part, what: str, may_compute: bool) -> int:
        """Make the missing chunks of this part; return how many images they hold.

        Raises: DataError naming what is missing if `may_compute` is False.
        """
        tasks = missing_tasks(jobs, self.chunks, part)
        images = sum(task.num_images for task in tasks)
        if not tasks:
            return 0
        if not may_compute:
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
        """Make mean and scatter of these features of these jobs, whose chunks must be there."""
        jobs = [self._sums(job, features) for job, features in wanted if features]
        make_missing(jobs, self.chunks, missing_tasks(jobs, self.chunks, Part()), lambda _: None)
        dist.barrier()

    def make_rows(self, plans: Sequence[RowPlan]) -> list[dict[str, Any]]:
        """Compute rows from finished chunks and sums, one rank each; keep those that are there.

        Returns: the rows in the order of the plans, the same list on every rank.
        """
        own = range(dist.get_global_rank(), len(plans), dist.get_world_size())
        for i in own:
            plan = plans[i]
            if self.rows.find(plan.name, plan.protocol) is None:
                self.rows.save(plan.name, plan.protocol, *plan.finish(plan, self))
        dist.barrier()
        rows = self._found(plans)
        assert all(rows), "a row that was just written cannot be read"
        return [row for row in rows if row]

    def open_plans(self, plans: Sequence[RowPlan]) -> list[RowPlan]:
        """Plans whose row is not there yet; the same list on every rank."""
        return [plan for plan, row in zip(plans, self._found(plans), strict=True) if row is None]

    def _found(self, plans: Sequence[RowPlan]) -> list[dict[str, Any] | None]:
        return from_rank_zero(lambda: [self.rows.find(p.name, p.protocol) for p in plans])

    def clean(self, plans: Sequence[RowPlan], keep_features: bool) -> None:
        """Delete the sums of finished rows, which their chunks can make again; on rank 0.

        Without `keep_features` the chunks go, too.
        """
        if not self.first:
            return
        for plan in plans:
            if plan.sums:
                shutil.rmtree(
                    self.chunks.folder_of(self._sums(plan.job, plan.sums)), ignore_errors=True
                )
            if not keep_features:
                shutil.rmtree(self.chunks.folder_of(plan.job), ignore_errors=True)

    # --- what a row is made of ----------------------------------------------------------------

    def _sums(self, job: Job, features: tuple[str, ...]) -> Job:
        size = job.chunk_size * max(1, IMAGES_PER_SUM // job.chunk_size)

        def compute(start: int, stop: int) -> ChunkResult:
            rows = self.chunks.gather(replace(job, count=stop), features, start)
            arrays = {}
            for name in features:
                total = Sums.of(rows[name], self.device)
                arrays |= {f"{name}.mean": total.mean, f"{name}.scatter": total.scatter}
            return ChunkResult(arrays)

        protocol = {"sums_of": job.id, "features": features, "chunk_size": job.chunk_size}
        return Job(f"sums-{job.name}", protocol, job.count, size, compute)

    def statistics(self, job: Job, features: tuple[str, ...]) -> dict[str, FeatureStatistics]:
        """Mean and covariance of a job's features, its sums put together in order."""
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
        """Features of a job, image by image in order: name -> [M, F]."""
        return self.chunks.gather(job, names)

    def first_arrays(self, job: Job, name: str, count: int) -> np.ndarray:
        """The first `count` entries of an array that only the first chunks need to hold."""
        parts: list[np.ndarray] = []
        for bounds in job.bounds:
            if bounds[0] >= count:
                break
            parts.append(self.chunks.read(job, bounds, [name]).arrays[name])
        return np.concatenate(parts)[:count]

    def seconds(self, job: Job) -> tuple[dict[str, float], list[str]]:
        """Seconds spent on each stage over all chunks, and the devices they were made on."""
        total: dict[str, float] = {}
        devices = set()
        for notes in self.chunks.notes(job):
            devices.add(str(notes.get("device", "")))
            for stage, value in notes.get("seconds", {}).items():
                total[stage] = total.get(stage, 0.0) + value
        return total, sorted(devices - {""})
