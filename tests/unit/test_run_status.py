"""What `launchers/status.py` tells from files alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launchers.records import Starts, Verdict
from launchers.status import status
from lgm_scale.errors import ConfigError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 100 steps in its second start, at step 60; no Slurm is installed."""
    monkeypatch.setenv("PATH", "/nowhere")
    run = tmp_path / "dit"
    launch = run / "slurm" / "20260101-000000-0"
    launch.mkdir(parents=True)
    values = {"kind": "train", "name": "dit", "ranks": 16, "job_ids": ["7"]}
    (launch / "launch.json").write_text(json.dumps(values))
    config = {
        "train": {"max_duration": "2ep", "global_batch_size": 8},
        "data": {"num_samples": 407},
        "checkpoint": {"folder": None},
    }
    (run / "config.json").write_text(json.dumps(config))
    rows = [{"step": s, "num_tokens": [8, 64][s % 2], "loss": 1 - s / 100} for s in range(60)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (launch / "7_0_log.out").write_text(
        "=== start 0 ===\n12:00:00 rank 0 step 60 | loss at K=8: 0.5 | 0.50 steps/s\nlast line\n"
    )
    starts = Starts(launch / "7")
    starts.started(0, ["n1", "n2"])
    starts.judged(0, Verdict("failed", "rank 3 on n2 ended first: signal 9", True, step=40))
    starts.started(1, ["n1", "n5"])
    for step in (40, 50):
        (run / "state" / f"ba{step:08d}-a0001").mkdir(parents=True)
    (run / "state" / "ba00000040-a0001" / "manifest.json").write_text("{}")  # 50 is unfinished
    return run


def lines(run: Path) -> dict[str, str]:
    told = [line for line in status(run) if not line.startswith(" ")]
    return {line.split()[0]: " ".join(line.split()[1:]) for line in told}


def test_a_running_job(run: Path):
    told = lines(run)
    assert told["job"] == "train dit: 16 ranks"
    assert told["state"].startswith("started (from records: sacct is not installed here)")
    assert told["restarts"] == "1"
    assert told["step"] == "60 of 100 (60.0%)"
    assert told["speed"] == "0.5 steps/s, 4 images/s"
    assert told["loss"].startswith("K=8: 0.6600 K=64: 0.6500")
    assert told["time"].startswith("left 00:01:20 of computing")
    assert told["saved"].startswith("step 40, ")
    text = "\n".join(status(run, lines=1))
    assert "n1,n2  failed at step 40: rank 3 on n2 ended first: signal 9" in text
    assert "n1,n5  no end recorded" in text
    assert "| last line" in text
    assert "| === start" not in text


def test_a_finished_run(run: Path):
    (run / "bundle").mkdir()
    (run / "bundle" / "bundle.json").write_text("{}")
    assert lines(run)["result"].endswith("bundle: finished")
    assert not any(line.startswith("time left") for line in status(run))


def test_a_run_that_another_launcher_started(run: Path):
    (run / "slurm").rename(run.parent / "elsewhere")
    attempts = run / "state" / "attempts"
    attempts.mkdir()
    for number, step in ((1, 0), (2, 40)):
        record = {"number": number, "resumed_step": step, "host": f"h{number}", "started": 1e9}
        (attempts / f"{number:04d}.json").write_text(json.dumps(record))
    text = "\n".join(status(run))
    assert "restarts   1" in text
    assert "h2  from step 40" in text


def test_the_tail_of_a_large_log_is_enough(run: Path):
    log = run / "metrics.jsonl"
    log.write_text("x" * 300_000 + "\n" + log.read_text() + '{"step": 60, "num_to')
    assert lines(run)["step"] == "60 of 100 (60.0%)"


def test_no_run_is_no_run(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no run"):
        status(tmp_path)
    assert not os.listdir(tmp_path)
