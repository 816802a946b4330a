"""A sweep split over an array of jobs: the same table as one process, each chunk counted once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from desk import HELD, Desk
from small_pipeline import run_command
from small_sweep import make_sweep_inputs, numbers_of, results_of, sweep_file

pytestmark = [pytest.mark.servers, pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_an_array_with_a_kill_gives_the_table_of_one_process(desk: Desk, tmp_path: Path):
    made = make_sweep_inputs(tmp_path)
    alone = tmp_path / "alone"
    config = sweep_file(made, alone, num_images=240, chunk_size=20, batch_size=20)
    result = run_command("eval/sweep.py", config)
    assert result.returncode == 0, result.stderr
    part = desk.folder / HELD / "part"
    part.touch()
    job = desk.submit(
        "runs/array",
        *("--job", "eval", "--config", str(config), "--array", "2", "--gpus-per-node", "1"),
        "out=runs/array",
    )
    array, join = job.ids
    second = f"{array}_1"
    working: list[int] = []

    def makes_chunks() -> bool:
        nodes = desk.cluster.nodes
        working[:] = [pid for node in nodes for pid in desk.processes(node, b"part=1/2")]
        return bool(working) and any((job.out / "chunks").rglob("*.safetensors"))

    job.until(makes_chunks, "make a chunk")
    os.kill(working[0], signal.SIGKILL)
    part.unlink()
    job.until(lambda: job.state(join) in ("COMPLETED", "FAILED", "CANCELLED"), "be joined")
    killed = job.log(job_id=second)
    assert job.state(join) == "COMPLETED", killed + job.log(job_id=join)
    assert "rank 0 on" in killed
    assert "ended first: signal 9; starting again" in killed
    assert numbers_of(job.out) == numbers_of(alone)
    assert [row["cell"]["num_tokens"] for row in results_of(job.out)["rows"]] == [4, 9, 16]
    status = desk.status(job.out)
    assert "eval-array-join: 1 ranks" in status
