"""Whether a stretch of a job is long enough to keep what it does."""

from __future__ import annotations

import re

from launchers.cluster import minutes
from launchers.launch import Launch
from launchers.run_log import last_speed
from lgm_scale.config.schema import TrainingRun
from lgm_scale.errors import ConfigError

__all__ = ["check_save_interval", "interval_steps"]


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
    elif seconds_per_step <= 0:
        raise ConfigError(f"--seconds-per-step: {seconds_per_step} must be above 0")
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
