"""Saves beside the training: by value, whole at every end, and failing like any other save."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from far_storage import FarStorage
from rank_processes import states, waited_for
from small_pipeline import train_in_process

from lgm_scale.checkpoint import checkpointer
from lgm_scale.checkpoint.attempts import Attempts
from lgm_scale.checkpoint.background import Background
from lgm_scale.checkpoint.checkpointer import Checkpointer
from lgm_scale.checkpoint.manifest import StateManifest
from lgm_scale.checkpoint.state_files import StateFiles
from lgm_scale.checkpoint.tensors import ShardCopy
from lgm_scale.errors import CheckpointError, DivergenceError, SupersededError
from lgm_scale.storage.stores import Storage

PATIENCE = 600  # seconds, for a thread on a busy machine


def config(pipeline, out: Path, interval: str = "2ba") -> Path:
    return pipeline.generator_config(
        out, run_name="background", checkpoint={"interval": interval, "keep": 9}
    )


# --- parts of work --------------------------------------------------------------------------------


def test_a_part_is_taken_up_when_all_ranks_have_done_it():
    background, done, taken = Background(), threading.Event(), []
    background.proceed(0)  # nothing has begun

    def agree(result: Callable[[], Any]) -> None:
        taken.append((result(), threading.current_thread() is threading.main_thread()))

    background.start(lambda: done.wait(PATIENCE), agree)
    assert background.count() == 0
    background.proceed(0)
    assert taken == []
    done.set()
    background.proceed(0)  # another rank has not done it
    assert taken == []
    background.proceed(1)
    assert taken == [(True, True)]
    background.proceed(1)  # an old number
    assert taken == [(True, True)]
    assert background.count() == 1


def test_finish_waits_for_a_part_and_those_that_follow():
    background, order = Background(), []

    def second(result: Callable[[], Any]) -> None:
        order.append(result())
        background.start(lambda: "sealed", lambda result: order.append(result()))

    background.start(threading.current_thread, lambda result: order.append(result()))
    background.finish()
    assert order.pop() is not threading.main_thread()
    background.start(lambda: "written", second)
    background.finish()
    background.finish()
    assert order == ["written", "sealed"]
    assert background.count() == 3


def test_an_error_is_raised_once_where_the_ranks_agree():
    background = Background()

    def fail() -> None:
        raise CheckpointError("no room")

    background.start(fail, lambda result: result())
    with pytest.raises(CheckpointError, match="no room"):
        background.finish()
    background.finish()  # nothing is left
    assert background.count() == 1


# --- saves ----------------------------------------------------------------------------------------


@pytest.fixture
def late(monkeypatch) -> Callable[[int, dict], None]:
    """An `on_step`: a state is written when a whole step has followed it, the last one at once."""
    seen, copy, write = threading.Condition(), ShardCopy.take, ShardCopy.write
    current: list[int] = [0]
    due: dict[ShardCopy, int] = {}

    def on_step(step: int, batch: dict) -> None:
        with seen:
            current[0] = step
            seen.notify_all()

    def noted_copy(self: ShardCopy, *args) -> None:
        due[self] = current[0] + 2
        copy(self, *args)

    def write_late(self: ShardCopy, path: Path) -> None:
        with seen:
            assert seen.wait_for(lambda: current[0] >= min(due[self], 9), PATIENCE)
        write(self, path)

    monkeypatch.setattr(ShardCopy, "take", noted_copy)
    monkeypatch.setattr(ShardCopy, "write", write_late)
    return on_step


@pytest.mark.slow
def test_what_is_written_late_is_what_was_saved(small_pipeline, tmp_path, late, monkeypatch):
    out = train_in_process(config(small_pipeline, tmp_path / "late"), on_step=late)
    monkeypatch.undo()
    monkeypatch.setattr(Checkpointer, "save", waited_for(Checkpointer.save))
    expected = train_in_process(config(small_pipeline, tmp_path / "waiting"))
    assert [name[:10] for name in states(out)] == [f"ba{step:08d}" for step in (2, 4, 6, 8, 10)]
    assert states(out) == states(expected)
    for name in states(out):
        files = [run / "state" / name / "rank-00000.safetensors" for run in (out, expected)]
        assert files[0].read_bytes() == files[1].read_bytes()
        one, two = (
            without_clocks(run / "state" / name / "manifest.json") for run in (out, expected)
        )
        assert one == two
        assert one["files"][0]["sha256"]


def without_clocks(path: Path) -> dict[str, Any]:
    manifest = json.loads(path.read_text())["body"]
    del manifest["run_id"]  # drawn at random
    times = manifest["scalars"]["timestamp"]
    manifest["scalars"]["timestamp"] = {k: v for k, v in times.items() if not k.endswith("_wct")}
    return manifest


@pytest.fixture
def held(monkeypatch) -> threading.Event:
    """Until it is set, the second state is not written."""
    event, write, begun = threading.Event(), ShardCopy.write, []

    def write_held(self: ShardCopy, path: Path) -> None:
        begun.append(path)
        assert len(begun) < 2 or event.wait(PATIENCE)
        write(self, path)

    monkeypatch.setattr(ShardCopy, "write", write_held)
    return event


def test_a_diverging_run_completes_the_state_before(small_pipeline, tmp_path, held):
    def on_step(step: int, batch: dict) -> None:
        if step == 5:
            held.set()
            raise DivergenceError("step 5")

    with pytest.raises(DivergenceError, match="step 5"):
        train_in_process(config(small_pipeline, tmp_path / "run"), on_step=on_step)
    assert states(tmp_path / "run") == ["ba00000002-a0001", "ba00000004-a0001"]


def test_a_run_that_is_replaced_seals_nothing_any_more(small_pipeline, tmp_path, held):
    out = tmp_path / "run"

    def on_step(step: int, batch: dict) -> None:
        if step == 5:  # another one found the state of step 2, and no other
            Attempts(Storage(out / "state")).start(2, 1, "ddp")
            held.set()

    with pytest.raises(SupersededError, match="attempt 2 has taken over"):
        train_in_process(config(small_pipeline, out), on_step=on_step)
    assert states(out) == ["ba00000002-a0001"]


@pytest.mark.parametrize("lost", ["put", "seal"])
def test_an_error_ends_the_run_before_the_next_save(
    small_pipeline, tmp_path, monkeypatch, lost, caplog
):
    def fail(*args):
        if lost == "put":
            raise OSError(28, "No space left on device")
        raise CheckpointError("not sealed")

    owner = {"put": Storage, "seal": StateFiles}[lost]
    monkeypatch.setattr(owner, lost, fail)
    monkeypatch.setattr(checkpointer, "_LONG_WAIT", 60.0)
    steps: list[int] = []
    told = {"put": "rank 0 could not write ba00000004-a0001 to .*No space", "seal": "not sealed"}
    with pytest.raises(CheckpointError, match=told[lost]):
        train_in_process(
            config(small_pipeline, tmp_path / "run", "4ba"),
            on_step=lambda step, batch: steps.append(step),
        )
    assert 3 <= steps[-1] < 8  # the state is that of the fourth step
    assert states(tmp_path / "run") == []
    assert "waited" not in caplog.text  # for no save was under way


def test_a_save_says_that_it_had_to_wait(small_pipeline, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpointer, "_LONG_WAIT", 0.0)
    train_in_process(config(small_pipeline, tmp_path / "run", "1ba"))
    assert re.search(r"step 2 waited \d+\.\d s until the state before was written", caplog.text)
    assert len(states(tmp_path / "run")) == 9


def test_the_log_goes_along_as_long_as_it_was(tmp_path):
    log, storage = tmp_path / "metrics.jsonl", FarStorage(tmp_path / "state")
    log.write_text("step 0\nstep 1 of later")
    attempts = Attempts(storage)
    attempts.start(0, 1, "ddp")
    manifest = StateManifest("run", 1, 1, 1, "ddp", [], {}, [])
    StateFiles(storage, attempts, keep=1).seal(manifest, {("metrics.jsonl", log): 7})
    assert storage.read("metrics.jsonl") == b"step 0\n"
    assert storage.names("ba") == ["ba00000001-a0001/manifest.json"]
