"""Saves beside the training on two ranks: one that fails, one that dies half-way, equal bytes."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from rank_processes import run_ranks, start_ranks, states, until, wait_for, waited_for
from small_pipeline import SmallPipeline, assert_same_run, metrics
from test_strategies import STRATEGIES

from lgm_scale.checkpoint.checkpointer import Checkpointer
from lgm_scale.checkpoint.tensors import ShardCopy
from lgm_scale.storage.stores import Storage

STEPS = 10


def config(pipeline: SmallPipeline, out: Path) -> Path:
    checkpoint = {"interval": "2ba", "keep": 9}
    return pipeline.generator_config(out, run_name="background", checkpoint=checkpoint)


@pytest.fixture(scope="module")
def folder(small_pipeline):
    path = small_pipeline.root / "background"
    path.mkdir(exist_ok=True)
    return path


def wait_for_each_save() -> None:
    Checkpointer.save = waited_for(Checkpointer.save)  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def reference(small_pipeline, folder) -> Path:
    """A run under FSDP that stops for each save."""
    out = folder / "reference"
    job = (config(small_pipeline, out), STRATEGIES["fsdp"])
    run_ranks(2, [job], folder / "reference-log", prepare=wait_for_each_save)
    return out


def files(out: Path) -> dict[str, bytes]:
    paths = sorted((out / "state").glob("ba*/rank-*.safetensors"))
    # Without the number of the attempt.
    return {f"{path.parent.name[:10]}/{path.name}": path.read_bytes() for path in paths}


def hold_rank_one() -> None:
    """Rank 1 never ends writing its third state."""
    write, written = ShardCopy.write, []

    def hold(self, path):
        written.append(path)
        if os.environ["RANK"] == "1" and len(written) == 3:
            threading.Event().wait()
        write(self, path)

    ShardCopy.write = hold  # type: ignore[method-assign]


def test_a_death_between_two_files_leaves_the_state_before(small_pipeline, tmp_path, reference):
    out, log = tmp_path / "run", tmp_path / "log"
    job = (config(small_pipeline, out), STRATEGIES["fsdp"])
    ranks = start_ranks(2, [job], log, hold_rank_one)
    half = (out / "state").glob
    until(lambda: list(half("ba00000006-*/rank-00000.safetensors")), ranks, log)
    for process in ranks:
        process.kill()
    wait_for(ranks)
    assert [name[:10] for name in states(out)] == ["ba00000002", "ba00000004"]
    run_ranks(2, [job], log)
    attempts = sorted((out / "state" / "attempts").iterdir())
    assert [json.loads(path.read_text())["resumed_step"] for path in attempts] == [0, 4]
    assert_same_run(out, reference, STEPS, tolerance=0)
    found, expected = files(out), files(reference)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * STEPS / 2
    assert [name for name in found if found[name] != expected[name]] == []


def fill_the_disk_of_rank_one() -> None:
    put = Storage.put

    def full(self, path, name):
        if "ba00000004" in name and os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        put(self, path, name)

    Storage.put = full  # type: ignore[method-assign]


def test_a_rank_that_cannot_write_ends_all_with_its_reason(small_pipeline, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    job = (config(small_pipeline, out), STRATEGIES["ddp"])
    ranks = start_ranks(2, [job], log, fill_the_disk_of_rank_one)
    assert wait_for(ranks) == [2, 2]
    for rank in range(2):
        told = (tmp_path / f"log-{rank}.txt").read_text()
        assert "error: checkpoint.folder: rank 1 could not write ba00000004-a0001" in told
        assert "No space left on device; the state before it is whole" in told
        assert "Traceback" not in told
    assert [name[:10] for name in states(out)] == ["ba00000002"]
    assert len(metrics(out)) < STEPS
