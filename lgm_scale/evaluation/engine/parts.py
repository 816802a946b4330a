"""Chunks dealt to processes: the ranks of one program, and the parts of several.

    part=0/8 ... part=7/8    eight programs, each for every eighth chunk of the whole list

The list is flat: all chunks of all jobs, so ranks idle once, at its very end. Nobody waits for
anybody while chunks are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from composer.utils import dist, get_device

from lgm_scale.evaluation.engine.chunks import Bounds, ChunkStore, Job

Result = TypeVar("Result")

PATIENCE = timedelta(hours=24)
"""How long ranks wait for the last chunk of another. A rank that dies ends the others anyway."""


@dataclass(frozen=True)
class Part:
    """Every `count`-th chunk of the flat list of all chunks, from chunk `index` on."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> Part:
        """Read `i/n` with 0 <= i < n; None is all in one. Raises: ValueError."""
        if text is None:
            return cls()
        index, count = (int(number) for number in text.split("/"))
        if not 0 <= index < count:
            raise ValueError(text)
        return cls(index, count)


@dataclass(frozen=True)
class Task:
    """One chunk to be made: the index of its job in a list of jobs, and its image range."""

    job: int
    bounds: Bounds

    @property
    def num_images(self) -> int:
        """Number of images in the chunk."""
        return self.bounds[1] - self.bounds[0]


def join_ranks() -> torch.device:
    """Join the other ranks, switch TF32 off in this process, and return this rank's device."""
    device = get_device(None)
    dist.initialize_dist(device, timeout=PATIENCE.total_seconds())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False  # it may choose other sums in each run
    gpu = device.name == "gpu"
    return torch.device("cuda", dist.get_local_rank()) if gpu else torch.device("cpu")


def from_rank_zero(compute: Callable[[], Result]) -> Result:
    """Compute on rank 0 and give every rank its result; every rank must call it.

    Where files decide what is done next, one rank must look for all: a file that appears between
    two ranks' looks would send them to different collective calls, which then wait for ever.
    """
    found: list[Any] = [compute() if dist.get_global_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def missing_tasks(jobs: Sequence[Job], store: ChunkStore, part: Part) -> list[Task]:
    """List the chunks of this part that are still to be made; the same list on every rank.

    Every existing chunk is read and verified, each by one rank.
    """
    tasks = [Task(i, bounds) for i, job in enumerate(jobs) for bounds in job.bounds]
    tasks = tasks[part.index :: part.count]
    rank, world = dist.get_global_rank(), dist.get_world_size()
    own = [
        i for i in range(rank, len(tasks), world)
        if not store.has(jobs[tasks[i].job], tasks[i].bounds)
    ]  # fmt: skip
    return [tasks[i] for i in sorted(i for found in dist.all_gather_object(own) for i in found)]


def make_missing(
    jobs: Sequence[Job], store: ChunkStore, tasks: Sequence[Task], done: Callable[[Task], object]
) -> None:
    """Make this rank's share of the tasks; those that another program has claimed come last.

    `jobs` is the list that `Task.job` counts in; `done` is told each task of this rank that is
    there.
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
                    store.write(job, task.bounds, job.compute(*task.bounds))
            done(task)
