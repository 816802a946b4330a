"""Launches in a row: what a dry run prints of them, and their submission."""

from __future__ import annotations

import json
from dataclasses import replace

from launchers import scheduler
from launchers.jobs import Job
from launchers.launch import Launch, SubmissionError
from launchers.run_log import LAUNCH_NAME, launch_folders

__all__ = ["describe", "refuse_live", "submit", "with_join"]


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


def refuse_live(launch: Launch, take_over: bool) -> Launch:
    """Look for a live job that writes the same, and refuse it or end it.

    Args:
        launch: The job to be submitted.
        take_over: End the live job; the new one starts when it is gone.

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
