"""A sweep split over an array of jobs: the same table as one process, each chunk counted once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from desk import Desk
from small_pipeline import random_generator

pytestmark = [pytest.mark.servers, pytest.mark.system, pytest.mark.slow]


def test_an_array_with_a_kill_gives_the_table_of_one_process(desk: Desk):
    small = desk.pipeline
    common = [
        *(f"bundle={random_generator(small)}", f"images={small.images}", "num_images=204"),
        *("cells=[{num_tokens: [4, 8, 16]}]", "chunk_size=17", "batch_size=17", "num_components=8"),
        *("sampler.cfg_rescale=none", "metrics_log=null", "commands=[]"),
    ]
    config = "yamls/quickstart/sweep.yaml"
    alone = desk.folder / "runs" / "alone"
    result = subprocess.run(
        [sys.executable, "eval/sweep.py", config, *common, f"out={alone}"],
        cwd=desk.folder,
        env=os.environ | {"PYTHONPATH": str(desk.folder)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr
    job = desk.submit(
        "runs/array",
        *("--job", "eval", "--config", config, "--array", "3", "--gpus-per-node", "1"),
        *(*common, "out=runs/array"),
    )
    array, join = job.ids
    second = f"{array}_1"
    job.until(lambda: job.state(second) == "RUNNING", "start")
    chunks = job.out / "chunks"
    job.until(lambda: chunks.is_dir() and any(chunks.rglob("*.safetensors")), "make a chunk")
    working = [pid for node in desk.cluster.nodes for pid in desk.processes(node, b"part=1/3")]
    os.kill(working[0], signal.SIGKILL)
    job.until(lambda: job.state(join) in ("COMPLETED", "FAILED", "CANCELLED"), "be joined", 180)
    assert job.state(join) == "COMPLETED", job.log(job_id=second) + job.log(job_id=join)
    assert "starting again" in job.log(job_id=second)
    tables = [json.loads((out / "results.json").read_text()) for out in (alone, job.out)]
    assert [len(table["rows"]) for table in tables] == [3, 3]
    assert tables[0]["rows"] == tables[1]["rows"]
