"""State in object storage: saved, resumed on a machine without the first one's disk, pruned."""

from __future__ import annotations

import json
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from rank_processes import die_at_step, run_ranks, start_ranks, wait_for
from safetensors.torch import load_file
from small_pipeline import assert_user_error, metrics, run_command

from lgm_scale.checkpoint.manifest import StateManifest

pytestmark = pytest.mark.servers

STEPS = 24


def config(pipeline, out: Path, folder: str | None) -> Path:
    return pipeline.generator_config(
        out,
        run_name="remote",
        train={"max_duration": f"{STEPS}ba", "global_batch_size": 8, "precision": "fp32"},
        checkpoint={"interval": "2ba", "keep": 2, "folder": folder},
        parallel={"strategy": "fsdp"},
        logging={"interval": 1, "progress_bar": False},
    )


def manifests(bucket) -> list[str]:
    return sorted(key for key in bucket.objects() if key.endswith("manifest.json"))


def test_a_run_survives_its_machine(small_pipeline, bucket, tmp_path):
    reference = tmp_path / "reference"
    run_ranks(2, [(config(small_pipeline, reference, None), [])], tmp_path / "reference-log")
    folder = f"{bucket.url}/runs/remote"
    first = tmp_path / "first"
    path = config(small_pipeline, first, folder)
    statuses = wait_for(
        start_ranks(2, [(path, [])], tmp_path / "first-log", partial(die_at_step, 9))
    )
    assert statuses[0] == -signal.SIGKILL
    assert len(manifests(bucket)) == 2
    shutil.rmtree(first)  # the machine is gone
    second = tmp_path / "second"
    path = config(small_pipeline, second, folder)
    damaged = manifests(bucket)[-1].replace("manifest.json", "rank-00001.safetensors")
    bucket.put(damaged, b"torn")
    run_ranks(2, [(path, [])], tmp_path / "second-log")
    told = (tmp_path / "second-log-0.txt").read_text()
    assert "is passed over: rank-00001.safetensors does not have its checksum" in told
    assert [row["loss"] for row in metrics(second)] == [row["loss"] for row in metrics(reference)]
    weights, expected = (
        load_file(run / "bundle" / "generator.safetensors") for run in (second, reference)
    )
    assert all((weights[name] == expected[name]).all() for name in expected)
    objects = bucket.objects()
    assert len(manifests(bucket)) == 2  # pruned there, too
    folders = {key.split("/")[2] for key in objects if key.split("/")[2].startswith("ba")}
    assert len(folders) == 2
    assert StateManifest.from_bytes(objects[manifests(bucket)[-1]]).step == STEPS
    assert objects["runs/remote/metrics.jsonl"] == (second / "metrics.jsonl").read_bytes()
    resumed = json.loads(objects["runs/remote/attempts/0002.json"])["resumed_step"]
    assert resumed == 6  # the state of step 8 is torn

    # A third machine finds the run finished, and gets its result.
    third = tmp_path / "third"
    path = config(small_pipeline, third, folder)
    result = run_command("lgm_scale/train.py", path)
    assert result.returncode == 0, result.stderr
    assert "is finished" in result.stdout
    name = Path("bundle") / "generator.safetensors"
    assert (third / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "SignatureDoesNotMatch"),
        ({}, "NoSuchBucket"),
    ],
)
def test_a_store_that_refuses_is_one_clear_error(
    small_pipeline, bucket, tmp_path, monkeypatch, change, told
):
    for key, value in change.items():
        monkeypatch.setenv(key, value)
    folder = f"{bucket.url}/run" if change else "s3://no-such-bucket-here/run"
    result = run_command("lgm_scale/train.py", config(small_pipeline, tmp_path / "r", folder))
    assert_user_error(result, f"checkpoint.folder: {folder}", told)
    assert "wrong-secret" not in result.stderr + result.stdout
