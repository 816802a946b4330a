"""What launches leave behind: their description, the ranks' logs, and a record of every start.

Standard library only: it also runs at a job's end, outside of any container. Records are small
JSON files in `<job>/attempts/`, each written by one process and renamed into place:
`00002-start.json`, `00002-rank00005.json`, `00002-end.json`, for the job's third start. (What the
trainer itself notes of its starts, wherever it runs, is in `lgm_scale.checkpoint.attempts`.)
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LAUNCH_NAME = "launch.json"
USER_ERROR_STATUS = 2
STOPPED_STATUS = 75
"""A trainer that was asked to stop, and has saved (EX_TEMPFAIL of sysexits.h)."""
SPEED = re.compile(r"step (\d+) \| .*\| ([0-9.]+) steps/s")
"""The line in which a trainer reports an interval."""

_ENOUGH = 1 << 18  # bytes from the end of a log


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended. A negative status is a signal's number."""

    rank: int
    host: str
    status: int
    asked: str
    """Signal that had asked it to stop before, or nothing. Slurm asks ranks to stop when a job is
    preempted or cancelled, and when another rank has failed."""
    time: float


@dataclass(frozen=True)
class Verdict:
    """What came of a start: done, stopped, failed or wrong; and what is next."""

    outcome: str
    reason: str
    requeue: bool
    step: int | None = None
    """Steps known to be done when it ended; None where a job has no steps."""
    time: float = 0.0


@dataclass
class Start:
    """One start of a job."""

    restart: int
    nodes: list[str] = field(default_factory=list)
    time: float = 0.0
    ends: list[RankEnd] = field(default_factory=list)
    """How its ranks ended, in the order in which they did."""
    verdict: Verdict | None = None

    def first_failure(self) -> RankEnd | None:
        """The rank whose end brought the others down."""
        failed = [end for end in self.ends if end.status not in (0, STOPPED_STATUS)]
        failed = [end for end in failed if not end.asked or end.status == USER_ERROR_STATUS]
        return failed[0] if failed else None


class Starts:
    """The records of one job, below its folder."""

    def __init__(self, job_folder: Path) -> None:
        self.folder = job_folder / "attempts"  # its name on disk

    def started(self, restart: int, nodes: list[str]) -> None:
        """Note a start; rank 0 calls it."""
        self._write(f"{restart:05d}-start.json", {"nodes": nodes, "time": time.time()})

    def rank_ended(self, restart: int, rank: int, host: str, status: int, asked: str) -> None:
        """Note a rank's end; the process that started the rank calls it."""
        end = RankEnd(rank, host, status, asked, time.time())
        self._write(f"{restart:05d}-rank{rank:05d}.json", asdict(end))

    def judged(self, restart: int, verdict: Verdict) -> None:
        """Note what came of a start."""
        self._write(f"{restart:05d}-end.json", asdict(verdict) | {"time": time.time()})

    def superseded(self, restart: int) -> bool:
        """Whether the job has started again since: whoever asks was cut off, and is late."""
        starts = [int(path.name.split("-")[0]) for path in self.folder.glob("[0-9]*-start.json")]
        return max(starts, default=0) > restart

    def read(self) -> list[Start]:
        """All starts so far, in order."""
        found: dict[int, Start] = {}
        for path in sorted(self.folder.glob("[0-9]*.json")):
            restart, kind = path.stem.split("-", 1)
            start = found.setdefault(int(restart), Start(int(restart)))
            values = json.loads(path.read_text())
            if kind == "start":
                start.nodes, start.time = values["nodes"], values["time"]
            elif kind == "end":
                start.verdict = Verdict(**values)
            else:
                start.ends.append(RankEnd(**values))
        for start in found.values():
            start.ends.sort(key=lambda end: end.time)
        return [found[restart] for restart in sorted(found)]

    def _write(self, name: str, values: dict[str, Any]) -> None:
        # Not `storage.files.write_whole`: a host that runs the end of a job needs this folder and
        # Python, no more. One process writes each name, so that none meets another's file.
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{name}.partial"
        aside.write_text(json.dumps(values) + "\n")
        aside.replace(self.folder / name)


def last_step(metrics: Path | None) -> int | None:
    """Steps that a run's metrics.jsonl knows to be done; None for a job without one."""
    if metrics is None:
        return None
    for line in reversed(tail(metrics)):
        try:
            return int(json.loads(line)["step"]) + 1
        except (ValueError, KeyError, TypeError):  # torn by a kill
            continue
    return 0


def launch_folders(folder: Path) -> list[Path]:
    """Folders of the launches of a run, oldest first."""
    return sorted(path.parent for path in folder.glob(f"*/{LAUNCH_NAME}"))


def rank_log(launch_folder: Path, job_id: str, rank: int = 0) -> Path:
    """The log of a rank; in that of rank 0 the end of the job is told, too."""
    return launch_folder / f"{job_id}_{rank}_log.out"


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
