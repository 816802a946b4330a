"""The last command of every batch script: say how the job ended, and requeue it or not.

    python -m launchers.batch_end FOLDER STATUS [METRICS]

FOLDER is the launch's, STATUS is that of `srun`, METRICS the run's metrics.jsonl. The
message goes to the job's top-level log, with the traceback of the rank that failed first. The
exit status is what Slurm's accounting shows. Standard library only: it runs outside of containers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launchers import scheduler
from launchers.records import (
    STOPPED_STATUS,
    USER_ERROR_STATUS,
    RankEnd,
    Start,
    Starts,
    Verdict,
    last_step,
    rank_log,
)

FAILURES_AT_ONE_STEP = 3
FAILURES_WITHOUT_PROGRESS = 10
"""After so many in a row a job is given up."""


_START_MARK = "=== start "
_TRACEBACK = "Traceback (most recent call last):"
_USER_ERROR = "error: "
_MOST_LINES = 60


def main(argv: list[str]) -> int:
    """Judge the start that has just ended."""
    folder, status = Path(argv[0]), int(argv[1])
    metrics = Path(argv[2]) if len(argv) > 2 else None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    raw = os.environ["SLURM_JOB_ID"]
    job_id = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else raw
    starts = Starts(folder / job_id)
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if starts.superseded(restart):
        print("=== cut off, and replaced since ===", flush=True)
        return status
    history = starts.read()
    if not history or history[-1].restart != restart:
        history.append(Start(restart))
    if history[-1].verdict is not None:  # it was stopped, and is on its way
        return status
    try:
        if scheduler.state(job_id) != "RUNNING":  # cancelled, or requeued by Slurm itself
            return status
    except scheduler.SlurmError as error:
        print(f"=== Slurm does not answer: {error} ===", flush=True)
        return status
    verdict = judge(history, last_step(metrics), status)
    failure = history[-1].first_failure()
    _say(verdict, failure, folder, job_id)
    starts.judged(restart, verdict)
    if verdict.requeue:
        try:
            scheduler.requeue(job_id)
        except scheduler.SlurmError as error:
            print(f"=== cannot be requeued: {error} ===", flush=True)
    return failure.status if failure is not None and failure.status > 0 else status


def judge(history: list[Start], step: int | None, status: int) -> Verdict:
    """Decide what comes after a start that ended by itself, which is the last of `history`.

    `step` is None for a job without steps. `status`, that of the command that ran the ranks, counts
    if no rank left a record.
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


def _failed_steps(history: list[Start]) -> list[int | None]:
    """Steps of the failures since the last start that got further and was merely stopped.

    A start without a verdict (its node died with it) proves nothing and breaks no row.
    """
    steps: list[int | None] = []
    for start in history:
        verdict = start.verdict
        if verdict is None:
            continue
        if verdict.outcome == "failed":
            steps.append(verdict.step)
        elif steps and (verdict.step or 0) > (steps[-1] or 0):
            steps.clear()
    return steps


def _say(verdict: Verdict, failure: RankEnd | None, folder: Path, job_id: str) -> None:
    following = "starting again" if verdict.requeue else "not started again"
    if verdict.outcome == "done":
        print(f"=== {verdict.reason} ===", flush=True)
        return
    # Rank 0's words are in this log anyway, and a rank that was killed had none.
    if failure is not None and failure.rank != 0 and failure.status > 0:
        log = rank_log(folder, job_id, failure.rank)
        words, own = last_words(log), last_words(rank_log(folder, job_id), whole=True)
        head = words.split("\n")[0]
        if not (head.startswith(_USER_ERROR) and head in own):  # rank 0 has said so, too
            print(f"=== rank {failure.rank} on {failure.host} failed first; from {log}: ===")
            print(words)
    print(f"=== {verdict.outcome}: {verdict.reason}; {following} ===", flush=True)


def last_words(log: Path, whole: bool = False) -> str:
    """Why the last start in a rank's log ended: its error for the user, or its last traceback.

    Without either, its last lines; with `whole`, all lines of the start.
    """
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"({error})"
    starts = [number for number, line in enumerate(lines) if line.startswith(_START_MARK)]
    lines = lines[starts[-1] :] if starts else lines
    if whole:
        return "\n".join(lines)
    reasons = [
        number
        for number, line in enumerate(lines)
        if line.startswith(_USER_ERROR) or _TRACEBACK in line
    ]
    lines = lines[reasons[-1] :] if reasons else lines
    return "\n".join(lines[-_MOST_LINES:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
