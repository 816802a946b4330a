"""A Slurm for the tests of this folder, and a checkout to submit from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from desk import CONFIG, Desk, copy_checkout
from slurm_packages import obstacle
from small_pipeline import SmallPipeline, metrics, run_command
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
def checkout(
    cluster: VirtualCluster,
    small_pipeline: SmallPipeline,
    tmp_path_factory: pytest.TempPathFactory,
) -> Desk:
    """A checkout to submit from."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_checkout(folder)
    return Desk(cluster, folder, small_pipeline)


@pytest.fixture
def desk(checkout: Desk) -> Desk:
    """The checkout, without runs, before idle nodes: whatever the test before did or left."""
    checkout.clear()
    return checkout


@pytest.fixture(scope="session")
def undisturbed(checkout: Desk, small_pipeline: SmallPipeline) -> list[float]:
    """Losses of the same run on two ranks, without Slurm."""
    out = small_pipeline.root / "without-slurm"
    changes = checkout.overrides(str(out), "run_name=undisturbed")
    result = run_command("lgm_scale/train.py", CONFIG, *changes, ranks=2)
    assert result.returncode == 0, result.stderr
    return [row["loss"] for row in metrics(out)]
