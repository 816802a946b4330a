"""What happened to a job: one record per start, per rank's end and per verdict.

Standard library only: it also runs at a job's end, outside of any container. Records are small
JSON files in `<job>/attempts/`, each written by one process and renamed into place:
`00002-start.json`, `00002-rank00005.json`, `00002-end.json`, for the job's third start.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "FAILURES_AT_ONE_STEP",
    "FAILURES_WITHOUT_PROGRESS",
    "STOPPED_STATUS",
    "USER_ERROR_STATUS",
    "Attempt",
    "Attempts",
    "RankEnd",
    "Verdict",
    "judge",
    "last_step",
]

USER_ERROR_STATUS = 2
STOPPED_STATUS = 75
"""A trainer that was asked to stop, and has saved (EX_TEMPFAIL of sysexits.h)."""

FAILURES_AT_ONE_STEP = 3
FAILURES_WITHOUT_PROGRESS = 10


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
    """What came of an attempt: done, stopped, failed or wrong; and what is next."""

    outcome: str
    reason: str
    requeue: bool
    step: int | None = None
    """Steps known to be done when it ended; None where a job has no steps."""
    time: float = 0.0


@dataclass
class Attempt:
    """One start of a job."""

    restart: int
    nodes: list[str] = field(default_factory=list)
    time: float = 0.0
    ends: list[RankEnd] = field(default_factory=list)
    """In the order in which ranks ended."""
    verdict: Verdict | None = None

    def first_failure(self) -> RankEnd | None:
        """The rank whose end brought the others down."""
        failed = [end for end in self.ends if end.status not in (0, STOPPED_STATUS)]
        failed = [end for end in failed if not end.asked or end.status == USER_ERROR_STATUS]
        return failed[0] if failed else None


class Attempts:
    """The records of one job."""

    def __init__(self, job_folder: Path) -> None:
        self.folder = job_folder / "attempts"

    def started(self, restart: int, nodes: list[str]) -> None:
        """Note a start; by rank 0."""
        self._write(f"{restart:05d}-start.json", {"nodes": nodes, "time": time.time()})

    def rank_ended(self, restart: int, rank: int, host: str, status: int, asked: str) -> None:
        """Note a rank's end; by what started it."""
        end = RankEnd(rank, host, status, asked, time.time())
        self._write(f"{restart:05d}-rank{rank:05d}.json", asdict(end))

    def judged(self, restart: int, verdict: Verdict) -> None:
        """Note what came of it."""
        self._write(f"{restart:05d}-end.json", asdict(verdict) | {"time": time.time()})

    def superseded(self, restart: int) -> bool:
        """Whether the job has started again since: whoever asks was cut off, and is late."""
        starts = [int(path.name.split("-")[0]) for path in self.folder.glob("[0-9]*-start.json")]
        return max(starts, default=0) > restart

    def read(self) -> list[Attempt]:
        """All attempts, in order."""
        found: dict[int, Attempt] = {}
        for path in sorted(self.folder.glob("[0-9]*.json")):
            restart, kind = path.stem.split("-", 1)
            attempt = found.setdefault(int(restart), Attempt(int(restart)))
            values = json.loads(path.read_text())
            if kind == "start":
                attempt.nodes, attempt.time = values["nodes"], values["time"]
            elif kind == "end":
                attempt.verdict = Verdict(**values)
            else:
                attempt.ends.append(RankEnd(**values))
        for attempt in found.values():
            attempt.ends.sort(key=lambda end: end.time)
        return [found[restart] for restart in sorted(found)]

    def _write(self, name: str, values: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{name}.partial"
        aside.write_text(json.dumps(values) + "\n")
        aside.replace(self.folder / name)


def last_step(metrics: Path | None) -> int | None:
    """Steps that a run's metrics.jsonl knows to be done; None for a job without one."""
    if metrics is None:
        return None
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 65536))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"]) + 1
        except (ValueError, KeyError, TypeError):  # torn by a kill
            continue
    return 0


def judge(history: list[Attempt], step: int | None, status: int) -> Verdict:
    """Decide what comes after an attempt that ended by itself, which is the last of `history`.

    Args:
        history: All attempts so far, this one without a verdict.
        step: See `Verdict`.
        status: Of the command that ran the ranks, for the case that no rank left a record.
    """
    current = history[-1]
    failure = current.first_failure()
    if failure is None and status == 0:
        return Verdict("done", "finished", requeue=False, step=step)
    stopped = [end for end in current.ends if end.asked or end.status == STOPPED_STATUS]
    if failure is None and stopped:
        saved = all(end.status in (0, STOPPED_STATUS) for end in current.ends)
        asked = stopped[0].asked or "a signal"
        reason = f"{asked}, {'state saved' if saved else 'ended before it had saved'}"
        return Verdict("stopped", reason, requeue=True, step=step)
    if failure is None:
        what = f"the job's step ended with status {status}, and no rank left a record"
    elif failure.status == USER_ERROR_STATUS:
        reason = f"rank {failure.rank} on {failure.host}: status 2, the user must mend something"
        return Verdict("wrong", reason, requeue=False, step=step)
    else:
        end = f"signal {-failure.status}" if failure.status < 0 else f"status {failure.status}"
        what = f"rank {failure.rank} on {failure.host} ended first: {end}"
    steps = [*_failed_steps(history[:-1]), step]
    where = "" if step is None else f" after step {step}"
    same = steps[-FAILURES_AT_ONE_STEP:]
    if len(same) == FAILURES_AT_ONE_STEP and len(set(same)) == 1:
        reason = f"{what}; {FAILURES_AT_ONE_STEP} failures in a row{where}, giving up"
        return Verdict("failed", reason, requeue=False, step=step)
    best = max(range(len(steps)), key=lambda index: steps[index] or 0)  # the first of the best
    if len(steps) - best > FAILURES_WITHOUT_PROGRESS:
        reason = f"{what}; {FAILURES_WITHOUT_PROGRESS} failures without getting further, giving up"
        return Verdict("failed", reason, requeue=False, step=step)
    return Verdict("failed", f"{what}{where}", requeue=True, step=step)


def _failed_steps(history: list[Attempt]) -> list[int | None]:
    """Steps of the failures since the last attempt that got further and was merely stopped.

    A start without a verdict (its node died with it) proves nothing and breaks no row.
    """
    steps: list[int | None] = []
    for attempt in history:
        verdict = attempt.verdict
        if verdict is None:
            continue
        if verdict.outcome == "failed":
            steps.append(verdict.step)
        elif steps and (verdict.step or 0) > (steps[-1] or 0):
            steps.clear()
    return steps
