"""A run on machines that are taken away, and their disks with them.

Under composer's launcher, whose ranks are forked from it. Real interpreters under composer and
torchrun: `slurm/test_training_jobs.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from disturbed_train import LAUNCH, TAKEN_STEP
from forked_commands import fork_ranks
from moto.server import ThreadedMotoServer
from small_pipeline import metrics, run_command

TRAIN = "lgm_scale/train.py"
STEPS = 20

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket; its server's address and keys are in the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "S3_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    boto3.client("s3", endpoint_url=settings["S3_ENDPOINT_URL"]).create_bucket(Bucket="runs")
    yield "s3://runs"
    server.stop()


def test_a_machine_is_taken_away_and_its_disk_with_it(
    small_pipeline, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
):
    config = small_pipeline.generator_config(
        small_pipeline.root / "cloud",
        train={"max_duration": f"{STEPS}ba", "global_batch_size": 8, "precision": "fp32"},
        data={"path": str(small_pipeline.latents), "num_workers": 1},
        logging={"interval": 1, "progress_bar": False},
        checkpoint={"interval": f"{STEPS}ba"},
    )
    whole = run_command(TRAIN, config, f"out={tmp_path}/whole", ranks=2)
    assert whole.returncode == 0, whole.stderr

    # A machine under composer, which is told that it will be taken away.
    common = [f"checkpoint.folder={bucket}/cloud"]
    monkeypatch.setenv("DISTURB", "taken")
    machine = run_command(*LAUNCH, config, f"out={tmp_path}/first", *common, prepare=fork_ranks)
    assert machine.returncode == 75, machine.stdout + machine.stderr
    stopped_at = len(metrics(tmp_path / "first"))
    assert TAKEN_STEP < stopped_at < STEPS

    # Another machine, with an empty disk.
    last = run_command(TRAIN, config, f"out={tmp_path}/second", *common, ranks=2)
    assert last.returncode == 0, last.stderr
    assert f"resumed after step {stopped_at}" in last.stdout + last.stderr
    rows = metrics(tmp_path / "second")
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert [row["loss"] for row in rows] == [row["loss"] for row in metrics(tmp_path / "whole")]
    assert (tmp_path / "second" / "bundle" / "bundle.json").is_file()

    # And one more, after the end: everything is in the bucket.
    late = run_command(TRAIN, config, f"out={tmp_path}/third", *common)
    assert late.returncode == 0, late.stderr
    assert "is finished" in late.stdout
    assert (tmp_path / "third" / "bundle" / "bundle.json").is_file()
