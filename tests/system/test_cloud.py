"""Runs under the launchers of docs/cloud.md, on machines whose disks are lost.

torchrun, composer and the interpreters that they start are the real ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from disturbed_train import TAKEN_STEP
from moto.server import ThreadedMotoServer
from ports import meeting_port
from small_pipeline import ROOT, metrics, run_command

BIN = Path(sys.executable).parent
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


def launch(launcher: list[str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / launcher[0]), *launcher[1:], *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=800,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DISTURB": "taken"}, check=False,
    )  # fmt: skip


def test_a_machine_is_taken_away_and_its_disk_with_it(small_pipeline, tmp_path: Path, bucket: str):
    config = small_pipeline.generator_config(
        small_pipeline.root / "cloud",
        train={"max_duration": f"{STEPS}ba", "global_batch_size": 8, "precision": "fp32"},
        data={"path": str(small_pipeline.latents), "num_workers": 1},
        logging={"interval": 1, "progress_bar": False},
        checkpoint={"interval": f"{STEPS}ba"},
    )
    # Undisturbed, as one machine under torchrun.
    torchrun = ["torchrun", "--nproc-per-node=2", f"--master-port={meeting_port()}"]
    whole = launch(torchrun, TRAIN, config, f"out={tmp_path}/whole")
    assert whole.returncode == 0, whole.stdout

    # A machine under composer, which is told that it will be taken away.
    common = [f"checkpoint.folder={bucket}/cloud"]
    program, out = "tests/system/disturbed_train.py", f"out={tmp_path}/first"
    machine = launch(["composer", "-n", "2"], program, config, out, *common)
    assert machine.returncode == 75, machine.stdout
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
