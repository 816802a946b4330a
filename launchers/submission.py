"""Launches in a row: the last checks, what a dry run prints of them, and their submission."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

from launchers import scheduler
from launchers.cluster import minutes
from launchers.jobs import Job
from launchers.launch import Launch, SubmissionError
from launchers.records import LAUNCH_NAME, last_speed, launch_folders
from lgm_scale.config.schema import TrainingRun
from lgm_scale.errors import ConfigError


def with_join(launch: Launch) -> list[Launch]:
    """The launch, and after an array the job that joins its parts."""
    if not launch.job.parts:
        return [launch]
    arguments = (*launch.job.arguments, "--reduce")  # finished chunks only: nothing counts twice
    name = f"{launch.job.name}-join"
    join = replace(launch.job, parts=(), name=name, arguments=arguments, ranks=False)
    return [launch, replace(launch, job=join)]


def submit(launches: list[Launch]) -> list[str]:
    """Submit launches, each after the one before; ids of the last. Raises: SubmissionError."""
    before: list[str] = []
    for launch in launches:
        launch = replace(launch, after=(*launch.after, *before))
        ids = launch.submit()
        before = sorted({job_id.split("_")[0] for job_id in ids})
        what = f"{launch.job.kind} {launch.job.name}"
        print(f"submitted {before[0]}: {what}, {_size(launch)}, into {launch.folder}", flush=True)
    return before


def _size(launch: Launch) -> str:
    size = f"{launch.num_nodes} node{'s' * (launch.num_nodes > 1)} x {launch.ranks_per_node} ranks"
    return f"{len(launch.job.parts)} jobs of {size}" if launch.job.parts else size


def describe(launch: Launch) -> list[str]:
    """Text of a dry run."""
    job: Job = launch.job
    return [
        f"# {job.kind} {job.name}: {_size(launch)}",
        f"# records, logs and the copy of the code: {launch.folder}",
        "",
        launch.script(),
        "# " + " ".join(["environment of every rank:", *launch.environment()]),
        f"# what the {launch.num_ranks} ranks run (MASTER_PORT is the job's):",
        *launch.rank_lines(),
        "",
    ]


def interval_steps(run: TrainingRun) -> int | None:
    """Steps between two resume states; None if an epoch's length is unknown."""
    match = re.fullmatch(r"(\d+)(ep|ba)", run.checkpoint.interval)
    if match is None:
        return None
    count, unit = int(match[1]), match[2]
    if unit == "ba":
        return count
    samples = run.data.num_samples
    return count * (samples // run.train.global_batch_size) if samples is not None else None


def check_save_interval(launch: Launch, seconds_per_step: float | None) -> None:
    """Refuse a time limit in which no resume state would be written by itself.

    A job that is warned saves at once; one whose node dies loses what came after its last state,
    and would never get anywhere. How long a step takes is told, or known from the run's own log;
    otherwise nothing can be said.

    Raises: ConfigError.
    """
    run = launch.job.run
    if run is None:
        return
    if seconds_per_step is None:
        speed = last_speed(launch.folder)
        seconds_per_step = 1 / speed if speed else None
    elif not 0 < seconds_per_step < math.inf:
        raise ConfigError(f"--seconds-per-step: {seconds_per_step} must be a finite number above 0")
    steps = interval_steps(run)
    if seconds_per_step is None or steps is None:
        return
    between, limit = steps * seconds_per_step, minutes(launch.cluster.time) * 60
    if limit < between + launch.cluster.grace_seconds:
        raise ConfigError(
            f"--time: {launch.cluster.time} is shorter than the {between / 60:.0f} minutes between "
            f"two resume states (checkpoint.interval={run.checkpoint.interval}, {steps:,} steps of "
            f"{seconds_per_step:.3g} s) plus {launch.cluster.grace_seconds} s of grace; ask for "
            "more time, or lower checkpoint.interval"
        )


def refuse_live(launch: Launch, take_over: bool) -> Launch:
    """Look for a live job that writes the same, and refuse it or end it.

    With `take_over` the live job is ended, and the new one starts when it is gone.

    Raises: SubmissionError if there is one, or without Slurm.
    """
    try:
        live = _live(launch)
        if live and not take_over:
            jobs = ", ".join(f"{job.job_id} ({job.state}, {job.nodes})" for job in live)
            raise SubmissionError(
                f"{launch.job.name}: a live job has this name or writes {launch.job.out}: {jobs}. "
                "Two of them would write one run; wait for it, choose another run_name and out, or "
                "give --take-over to end it and go on from its last state"
            )
        for job in live:
            scheduler.cancel(job.job_id)
    except scheduler.SlurmError as error:
        raise SubmissionError(
            f"{error}; submit from a login node, or look at the job with --dry-run"
        ) from error
    return replace(launch, after_any=tuple(job.job_id for job in live))


def _live(launch: Launch) -> list[scheduler.LiveJob]:
    """Jobs that wait or run: of the run's name, or launched for what this one makes."""
    own = scheduler.live_jobs()
    launched = {
        job_id.split("_")[0]
        for folder in launch_folders(launch.folder)
        for job_id in json.loads((folder / LAUNCH_NAME).read_text())["job_ids"]
    }
    return [
        job
        for job in own
        if job.state != "COMPLETING"
        and (
            job.job_id.split("_")[0] in launched
            or (launch.job.run is not None and job.name == launch.job.name)
        )
    ]
