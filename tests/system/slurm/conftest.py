"""A Slurm for the tests of this folder, and a checkout to submit from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import CONFIG, Desk, copy_checkout
from slurm_packages import obstacle
from small_pipeline import SmallPipeline, metrics
from virtual_cluster import VirtualCluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[VirtualCluster]:
    """Four nodes with two GPUs each; skips where that is not possible."""
    reason = obstacle()
    if reason is not None:
        pytest.skip(reason)
    with VirtualCluster(4) as running:
        yield running


@pytest.fixture(scope="session")
def desk(
    cluster: VirtualCluster,
    small_pipeline: SmallPipeline,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Desk]:
    """A checkout to submit from."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_checkout(folder)
    yield Desk(cluster, folder, small_pipeline)
    for pid in [pid for node in cluster.nodes for pid in cluster.processes_on(node)]:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"submitit" in command:  # a failed test's
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def undisturbed(desk: Desk, small_pipeline: SmallPipeline) -> list[float]:
    """Losses of the same run with `composer -n 2`, on one node and without Slurm."""
    out = small_pipeline.root / "composer"
    launcher = [str(Path(sys.executable).with_name("composer")), "-n", "2"]
    result = subprocess.run(
        [*launcher, "lgm_scale/train.py", CONFIG, *desk.overrides(str(out), "run_name=composer")],
        cwd=desk.folder,
        env=os.environ | {"PYTHONPATH": str(desk.folder)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr
    return [row["loss"] for row in metrics(out)]
