"""What a run's own logs say about its speed."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["LAUNCH_NAME", "SPEED", "last_speed", "launch_folders", "tail", "top_log"]

LAUNCH_NAME = "launch.json"

SPEED = re.compile(r"step (\d+) \| .*\| ([0-9.]+) steps/s")
_ENOUGH = 1 << 18  # bytes from the end of a log


def launch_folders(folder: Path) -> list[Path]:
    """Folders of the launches of a run, oldest first."""
    return sorted(path.parent for path in folder.glob(f"*/{LAUNCH_NAME}"))


def top_log(launch_folder: Path, job_id: str) -> Path:
    """The log of rank 0, where the end of a job is told too."""
    return launch_folder / f"{job_id}_0_log.out"


def tail(path: Path) -> list[str]:
    """Last lines of a log; none if it is not there. Bars that overwrite themselves are cut."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _ENOUGH))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rsplit("\r", 1)[-1] for line in text.split("\n")]


def last_speed(folder: Path) -> float | None:
    """Steps per second of the last interval that any job of a run reported."""
    for launch in reversed(launch_folders(folder)):
        for log in sorted(launch.glob("*_0_log.out"), reverse=True):
            for line in reversed(tail(log)):
                match = SPEED.search(line)
                if match is not None and float(match[2]) > 0:
                    return float(match[2])
    return None
