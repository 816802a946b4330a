"""A run comes in and goes out, without a training: whose states there are, and where results go."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from far_storage import FarStorage
from test_run_folder import config

from lgm_scale.checkpoint import run as entry
from lgm_scale.checkpoint.run import apply_changes, begun_compiled, enter_run, leave_result
from lgm_scale.checkpoint.run_folder import RunFolder
from lgm_scale.config.loading import to_dict
from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.storage.stores import Storage

STATE = "ba00000002-a0001/manifest.json"


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> FarStorage:
    """Where all states of a test lie."""
    made = FarStorage(tmp_path / "bucket")
    monkeypatch.setattr(entry, "open_storage", lambda *args: made)
    return made


def folder(path: Path, *changes: str, allowed: tuple[str, ...] = ()) -> RunFolder:
    return RunFolder(path, config(f"out={path}", *changes), allowed)


def recorded(storage: Storage) -> dict[str, Any]:
    return json.loads(storage.read("run.json"))


def states(path: Path) -> Storage:
    return Storage(path / "state")


def made_bundle(path: Path) -> None:
    for name in ("bundle/bundle.json", "bundle/z.safetensors", "bundle/parts/a"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)


# --- coming in ------------------------------------------------------------------------------------


def test_a_new_run_gets_an_id_and_keeps_it(tmp_path):
    first = enter_run(folder(tmp_path))
    assert (first.finished, first.changes, first.storage.root) == (False, {}, f"{tmp_path}/state")
    wanted = to_dict(config(f"out={tmp_path}"))
    assert recorded(states(tmp_path)) == {
        "run_id": first.run_id,
        "run_name": "demo-dit",
        "config": wanted,
    }
    assert json.loads((tmp_path / "config.json").read_text()) == wanted
    assert enter_run(folder(tmp_path)).run_id == first.run_id


def test_states_lie_where_the_configuration_says(tmp_path):
    place = tmp_path / "states"
    run = enter_run(folder(tmp_path / "out", f"checkpoint.folder={place}"))
    assert recorded(Storage(place))["run_id"] == run.run_id
    assert not (tmp_path / "out" / "state").exists()


def test_before_its_first_state_a_folder_is_anybodys(tmp_path):
    first = enter_run(folder(tmp_path))
    other = enter_run(folder(tmp_path, "seed=3"))
    assert other.run_id != first.run_id
    assert recorded(states(tmp_path))["config"]["seed"] == 3


@pytest.mark.parametrize("torn", ["ba00000002-a0001/x", "other/manifest.json", "manifest.json"])
def test_what_is_no_whole_state_claims_nothing(tmp_path, torn):
    first = enter_run(folder(tmp_path))
    states(tmp_path).write(torn, b"")
    assert enter_run(folder(tmp_path, "seed=3")).run_id != first.run_id


def test_from_then_on_another_run_is_refused(tmp_path):
    place = f"checkpoint.folder={tmp_path / 'states'}"
    enter_run(folder(tmp_path / "one", place))
    Storage(tmp_path / "states").write(STATE, b"")
    with pytest.raises(ConfigError) as caught:  # its folder is new, and tells nothing
        enter_run(folder(tmp_path / "two", place, "seed=3"))
    assert f"checkpoint.folder: {tmp_path / 'states'} holds a run" in caught.value.problems[-1]
    assert "seed: 0 there, 3 here" in caught.value.problems


def test_changes_are_those_of_the_folder_and_of_the_states(tmp_path):
    place, key = f"checkpoint.folder={tmp_path / 'states'}", "train.max_duration"
    enter_run(folder(tmp_path / "one", place))
    Storage(tmp_path / "states").write(STATE, b"")
    grown = enter_run(folder(tmp_path / "one", place, f"{key}=9ba"))
    assert grown.changes == {key: {"from": "6ba", "to": "9ba"}}
    assert recorded(Storage(tmp_path / "states"))["config"]["train"]["max_duration"] == "6ba"


def test_another_machine_may_put_a_run_elsewhere(tmp_path, bucket):
    first = enter_run(folder(tmp_path / "one"))
    bucket.write(STATE, b"")
    again = enter_run(folder(tmp_path / "two"))
    assert (again.run_id, again.changes) == (first.run_id, {})


def test_a_shared_folder_of_states_is_of_one_out(tmp_path):
    place = f"checkpoint.folder={tmp_path / 'states'}"
    enter_run(folder(tmp_path / "one", place))
    Storage(tmp_path / "states").write(STATE, b"")
    with pytest.raises(ConfigError, match=r"holds a run with another configuration"):
        enter_run(folder(tmp_path / "two", place))


def test_the_log_comes_back_from_the_bucket_and_replaces_none(tmp_path, bucket):
    for name in ("metrics.jsonl", "history.json", "unrelated"):
        bucket.write(name, b"[]")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("own")
    enter_run(folder(tmp_path / "out"))
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == "own"
    assert (tmp_path / "out" / "history.json").read_text() == "[]"
    assert not (tmp_path / "out" / "unrelated").exists()


def test_states_on_a_disk_are_asked_for_no_log(tmp_path):
    states(tmp_path).write("metrics.jsonl", b"{}")
    enter_run(folder(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "text"), [(b"{", "run.json is damaged"), (None, "holds states without run.json")]
)
def test_states_of_unknown_origin_are_refused(tmp_path, content, text):
    storage = states(tmp_path)
    storage.write("ba00000002-a0001/x", b"")
    if content:
        storage.write("run.json", content)
    with pytest.raises(CheckpointError, match=text):
        enter_run(folder(tmp_path))


@pytest.mark.parametrize("there", [True, False])
def test_states_tell_whether_a_run_was_compiled(tmp_path, bucket, there):
    compile_key = f"train.compile={str(there).lower()}"
    assert begun_compiled(folder(tmp_path / "new")) is None
    enter_run(folder(tmp_path / "one", compile_key))
    assert begun_compiled(folder(tmp_path / "new")) is None  # it has no state yet
    bucket.write(STATE, b"")
    assert begun_compiled(folder(tmp_path / "new")) is there


def test_a_folder_that_knows_is_believed(tmp_path, bucket):
    enter_run(folder(tmp_path / "one", "train.compile=true"))
    bucket.write(STATE, b"")
    own = tmp_path / "one"
    (own / "state/ba00000002-a0001").mkdir(parents=True)
    (own / "state" / STATE).write_text("")
    there = json.loads((own / "config.json").read_text())
    there["train"]["compile"] = False
    (own / "config.json").write_text(json.dumps(there))
    assert begun_compiled(folder(own)) is False


def test_a_result_without_a_record_says_nothing(tmp_path, bucket):
    bucket.write("result.json", b"{}")
    assert begun_compiled(folder(tmp_path)) is None  # entering makes it this run's


# --- changed on purpose ---------------------------------------------------------------------------


@pytest.fixture
def renewed(monkeypatch) -> list[Any]:
    """The states whose learning rates were computed anew."""
    seen: list[Any] = []
    monkeypatch.setattr(entry, "renew_learning_rates", seen.append)
    return seen


def at_step(step: int) -> Any:
    return SimpleNamespace(timestamp=SimpleNamespace(batch=SimpleNamespace(value=step)))


def test_without_changes_nothing_is_renewed_or_written(tmp_path, bucket, renewed):
    run = enter_run(folder(tmp_path))
    before = list(bucket.written)
    apply_changes(run, folder(tmp_path), at_step(2))
    assert (renewed, bucket.written) == ([], before)


@pytest.mark.parametrize("remote", [True, False])
def test_changes_become_the_runs_own(tmp_path, bucket, renewed, caplog, monkeypatch, remote):
    monkeypatch.setattr(FarStorage, "remote", remote)
    first = enter_run(folder(tmp_path))
    bucket.write(STATE, b"")
    changed = folder(tmp_path, "train.max_duration=9ba")
    state = at_step(4)
    apply_changes(enter_run(changed), changed, state)
    assert renewed == [state]
    assert "train.max_duration: 6ba until step 4, 9ba from here on" in caplog.text
    assert recorded(bucket)["config"] == to_dict(changed.config)
    assert recorded(bucket)["run_id"] == first.run_id
    assert [each["after_step"] for each in changed.history()] == [4]
    assert ("history.json" in bucket.written) == remote
    assert enter_run(changed).changes == {}


# --- going out ------------------------------------------------------------------------------------


def test_the_result_is_the_last_to_be_written(tmp_path, bucket):
    run = folder(tmp_path)
    made_bundle(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}")
    leave_result(bucket, run, 6)
    *files, last = bucket.written
    assert set(files) == {
        *("bundle/bundle.json", "bundle/z.safetensors", "bundle/parts/a", "metrics.jsonl")
    }
    assert last == "result.json"
    assert json.loads(bucket.read("result.json")) == {"steps": 6}
    assert bucket.read("bundle/parts/a") == b"bundle/parts/a"


def test_a_result_on_a_disk_stays_where_it_is(tmp_path):
    made_bundle(tmp_path)
    run = folder(tmp_path)
    run.record({"seed": {}}, 2)
    leave_result(states(tmp_path), run, 6)
    assert states(tmp_path).names() == []
    assert run.history()[-1]["result"] == "6ba"


def test_a_finished_run_comes_back_whole_with_its_bundle_json_last(tmp_path, bucket, monkeypatch):
    made_bundle(tmp_path / "one")
    first = enter_run(folder(tmp_path / "one"))
    assert not first.finished
    leave_result(bucket, folder(tmp_path / "one"), 6)
    fetched: list[Path] = []
    write = entry.write_whole

    def noted(path: Path, content: bytes) -> None:
        fetched.append(path.relative_to(tmp_path / "two"))
        write(path, content)

    monkeypatch.setattr(entry, "write_whole", noted)
    again = enter_run(folder(tmp_path / "two"))
    assert (again.finished, again.run_id) == (True, first.run_id)
    assert [str(path) for path in fetched] == [
        *("bundle/parts/a", "bundle/z.safetensors", "bundle/bundle.json")
    ]
    assert (tmp_path / "two/bundle/z.safetensors").read_text() == "bundle/z.safetensors"


def test_a_finished_run_that_grows_goes_on(tmp_path, bucket):
    made_bundle(tmp_path / "one")
    enter_run(folder(tmp_path / "one"))
    leave_result(bucket, folder(tmp_path / "one"), 6)
    grown = enter_run(folder(tmp_path / "two", "train.max_duration=9ba"))
    assert not grown.finished
    assert list(grown.changes) == ["train.max_duration"]
    assert not (tmp_path / "two" / "bundle").exists()


def test_a_result_of_a_shorter_run_does_not_finish_it(tmp_path, bucket):
    enter_run(folder(tmp_path, "train.max_duration=9ba"))
    bucket.write(STATE, b"")
    bucket.write("result.json", b"{}")
    growth = {"changes": {"train.max_duration": {"from": "6ba", "to": "9ba"}}, "after_step": 6}
    (tmp_path / "history.json").write_text(json.dumps([growth]))
    assert not enter_run(folder(tmp_path, "train.max_duration=9ba")).finished
