"""Chunks dealt to processes: the ranks of one program, and the parts of several.

    part=0/8 ... part=7/8    eight programs, each for every eighth chunk of the whole list

The list is flat: all chunks of all jobs, so ranks idle once, at its very end. Nobody waits for
anybody while chunks are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from composer.utils import dist, get_device

from lgm_scale.evaluation.engine.chunks import Bounds, ChunkStore, Job

__all__ = ["Part", "Task", "join_ranks", "make_missing", "missing_tasks"]

PATIENCE = timedelta(hours=24)
"""How long ranks wait for the last chunk of another. A rank that dies ends the others anyway."""


@dataclass(frozen=True)
class Part:
    """Part `index` of `count` of all chunks."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> Part:
        """Read `i/n`. Raises: ValueError if it is none."""
        if text is None:
            return cls()
        index, count = (int(number) for number in text.split("/"))
        if not 0 <= index < count:
            raise ValueError(text)
        return cls(index, count)


@dataclass(frozen=True)
class Task:
    """One chunk of one job of a list."""

    job: int
    bounds: Bounds

    @property
    def num_images(self) -> int:
        """Images of the chunk."""
        return self.bounds[1] - self.bounds[0]


def join_ranks() -> torch.device:
    """Start working with the other ranks, in full float32 products; this rank's device."""
    device = get_device(None)
    dist.initialize_dist(device, timeout=PATIENCE.total_seconds())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False  # it may choose other sums in each run
    gpu = device.name == "gpu"
    return torch.device("cuda", dist.get_local_rank()) if gpu else torch.device("cpu")


def missing_tasks(jobs: Sequence[Job], store: ChunkStore, part: Part) -> list[Task]:
    """Chunks of this part that are still to be made, in order; the same on every rank.

    Every chunk there is is read and verified, each by one rank.
    """
    tasks = [Task(i, bounds) for i, job in enumerate(jobs) for bounds in job.bounds]
    tasks = tasks[part.index :: part.count]
    rank, world = dist.get_global_rank(), dist.get_world_size()
    own = [i for i in range(rank, len(tasks), world) if not _has(store, jobs, tasks[i])]
    return [tasks[i] for i in sorted(i for found in dist.all_gather_object(own) for i in found)]


def _has(store: ChunkStore, jobs: Sequence[Job], task: Task) -> bool:
    return store.has(jobs[task.job], task.bounds)


def make_missing(
    jobs: Sequence[Job], store: ChunkStore, tasks: Sequence[Task], done: Callable[[Task], object]
) -> None:
    """Make this rank's share of the tasks. Others that another program works on come last.

    Args:
        jobs: The list that tasks count in.
        store: Where chunks are kept.
        tasks: From `missing_tasks`.
        done: Told each task of this rank that is there now.
    """
    busy: list[Task] = []
    for wait, own in (
        (False, tasks[dist.get_global_rank() :: dist.get_world_size()]),
        (True, busy),
    ):
        for task in own:
            job = jobs[task.job]
            with store.claim(job, task.bounds, wait) as claimed:
                if not claimed:
                    busy.append(task)
                    continue
                if not store.has(job, task.bounds):  # another program may have made it meanwhile
                    store.write(job, task.bounds, job.work(*task.bounds))
            done(task)
