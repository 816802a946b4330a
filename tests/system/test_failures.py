"""A rank that fails or dies ends the whole job soon, and the first cause is on top.

Under composer's launcher: it tells the others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time

import psutil
from small_pipeline import ROOT, composer, run_command

TRAIN = "lgm_scale/train.py"
SECONDS = 240  # on a busy machine; without a look at the others, `parallel.timeout_seconds` = 300


def test_the_first_failing_rank_is_on_top(small_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTURB", "bug")
    config = small_pipeline.generator_config(tmp_path / "bug")
    result = run_command("tests/system/disturbed_train.py", config, ranks=2, fresh=True)
    assert result.returncode == 1
    said = result.stderr + result.stdout
    top = said.index("rank 1 failed first:")
    assert "ZeroDivisionError: a bug in rank 1" in said[top:]
    assert said.index("Traceback") > top
    assert said.index("ZeroDivisionError") < said.index("rank 0 then failed as well")
    assert len(list((tmp_path / "bug" / "failures").iterdir())) == 2


def test_a_killed_rank_ends_the_job(small_pipeline, tmp_path):
    out = tmp_path / "dead"
    config = small_pipeline.generator_config(
        out,
        train={"max_duration": "100000ba", "global_batch_size": 8, "precision": "fp32"},
        logging={"interval": 1, "progress_bar": False},
    )
    job = subprocess.Popen(
        [composer(), "-n", "2", TRAIN, str(config)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 800
    while not (out / "metrics.jsonl").exists():
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = {
        process.environ().get("RANK"): process
        for process in psutil.Process(job.pid).children()
        if "train.py" in " ".join(process.cmdline())
    }
    os.kill(ranks["1"].pid, signal.SIGKILL)
    killed = time.monotonic()
    said, _ = job.communicate(timeout=SECONDS)
    assert time.monotonic() - killed < SECONDS
    assert job.returncode != 0
    assert "no other rank has left a traceback" in said
    assert not any(process.is_running() for process in ranks.values())
