"""Files of states and records of attempts, without a training: who may write, and what stays."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lgm_scale.checkpoint.attempts import Attempts
from lgm_scale.checkpoint.manifest import StateFile, StateManifest, StateName
from lgm_scale.checkpoint.state_files import StateFiles
from lgm_scale.errors import CheckpointError, SupersededError
from lgm_scale.storage.files import file_hash
from lgm_scale.storage.stores import Storage

Opened = Callable[[int], StateFiles]


@pytest.fixture
def opened(tmp_path) -> Opened:
    """The states of a run whose next attempt has just begun, at a step."""

    def start(step: int) -> StateFiles:
        storage = Storage(tmp_path / "state")
        attempts = Attempts(storage)
        assert attempts.start(step, 2, "fsdp") is attempts.own
        return StateFiles(storage, attempts, keep=2)

    return start


def content(states: StateFiles, step: int) -> StateName:
    """A rank's file of a state, without a manifest."""
    assert states.attempts.own is not None
    name = StateName(step, states.attempts.own.number)
    states.storage.write(f"{name}/rank-00000.safetensors", b"weights")
    return name


def sealed(states: StateFiles, step: int, companions: dict | None = None) -> StateName:
    name = content(states, step)
    file = StateFile("rank-00000.safetensors", 7, "0", [[0, 0, 1]])
    manifest = StateManifest("id", step, name.attempt, 2, "fsdp", [["w", [1]]], {}, [file])
    states.seal(manifest, companions or {})
    return name


def folders(states: StateFiles) -> set[str]:
    return {name.split("/")[0] for name in states.storage.names("ba")}


# --- states ---------------------------------------------------------------------------------------


def test_the_newest_whole_states_stay_and_the_newest_comes_first(opened):
    states = opened(0)
    assert states.newest() == []
    names = [sealed(states, step) for step in (2, 4, 6)]
    assert states.newest() == [names[2], names[1]]
    assert folders(states) == {str(names[1]), str(names[2])}
    assert states.storage.names(str(names[2])) == [
        f"{names[2]}/manifest.json",
        f"{names[2]}/rank-00000.safetensors",
    ]


def test_what_is_deleted_is_the_unfinished_and_what_no_longer_counts(opened):
    dead = opened(0)
    kept, beyond, torn = sealed(dead, 2), sealed(dead, 4), content(dead, 6)
    states = opened(2)  # went on from step 2: what the dead one had at 4 counts no more
    assert states.newest() == [kept]
    half = content(states, 3)
    newest = sealed(states, 5)
    # Another attempt's, newer than what was just sealed: it may be about to be sealed itself.
    assert folders(states) == {str(kept), str(newest), str(torn)}
    assert not states.storage.names(f"{half}/")
    assert not states.storage.names(f"{beyond}/")
    assert states.newest() == [newest, kept]


def test_a_deleted_state_loses_its_manifest_first(opened, monkeypatch):
    states, deleted = opened(0), []
    old, delete = sealed(states, 2), states.storage.delete
    sealed(states, 4)
    monkeypatch.setattr(states.storage, "delete", lambda name: (deleted.append(name), delete(name)))
    sealed(states, 6)
    assert deleted == [f"{old}/manifest.json", f"{old}/"]
    assert not Path(states.storage.root, str(old)).exists()


def test_folders_of_other_names_are_nobodys_states(opened):
    states = opened(0)
    for name in ("ba2-a0001", "backup", "ba00000002-a0001.old"):
        states.storage.write(f"{name}/manifest.json", b"")
    newest = sealed(states, 4)
    assert states.newest() == [newest]
    assert folders(states) == {"ba2-a0001", "backup", "ba00000002-a0001.old", str(newest)}


def test_a_manifest_or_what_is_wrong_with_it(opened):
    states = opened(0)
    name = sealed(states, 2)
    manifest = states.read_manifest(name)
    assert isinstance(manifest, StateManifest)
    assert (manifest.step, manifest.attempt, manifest.files[0].size) == (2, 1, 7)
    states.storage.write(f"{name}/manifest.json", b"{")
    assert "manifest.json is damaged" in str(states.read_manifest(name))
    assert "No such file" in str(states.read_manifest(StateName(4, 1)))


class Shards:
    """What a rank has to write."""

    pieces = ([0, 0, 3],)

    def write(self, path: Path) -> None:
        path.write_bytes(b"abc")


def test_a_rank_writes_its_file_and_says_what_is_in_it(opened, monkeypatch):
    states, name = opened(0), StateName(2, 1)
    rank = SimpleNamespace(get_global_rank=lambda: 3)
    monkeypatch.setattr("lgm_scale.checkpoint.state_files.dist", rank)
    file = states.write(name, Shards())  # type: ignore[arg-type]
    path = Path(states.storage.root, str(name), "rank-00003.safetensors")
    assert file == StateFile(path.name, 3, file_hash(path), Shards.pieces)  # type: ignore[arg-type]
    assert path.read_bytes() == b"abc"
    assert sorted(p.name for p in Path(states.storage.root).iterdir()) == ["attempts", str(name)]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), CheckpointError("no bucket")])
def test_a_file_that_cannot_be_written_is_one_error_with_its_rank(opened, monkeypatch, error):
    states = opened(0)

    def refuse(path: Path, name: str) -> None:
        raise error

    monkeypatch.setattr(states.storage, "put", refuse)
    with pytest.raises(CheckpointError, match=r"checkpoint\.folder: rank 0 could not write ba"):
        states.write(StateName(2, 1), Shards())  # type: ignore[arg-type]


def test_a_state_whose_files_are_elsewhere_is_not_sealed(opened):
    states = opened(0)
    files = [StateFile(f"rank-0000{rank}.safetensors", 7, "0", []) for rank in (0, 1)]
    name = content(states, 2)
    manifest = StateManifest("id", 2, name.attempt, 2, "fsdp", [], {}, files)
    with pytest.raises(CheckpointError, match=r"not shared by all ranks.*rank-00001\.safetensors"):
        states.seal(manifest, {})
    assert states.newest() == []


def test_companions_go_along_as_long_as_they_were(opened, tmp_path):
    states, log = opened(0), tmp_path / "metrics.jsonl"
    log.write_bytes(b"one two")
    sealed(states, 2, {("metrics.jsonl", log): 3})
    assert states.storage.read("metrics.jsonl") == b"one"


# --- attempts -------------------------------------------------------------------------------------


def test_an_attempt_records_who_began_where_and_when(opened, monkeypatch):
    for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST", "SKYPILOT_TASK_ID"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    before = time.time()
    states = opened(300)
    attempts = Attempts(states.storage)
    (own,) = attempts.all()
    assert own == states.attempts.own
    assert attempts.own is None
    assert (own.number, own.resumed_step, own.world_size, own.strategy) == (1, 300, 2, "fsdp")
    assert (own.host, own.scheduler) == (socket.gethostname(), {"SLURM_JOB_ID": "17"})
    assert before <= own.started <= time.time()
    assert states.storage.names() == ["attempts/0001.json"]
    assert json.loads(states.storage.read("attempts/0001.json"))["token"] == own.token


def test_only_the_newest_attempt_may_write(opened):
    first = opened(0)
    first.attempts.check()
    second = opened(0)
    second.attempts.check()
    with pytest.raises(SupersededError, match="is attempt 1 of the run, and attempt 2 has taken"):
        first.attempts.check()
    content(first, 2)
    with pytest.raises(SupersededError):
        sealed(first, 2)
    assert first.newest() == []
    assert second.attempts.own is not None
    assert [a.number for a in second.attempts.all()] == [1, second.attempts.own.number]


@pytest.mark.parametrize("record", [b"{", b"[]", b'{"number": 1}'])
def test_a_damaged_record_is_an_error_that_names_it(opened, record):
    states = opened(0)
    states.storage.write("attempts/0001.json", record)
    with pytest.raises(CheckpointError, match=r"attempts/0001\.json is damaged"):
        states.newest()
