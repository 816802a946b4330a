"""Saving and resuming without a training: three numbers, in and out of files."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from far_storage import FarStorage
from safetensors import safe_open
from torch import nn

from lgm_scale.checkpoint import checkpointer
from lgm_scale.checkpoint.checkpointer import Checkpointer
from lgm_scale.checkpoint.manifest import StateFile, StateManifest, StateName
from lgm_scale.checkpoint.state_files import StateFiles
from lgm_scale.errors import CheckpointError, DivergenceError, SupersededError
from lgm_scale.parallel.shards import ParameterShard
from lgm_scale.storage.files import file_hash
from lgm_scale.storage.stores import Storage
from lgm_scale.training.ema import EMA


@dataclass
class Run:
    """One start of a run: a model of three weights and a buffer, at a step."""

    checkpointer: Checkpointer
    model: nn.Module
    average: torch.Tensor
    reloaded: list[float]
    step: int = 0

    @property
    def state(self) -> Any:
        return SimpleNamespace(timestamp=SimpleNamespace(batch=SimpleNamespace(value=self.step)))

    def at(self, step: int) -> Run:
        """Values that tell the step."""
        self.step = step
        with torch.no_grad():
            for value in (self.model.weight, self.model.table, self.average):
                value.fill_(step)  # type: ignore[operator]
        return self

    def saved(self, *steps: int) -> StateName:
        """Begin, and save at these steps; the last state."""
        self.checkpointer.begin(self.state)
        for step in steps:
            name = self.checkpointer.save(self.at(step).state)
        self.checkpointer.finish()
        return name

    def values(self) -> list[float]:
        return [float(v.mean()) for v in (self.model.weight, self.model.table, self.average)]  # type: ignore[operator, union-attr]


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path, monkeypatch) -> Start:
    """Begin or go on with the run in a folder."""

    def read(state: Any) -> dict[str, Any]:
        return {"place": state.timestamp.batch.value}

    def load(values: dict[str, Any], state: Any) -> None:
        state.timestamp.batch.value = values["place"]

    monkeypatch.setattr(checkpointer, "read_scalars", read)
    monkeypatch.setattr(checkpointer, "load_scalars", load)

    def begin(storage: type[Storage] = Storage, run_id: str = "mine", shape: int = 3) -> Run:
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(shape))
        model.register_buffer("table", torch.zeros(2))
        optimizer = torch.optim.AdamW([model.weight])
        shard = ParameterShard("weight", (shape,), 0, shape, model.weight, optimizer)
        ema = EMA(0.5, prefix="")
        ema.start([shard])
        own = Checkpointer(storage(tmp_path / "state"), run_id, "ddp", keep=2)
        run = Run(own, model, ema.average[0], [])
        own.bind(model, [shard], ema, lambda: run.reloaded.append(run.values()[0]))
        return run

    return begin


@pytest.mark.parametrize("storage", [Storage, FarStorage])
def test_a_run_goes_on_with_all_it_saved(start, storage, caplog):
    caplog.set_level(logging.INFO, "lgm_scale")
    first = start(storage)
    assert first.checkpointer.begin(first.at(0).state) == 0
    assert "resumed" not in caplog.text
    name = first.checkpointer.save(first.at(4).state)
    first.at(5)  # by value: the training goes on
    first.checkpointer.finish()
    assert (str(name), first.checkpointer.parts_done()) == ("ba00000004-a0001", 2)
    assert first.reloaded == []
    second = start(storage)
    state = second.state
    assert second.checkpointer.begin(state) == 4
    assert second.values() == [4, 4, 4]
    assert state.timestamp.batch.value == 4
    assert second.reloaded == [4]
    assert "resumed after step 4 (attempt 2)" in caplog.text
    manifest = second.checkpointer._states.read_manifest(name)
    assert isinstance(manifest, StateManifest)
    told = (manifest.run_id, manifest.step, manifest.attempt, manifest.world_size)
    assert told == ("mine", 4, 1, 1)
    assert (manifest.strategy, manifest.parameters) == ("ddp", [["weight", [3]]])
    assert second.checkpointer.attempts.own in second.checkpointer.attempts.all()


def test_a_save_is_sealed_step_by_step_once_all_have_written(start):
    run = start()
    own = run.checkpointer
    own.begin(run.state)
    own.save(run.at(2).state)
    own.proceed(0)
    assert own._states.newest() == []
    own._background._running[0].result()  # type: ignore[index]
    own.proceed(1)
    own._background._running[0].result()  # type: ignore[index]
    own.proceed(2)
    assert [str(name) for name in own._states.newest()] == ["ba00000002-a0001"]
    assert own.parts_done() == 2


def test_a_save_waits_for_the_one_before(start):
    run = start()
    run.checkpointer.begin(run.state)
    for step in (2, 4, 6):
        run.checkpointer.save(run.at(step).state)
    newest = run.checkpointer._states.newest()
    assert [name.step for name in newest] == [4, 2]


@pytest.mark.parametrize("storage", [Storage, FarStorage])
def test_companions_go_along_in_object_storage_alone(start, storage, tmp_path):
    run, log = start(storage), tmp_path / "metrics.jsonl"
    run.checkpointer.begin(run.state)
    log.write_text("step 0\n")
    files = {"metrics.jsonl": log, "history.json": tmp_path / "history.json"}
    run.checkpointer.save(run.at(2).state, files)
    log.write_text("step 0\nstep 1\n")
    run.checkpointer.finish()
    names = run.checkpointer.storage.names()
    assert "history.json" not in names
    assert ("metrics.jsonl" in names) == (storage is FarStorage)
    if storage is FarStorage:
        assert run.checkpointer.storage.read("metrics.jsonl") == b"step 0\n"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def tear(path: Path) -> None:
    path.with_name("manifest.json").write_bytes(b"{")


@pytest.mark.parametrize("storage", [Storage, FarStorage])
@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (Path.unlink, "rank-00000.safetensors cannot be read"),
        (cut, "does not have its checksum"),
        (flip, "does not have its checksum"),
        (tear, "manifest.json is damaged"),
    ],
)
def test_a_damaged_state_is_passed_over(start, storage, harm, problem, caplog, tmp_path):
    newest = start(storage).saved(2, 4)
    harm(Path(tmp_path, "state", str(newest), "rank-00000.safetensors"))
    again = start(storage)
    assert again.checkpointer.begin(again.state) == 2
    assert again.values() == [2, 2, 2]
    assert "state ba00000004-a0001 is passed over: " in caplog.text
    assert problem in caplog.text


def test_a_file_that_another_rank_found_damaged_is_as_bad(start, monkeypatch, caplog):
    start().saved(2)
    monkeypatch.setattr(
        checkpointer.dist, "all_gather_object", lambda own: [own, own or "rank-00001 is damaged"]
    )
    again = start()
    with pytest.raises(CheckpointError, match="none is whole"):
        again.checkpointer.begin(again.state)
    assert again.values() == [0, 0, 0]
    assert "passed over: rank-00001 is damaged" in caplog.text


def test_only_the_first_rank_writes_buffers_and_seals(start, monkeypatch, tmp_path):
    run = start()
    run.checkpointer.begin(run.state)
    monkeypatch.setattr(checkpointer.dist, "get_global_rank", lambda: 1)
    name = run.checkpointer.save(run.at(2).state)
    run.checkpointer.finish()
    for thread in threading.enumerate():  # what another rank does is not waited for
        if thread.name == "state":
            thread.join()
    assert run.checkpointer.storage.names(f"{name}/") == [f"{name}/rank-00001.safetensors"]
    with safe_open(tmp_path / "state" / str(name) / "rank-00001.safetensors", "pt") as file:
        assert {key.split("/")[0] for key in file.keys()} >= {"weight", "ema"}  # noqa: SIM118
        assert not any(key.startswith("buffer/") for key in file.keys())  # noqa: SIM118


def test_no_whole_state_is_no_new_start(start, tmp_path):
    start().saved(2)
    (tmp_path / "state" / "ba00000002-a0001" / "rank-00000.safetensors").unlink()
    again = start()
    with pytest.raises(CheckpointError, match="holds 1 states and none is whole"):
        again.checkpointer.begin(again.state)
    assert len(again.checkpointer.attempts.all()) == 1


def test_states_of_another_run_or_model_are_not_read(start, caplog):
    start().saved(2)
    other = start(run_id="theirs")
    with pytest.raises(CheckpointError, match="none is whole"):
        other.checkpointer.begin(other.state)
    assert "it was written by another run" in caplog.text
    larger = start(shape=4)
    with pytest.raises(CheckpointError, match="another model"):
        larger.checkpointer.begin(larger.state)


def test_a_folder_that_another_configuration_took_is_left(start):
    run = start()
    run.checkpointer.storage.write("run.json", b'{"run_id": "theirs"}')
    with pytest.raises(SupersededError, match="another configuration took this folder over"):
        run.checkpointer.begin(run.state)
    run.checkpointer.storage.write("run.json", b'{"run_id": "mine"}')
    assert run.checkpointer.begin(run.state) == 0


def test_who_was_replaced_copies_nothing(start, monkeypatch):
    run, later = start(), start()
    run.checkpointer.begin(run.state)
    later.checkpointer.begin(later.state)
    monkeypatch.setattr(run.checkpointer._copy, "take", None)
    with pytest.raises(SupersededError):
        run.checkpointer.save(run.at(2).state)


@pytest.mark.parametrize("failed", ["write", "seal"])
def test_what_fails_beside_the_training_is_raised_where_it_is_waited_for(
    start, monkeypatch, failed
):
    def refuse(*args: object) -> None:
        raise CheckpointError("no room")

    run = start()
    run.checkpointer.begin(run.state)
    monkeypatch.setattr(StateFiles, failed, refuse)
    run.checkpointer.save(run.at(2).state)
    with pytest.raises(CheckpointError, match="no room"):
        run.checkpointer.finish()
    assert run.checkpointer._states.newest() == []
    run.checkpointer.finish()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("error", [None, ValueError, DivergenceError])
def test_a_save_is_completed_where_all_ranks_come_by(start, monkeypatch, ranks, error):
    run = start()
    run.checkpointer.begin(run.state)
    run.checkpointer.save(run.at(2).state)
    raised = pytest.raises(error, match="its own") if error else contextlib.nullcontext()
    with monkeypatch.context() as patch:
        finished: list[int] = []
        patch.setattr(checkpointer.dist, "get_world_size", lambda: ranks)
        patch.setattr(run.checkpointer, "finish", lambda: finished.append(1))
        with raised, run.checkpointer.finishing():
            if error:
                raise error("its own")
    alone = error is ValueError and ranks == 2
    assert finished == ([] if alone else [1])
    run.checkpointer.finish()


def test_the_first_error_is_the_one_to_tell(start, monkeypatch, caplog):
    def refuse() -> None:
        raise CheckpointError("no room")

    run = start()
    monkeypatch.setattr(run.checkpointer, "finish", refuse)
    with pytest.raises(ValueError, match="its own"), run.checkpointer.finishing():
        raise ValueError("its own")
    assert "no room" in caplog.text


def test_a_long_wait_is_told_and_a_short_one_is_not(start, monkeypatch, caplog):
    run, now = start(), [1000.0]
    run.checkpointer.begin(run.state)
    monkeypatch.setattr(checkpointer.time, "monotonic", lambda: now[0])
    run.checkpointer.save(run.at(2).state)
    assert "waited" not in caplog.text
    finish = run.checkpointer.finish

    def slowly() -> None:
        finish()
        now[0] += 7

    monkeypatch.setattr(run.checkpointer, "finish", slowly)
    run.checkpointer.save(run.at(4).state)
    assert "step 4 waited 7.0 s until the state before was written" in caplog.text
    finish()


def test_files_that_a_resume_fetches_come_once_and_go(start, monkeypatch, tmp_path):
    start(FarStorage).saved(2)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    fetched: list[str] = []
    get = FarStorage.get
    monkeypatch.setattr(FarStorage, "get", lambda *args: (fetched.append(args[1]), get(*args))[1])
    again = start(FarStorage)
    assert again.checkpointer.begin(again.state) == 2
    assert fetched == ["ba00000002-a0001/rank-00000.safetensors"]
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("storage", [Storage, FarStorage])
def test_each_file_is_hashed_once_where_it_is_read(start, monkeypatch, tmp_path, storage):
    """Two nodes of two ranks: once by all where they share a folder, once by each node else."""
    (tmp_path / "file").touch()
    empty = file_hash(tmp_path / "file")
    files = [StateFile(str(rank), 0, empty, []) for rank in range(4)]
    manifest = StateManifest("mine", 2, 1, 4, "fsdp", [], {}, files)
    needed = [[0, 1], [1, 2], [2], [3, 0]]  # by each rank
    everyone = [{str(i) for i in own} for own in needed]
    asked: list[list[str]] = [[], [], [], []]
    for rank, own in enumerate(asked):
        checker = start(storage).checkpointer
        found = {
            "global_rank": rank,
            "local_rank": rank % 2,
            "world_size": 4,
            "local_world_size": 2,
        }
        with monkeypatch.context() as patch:
            for name, value in found.items():
                patch.setattr(checkpointer.dist, f"get_{name}", lambda value=value: value)
            patch.setattr(checkpointer.dist, "all_gather_object", lambda own: everyone)
            patch.setattr(checkpointer, "files_needed", lambda *args: [])
            patch.setattr(
                checker.storage,
                "get",
                lambda name, folder, own=own: (own.append(name), tmp_path / "file")[1],
            )
            assert checker._fetch(StateName(2, 1), manifest, tmp_path) is None
    nodes = [sorted(asked[0] + asked[1]), sorted(asked[2] + asked[3])]
    every = [f"ba00000002-a0001/{i}" for i in range(4)]
    if storage is Storage:
        assert sorted(nodes[0] + nodes[1]) == every
        assert all(len(own) == 1 for own in asked)
    else:
        assert nodes == [every[:3], [every[0], every[2], every[3]]]
        assert all(asked)


def test_a_file_that_does_not_load_ends_the_start(start, monkeypatch):
    def refuse(*args: object) -> None:
        raise CheckpointError("torn")

    start().saved(2)
    monkeypatch.setattr(checkpointer, "read_shards", refuse)
    again = start()
    with pytest.raises(CheckpointError, match="torn"):
        again.checkpointer.begin(again.state)
    assert again.reloaded == []
