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
from launchers.attempts import Attempt, Attempts, RankEnd, Verdict, judge, last_step

__all__ = ["last_words", "main"]

_START_MARK = "=== start "
_TRACEBACK = "Traceback (most recent call last):"
_USER_ERROR = "error: "
_MOST_LINES = 60


def main(argv: list[str]) -> int:
    """Judge the attempt that has just ended."""
    folder, status = Path(argv[0]), int(argv[1])
    metrics = Path(argv[2]) if len(argv) > 2 else None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    raw = os.environ["SLURM_JOB_ID"]
    job_id = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else raw
    attempts = Attempts(folder / job_id)
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if attempts.superseded(restart):
        print("=== cut off, and replaced since ===", flush=True)
        return status
    history = attempts.read()
    if not history or history[-1].restart != restart:
        history.append(Attempt(restart))
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
    attempts.judged(restart, verdict)
    if verdict.requeue:
        try:
            scheduler.requeue(job_id)
        except scheduler.SlurmError as error:
            print(f"=== cannot be requeued: {error} ===", flush=True)
    return failure.status if failure is not None and failure.status > 0 else status


def _say(verdict: Verdict, failure: RankEnd | None, folder: Path, job_id: str) -> None:
    following = "starting again" if verdict.requeue else "not started again"
    if verdict.outcome == "done":
        print(f"=== {verdict.reason} ===", flush=True)
        return
    # Rank 0's words are in this log anyway, and a rank that was killed had none.
    if failure is not None and failure.rank != 0 and failure.status > 0:
        log = folder / f"{job_id}_{failure.rank}_log.out"
        words, own = last_words(log), last_words(folder / f"{job_id}_0_log.out", whole=True)
        head = words.split("\n")[0]
        if not (head.startswith(_USER_ERROR) and head in own):  # rank 0 has said so, too
            print(f"=== rank {failure.rank} on {failure.host} failed first; from {log}: ===")
            print(words)
    print(f"=== {verdict.outcome}: {verdict.reason}; {following} ===", flush=True)


def last_words(log: Path, whole: bool = False) -> str:
    """Why the last attempt in a rank's log ended: its error for the user, or its last traceback.

    Without either, its last lines; with `whole`, all lines of the attempt.
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
