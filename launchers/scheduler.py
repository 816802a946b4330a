"""Slurm's own commands, and what they say. Standard library only: it also runs at a job's end."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from dataclasses import dataclass


class SlurmError(Exception):
    """A command of Slurm that is missing or failed, with its own words."""


@dataclass(frozen=True)
class LiveJob:
    """A job that waits or runs."""

    job_id: str
    name: str
    state: str
    nodes: str
    """Node list, or the reason why it waits."""


@dataclass(frozen=True)
class Accounted:
    """One stretch of a job, as the accounting data base keeps it."""

    state: str
    nodes: str
    start: str
    end: str
    exit_code: str
    """`STATUS:SIGNAL`."""


def _run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]} is not installed here")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        words = result.stderr.strip() or result.stdout.strip()
        raise SlurmError(f"{command[0]}: {words or f'status {result.returncode}'}")
    return result.stdout


def live_jobs(job_id: str | None = None) -> list[LiveJob]:
    """Jobs that wait, run or end: one, or all of this user. Raises: SlurmError."""
    which = f"--jobs={job_id}" if job_id is not None else f"--user={getpass.getuser()}"
    command = ["squeue", "--noheader", "--format=%i|%j|%T|%R", which]
    try:
        lines = _run(*command).splitlines()
    except SlurmError as error:
        if job_id is not None and "Invalid job id" in str(error):  # forgotten: ended long ago
            return []
        raise
    return [LiveJob(*line.split("|", 3)) for line in lines if line.count("|") >= 3]


def state(job_id: str) -> str | None:
    """RUNNING, COMPLETING, ... or None for a job that Slurm's controller has forgotten."""
    found = live_jobs(job_id)
    return found[0].state if found else None


def accounting(job_id: str) -> list[Accounted]:
    """Every stretch of a job, oldest first. Raises: SlurmError where there is no sacct."""
    fields = "State,NodeList,Start,End,ExitCode"
    text = _run(
        *("sacct", "--allocations", "--duplicates", "--noheader", "--parsable2"),
        *(f"--jobs={job_id}", f"--format={fields}"),
    )
    stretches = [Accounted(*line.split("|")) for line in text.splitlines() if line.count("|") == 4]
    return sorted(stretches, key=lambda item: (item.start == "Unknown", item.start))


def cancel(job_id: str) -> None:
    """End a job for good. Raises: SlurmError."""
    _run("scancel", job_id)


def requeue(job_id: str) -> None:
    """Let a job start again from its beginning. Raises: SlurmError."""
    _run("scontrol", "requeue", job_id)
