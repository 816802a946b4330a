"""What is known of a job's starts, and when a job is given up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launchers.batch_end import FAILURES_WITHOUT_PROGRESS, judge, last_words
from launchers.records import RankEnd, Start, Starts, Verdict, last_step


def ended(*ends: tuple[int, str], restart: int = 0) -> Start:
    """A start whose ranks ended in this order, each with (status, signal that asked it)."""
    ranks = [
        RankEnd(rank, f"n{rank}", status, asked, time=rank)
        for rank, (status, asked) in enumerate(ends)
    ]
    return Start(restart, ["n0", "n1"], 0.0, ranks)


def failed(*steps: int | None) -> list[Start]:
    """Starts that failed after these steps."""
    return [
        Start(index, verdict=Verdict("failed", "", requeue=True, step=step))
        for index, step in enumerate(steps)
    ]


@pytest.mark.parametrize(
    ("ends", "outcome", "requeue"),
    [
        ([(0, ""), (0, "")], "done", False),
        ([(75, "SIGUSR2"), (75, "SIGUSR2")], "stopped", True),
        ([(75, ""), (75, "")], "stopped", True),  # asked behind Slurm's back
        ([(-12, "SIGUSR2"), (-12, "SIGUSR2")], "stopped", True),  # a tool, which cannot save
        ([(1, ""), (-15, "SIGTERM")], "failed", True),  # Slurm ended the second for the first
        ([(-9, ""), (1, "")], "failed", True),
        ([(2, ""), (-15, "SIGTERM")], "wrong", False),
        ([(2, "SIGTERM"), (75, "SIGTERM")], "wrong", False),
    ],
)
def test_what_comes_after_an_end(ends, outcome, requeue):
    status = 0 if all(status == 0 for status, _ in ends) else 1
    verdict = judge([ended(*ends)], 10, status)
    assert (verdict.outcome, verdict.requeue) == (outcome, requeue)


def test_a_stop_before_saving_says_so():
    assert "before it had saved" in judge([ended((1, "SIGTERM"))], 10, 1).reason
    assert "state saved" in judge([ended((75, "SIGTERM"))], 10, 75).reason


def test_a_failure_without_any_record_counts():
    verdict = judge([Start(0)], 10, 137)
    assert verdict.outcome == "failed"
    assert "status 137" in verdict.reason


def test_three_failures_at_one_step_end_it():
    now = ended((1, ""))
    assert judge([*failed(20), now], 20, 1).requeue
    last = judge([*failed(20, 20), now], 20, 1)
    assert not last.requeue
    assert "3 failures in a row after step 20" in last.reason
    assert judge([*failed(20, 30), now], 20, 1).requeue
    assert not judge([*failed(None, None), now], None, 1).requeue  # a tool has no steps


def test_only_progress_breaks_a_row_of_failures():
    now = ended((1, ""))
    stopped = [Start(9, verdict=Verdict("stopped", "", requeue=True, step=20))]
    assert not judge([*failed(20, 20), *stopped, now], 20, 1).requeue
    further = [Start(9, verdict=Verdict("stopped", "", requeue=True, step=21))]
    assert judge([*failed(20, 20), *further, now], 20, 1).requeue
    lost = [Start(9)]  # its node died with it: no verdict
    assert not judge([*failed(20, 20), *lost, now], 20, 1).requeue


def test_failures_that_never_get_further_end_it():
    now = ended((1, ""))
    wandering = [100, *[10 + index % 2 for index in range(FAILURES_WITHOUT_PROGRESS - 1)]]
    assert judge([*failed(*wandering), now], 12, 1).requeue is False
    assert judge([*failed(*wandering), now], 101, 1).requeue


def test_records_survive_and_keep_their_order(tmp_path: Path):
    starts = Starts(tmp_path)
    assert starts.read() == []
    starts.started(0, ["n1", "n2"])
    starts.rank_ended(0, 1, "n2", -9, "")
    starts.rank_ended(0, 0, "n1", 1, "")
    starts.judged(0, Verdict("failed", "why", requeue=True, step=7))
    assert not starts.superseded(0)
    starts.started(1, ["n1", "n3"])
    assert starts.superseded(0)
    first, second = Starts(tmp_path).read()
    assert first.nodes == ["n1", "n2"]
    failure = first.first_failure()
    assert failure is not None
    assert (failure.rank, failure.status) == (1, -9)  # the earliest, not the lowest rank
    assert first.verdict is not None
    assert first.verdict.step == 7
    assert (second.restart, second.verdict) == (1, None)


def test_the_last_step_is_found_behind_a_torn_line(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    assert last_step(None) is None
    assert last_step(log) == 0
    log.write_text(json.dumps({"step": 41}) + "\n" + '{"step": 4')
    assert last_step(log) == 42


def test_last_words_are_the_last_starts_traceback(tmp_path: Path):
    log = tmp_path / "log"
    trace = "Traceback (most recent call last):\n  File x\n"
    log.write_text(f"=== start 0\n{trace}Old: no\n=== start 1\nstep 1\n{trace}New: yes\nbye\n")
    assert last_words(log) == f"{trace}New: yes\nbye"
    log.write_text(f"=== start 0\n{trace}Old: no\n=== start 1\nkilled\n")
    assert last_words(log) == "=== start 1\nkilled"
    log.write_text("=== start 0\nstep 1\nerror: data.path: /x is missing\n  - mend it\n")
    assert last_words(log) == "error: data.path: /x is missing\n  - mend it"
    assert last_words(log) in last_words(log, whole=True)
    assert "No such file" in last_words(tmp_path / "missing")
