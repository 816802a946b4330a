"""Runs under the launchers of docs/cloud.md, on machines whose disks are lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from small_pipeline import ROOT, metrics

BIN = Path(sys.executable).parent
STEPS = 150

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


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(launcher: list[str], config: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [str(BIN / launcher[0]), *launcher[1:], "lgm_scale/train.py", str(config), *overrides],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
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
    whole = start(
        ["torchrun", "--nproc-per-node=2", f"--master-port={free_port()}"],
        config, f"out={tmp_path}/whole",
    )  # fmt: skip
    text, _ = whole.communicate(timeout=180)
    assert whole.returncode == 0, text

    # A machine under composer, which is told that it will be taken away.
    common = [f"checkpoint.folder={bucket}/cloud"]
    machine = start(["composer", "-n", "2"], config, f"out={tmp_path}/first", *common)
    log = tmp_path / "first" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 10:
        assert machine.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    machine.send_signal(signal.SIGTERM)
    text, _ = machine.communicate(timeout=60)
    assert machine.returncode == 75, text
    stopped_at = len(log.read_text().splitlines())
    assert 10 <= stopped_at < STEPS

    # Another machine, with an empty disk.
    last = start(["composer", "-n", "2"], config, f"out={tmp_path}/second", *common)
    text, _ = last.communicate(timeout=180)
    assert last.returncode == 0, text
    assert f"resumed after step {stopped_at}" in text
    rows = metrics(tmp_path / "second")
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert [row["loss"] for row in rows] == [row["loss"] for row in metrics(tmp_path / "whole")]
    assert (tmp_path / "second" / "bundle" / "bundle.json").is_file()

    # And one more, after the end: everything is in the bucket.
    late = start(["python"], config, f"out={tmp_path}/third", *common)
    text, _ = late.communicate(timeout=180)
    assert late.returncode == 0, text
    assert "is finished" in text
    assert (tmp_path / "third" / "bundle" / "bundle.json").is_file()
