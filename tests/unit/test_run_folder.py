"""The folder of a run, without a training: whose it is, what may change, and when it is done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lgm_scale.checkpoint import run_folder
from lgm_scale.checkpoint.run_folder import RunFolder
from lgm_scale.config.loading import to_dict
from lgm_scale.config.rules import load_training_run
from lgm_scale.config.schema import TrainingRun
from lgm_scale.errors import ConfigError


@pytest.fixture(autouse=True)
def _inputs(monkeypatch):
    """Data and bundles are not looked for: what would be is told."""

    def told(config: TrainingRun, to_come: object) -> list[str]:
        return [f"looked for {config.init_from}"]

    monkeypatch.setattr(run_folder, "input_problems", told)


def config(*changes: str) -> TrainingRun:
    given = ["out=unused", "train.max_duration=6ba", "train.compile=false", *changes]
    return load_training_run("yamls/demo/dit.yaml", given, world_size=1, has_gpu=None)


def begun(path: Path, *changes: str, by: str = "state/ba00000002-a0001/manifest.json") -> None:
    """Let a run live at a path, with a state or another file that says so."""
    (path / by).parent.mkdir(parents=True, exist_ok=True)
    (path / by).write_text("{}")
    (path / "config.json").write_text(json.dumps(to_dict(config(*changes))))


def folder(path: Path, *changes: str, allowed: Sequence[str] = ()) -> RunFolder:
    return RunFolder(path, config(*changes), allowed)


def problems(path: Path, *changes: str, allowed: Sequence[str] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        folder(path, *changes, allowed=allowed).changes()
    return caught.value.problems


def history(path: Path) -> list[dict[str, Any]]:
    return json.loads((path / "history.json").read_text())


# --- whose a folder is ----------------------------------------------------------------------------


def test_nobody_lives_in_a_new_folder(tmp_path):
    new = folder(tmp_path / "new")
    assert (new.changes(), new.begun_compiled(), new.finished()) == ({}, None, False)


@pytest.mark.parametrize("by", ["state/ba00000002-a0001/manifest.json", "bundle/bundle.json"])
def test_a_state_or_a_result_makes_a_folder_a_runs(tmp_path, by):
    begun(tmp_path, by=by)
    assert "seed: 0 there, 3 here" in problems(tmp_path, "seed=3")


@pytest.mark.parametrize(
    "by", ["state/ba00000002-a0001/x.safetensors", "state/other/manifest.json"]
)
def test_what_is_no_whole_state_does_not(tmp_path, by):
    begun(tmp_path, by=by)
    assert folder(tmp_path, "seed=3").changes() == {}


def test_states_elsewhere_make_it_one_too(tmp_path):
    key = f"checkpoint.folder={tmp_path / 'states'}"
    begun(tmp_path, key, by="states/ba00000002-a0001/manifest.json")
    assert "seed: 0 there, 3 here" in problems(tmp_path, key, "seed=3")


def test_a_record_of_before_there_were_such_keys_is_read(tmp_path):
    begun(tmp_path)
    there = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(there | {"checkpoint": None}))
    assert "seed: 0 there, 3 here" in problems(tmp_path, "seed=3")


@pytest.mark.parametrize(("log", "lives"), [(None, False), ("", False), ("{}\n", True)])
def test_with_states_in_a_bucket_the_log_tells(tmp_path, log, lives):
    key = "checkpoint.folder=s3://bucket/states"
    begun(tmp_path, key, by="unrelated")
    if log is not None:
        (tmp_path / "metrics.jsonl").write_text(log)
    assert (folder(tmp_path, key).begun_compiled() is not None) == lives


def test_a_damaged_record_is_told(tmp_path):
    begun(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (told,) = problems(tmp_path)
    assert "config.json is damaged" in told
    assert told.endswith("choose another `out`")


def test_a_place_where_no_folder_can_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file, or a link" in problems(tmp_path / "file")[0]
    assert f"lies below {tmp_path / 'file'}, which is a file" in problems(tmp_path / "file/a/b")[0]


def test_a_place_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)
    assert f"cannot be written in {tmp_path}" in problems(tmp_path / "a" / "b")[0]
    assert folder(tmp_path.parent / "other").changes() == {}


# --- what may change ------------------------------------------------------------------------------


def test_what_changes_nothing_that_is_computed_may_change(tmp_path):
    begun(tmp_path)
    free = (
        "logging.interval=7",
        "data.num_workers=0",
        "checkpoint.keep=3",
        "checkpoint.interval=9ba",
    )
    assert folder(tmp_path, *free).changes() == {}


def test_auto_is_what_the_record_says(tmp_path):
    begun(tmp_path)
    assert folder(tmp_path, "train.compile=auto").changes() == {}
    assert any(
        line.startswith("train.compile: ") for line in problems(tmp_path, "train.compile=true")
    )


def test_an_older_record_of_mean_flow_has_no_weights(tmp_path):
    """A record from before the key went without them, whatever the default is by now."""
    keys = ["model.end_time=true", "objective.mean_flow={}"]
    begun(tmp_path, *keys)
    path = tmp_path / "config.json"
    record = json.loads(path.read_text())
    assert record["objective"]["mean_flow"].pop("adaptive") == 1.0
    path.write_text(json.dumps(record))
    lines = problems(tmp_path, *keys)
    (told,) = [line for line in lines if line.startswith("objective.")]
    assert told.startswith("objective.mean_flow.adaptive: ")
    assert folder(tmp_path, *keys, "objective.mean_flow.adaptive=0.0").changes() == {}


@pytest.mark.parametrize("there", [True, False])
def test_whether_a_run_was_compiled(tmp_path, there):
    begun(tmp_path, f"train.compile={str(there).lower()}")
    assert folder(tmp_path).begun_compiled() is there
    assert folder(tmp_path, f"train.compile={str(there).lower()}").changes() == {}
    assert run_folder.compiled({"train": {}}) is False  # from before there was the key
    assert run_folder.compiled({"train": {"compile": "auto"}}) is False


@pytest.mark.parametrize(
    ("new", "grows"), [("7ba", True), ("5ba", False), ("7ep", False), ("60ba", True)]
)
def test_a_duration_may_grow_in_its_unit(tmp_path, new, grows):
    begun(tmp_path)
    change = f"train.max_duration={new}"
    if grows:
        wanted = {"train.max_duration": {"from": "6ba", "to": new}}
        assert folder(tmp_path, change).changes() == wanted
        return
    says, what = problems(tmp_path, change)[::-1]
    assert what == f"train.max_duration: '6ba' there, '{new}' here"
    assert "train.max_duration may grow, in the same unit; or choose another folder" in says


def test_a_change_on_request_is_asked_for_by_its_flags(tmp_path):
    begun(tmp_path)
    changes = ("optimizer.lr=0.5", "objective.label_dropout=0.3")
    *what, says = problems(tmp_path, *changes)
    assert what == [
        "objective.label_dropout: 0.1 there, 0.3 here",
        "optimizer.lr: 0.002 there, 0.5 here",
    ]
    flags = ("objective.label_dropout", "optimizer.lr")
    assert "by adding `" + " ".join(f"--allow-change {key}" for key in flags) + "`, choose" in says
    assert f"out: {tmp_path} holds a run with another configuration; go on" in says
    assert set(folder(tmp_path, *changes, allowed=flags).changes()) == set(flags)
    (left, says) = problems(tmp_path, *changes, allowed=flags[:1])
    assert (left, "--allow-change optimizer.lr`" in says) == (what[1], True)


def test_one_key_that_cannot_change_takes_the_offer_away(tmp_path):
    begun(tmp_path)
    says = problems(tmp_path, "optimizer.lr=0.5", "seed=3")[-1]
    assert "holds a run with another configuration; choose another folder, or delete it" in says


def test_what_a_family_fixes_is_never_changed(tmp_path):
    begun(tmp_path)
    key = "objective.noise_scale"
    says = problems(tmp_path, f"{key}=legacy", allowed=[key])
    assert says[0].startswith(f"--allow-change {key}: it cannot change within a run")
    assert says[-1].endswith("configuration; choose another folder, or delete it")


def test_a_flag_names_a_key_whole(tmp_path):
    begun(tmp_path)
    (told,) = problems(tmp_path, allowed=["optimizer.lrx"])
    assert told.startswith("--allow-change optimizer.lrx: it cannot change")


def test_a_duration_needs_no_flag_and_takes_it(tmp_path):
    begun(tmp_path)
    key = "train.max_duration"
    assert list(folder(tmp_path, f"{key}=9ba", allowed=[key]).changes()) == [key]


def test_another_bundle_to_start_from_is_not_read(tmp_path):
    begun(tmp_path)
    says = problems(tmp_path, "init_from=elsewhere")[-1]
    assert "its states do not read a bundle again: leave the key as it was; or choose" in says


def test_a_key_of_a_later_version_is_told_with_what_else_differs(tmp_path):
    begun(tmp_path)
    there = json.loads((tmp_path / "config.json").read_text())
    there["train"]["later"] = 1
    del there["train"]["compile"]  # and one from before
    (tmp_path / "config.json").write_text(json.dumps(there))
    assert problems(tmp_path, "seed=3")[:-1] == [
        "seed: 0 there, 3 here",
        "train.later: 1 there, None here",
    ]


def test_a_record_that_nobody_could_have_written_is_told_by_what_differs(tmp_path):
    begun(tmp_path)
    there = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(there | {"seed": "x"}))
    assert "seed: 'x' there, 0 here" in problems(tmp_path)


# --- how a run ends and goes on -------------------------------------------------------------------


def test_a_result_finishes_a_run(tmp_path):
    begun(tmp_path)
    assert not folder(tmp_path).finished()
    begun(tmp_path, by="bundle/bundle.json")
    assert folder(tmp_path).finished()
    assert not folder(tmp_path, "train.max_duration=9ba").finished()


def test_a_run_that_grew_is_finished_by_the_result_of_its_new_length(tmp_path):
    begun(tmp_path, "train.max_duration=9ba", by="bundle/bundle.json")
    grown = folder(tmp_path, "train.max_duration=9ba")
    growth = {"train.max_duration": {"from": "6ba", "to": "9ba"}}
    entries: list[dict[str, Any]] = [{"result": "6ba"}]
    ends = (({"changes": {}}, True), ({"changes": growth}, False), ({"result": "9ba"}, True))
    for entry, done in ends:
        entries.append(entry)
        (tmp_path / "history.json").write_text(json.dumps(entries))
        assert (grown.complete(), grown.finished()) == (done, done)


def test_a_start_is_told_all_that_hinders_it(tmp_path):
    assert folder(tmp_path / "new").start_problems() == ["looked for None"]
    begun(tmp_path)
    assert folder(tmp_path).start_problems() == ["looked for None"]
    *_, inputs = folder(tmp_path, "seed=3").start_problems()
    assert inputs == "looked for None"
    begun(tmp_path, by="bundle/bundle.json")
    assert folder(tmp_path).start_problems() == []  # it has ended, and reads nothing
    (told,) = folder(tmp_path, "optimizer.lr=0.5", allowed=["optimizer.lr"]).start_problems()
    assert told.startswith("optimizer.lr: changed, but the run is finished after 6ba")


def test_only_a_run_without_a_state_looks_for_its_bundle(tmp_path):
    change = "init_from=nowhere"
    begun(tmp_path / "one", change, by="unrelated")
    assert folder(tmp_path / "one", change).start_problems() == ["looked for nowhere"]
    begun(tmp_path / "two", change)
    assert folder(tmp_path / "two", change).start_problems() == ["looked for None"]
    (tmp_path / "two" / "config.json").write_text("{")
    assert folder(tmp_path / "two", change).start_problems()[1:] == ["looked for nowhere"]


def test_states_in_a_bucket_may_make_a_bundle_needless(tmp_path):
    there = tmp_path / "bundle"
    bucket = "checkpoint.folder=s3://bucket/states"
    new = tmp_path / "new"
    assert folder(new, f"init_from={there}", bucket).start_problems() == ["looked for None"]
    there.mkdir()
    assert folder(new, f"init_from={there}", bucket).start_problems() == [f"looked for {there}"]


def test_a_claim_writes_the_configuration_unless_it_changed(tmp_path):
    folder(tmp_path / "new", "seed=3").claim()
    assert json.loads((tmp_path / "new/config.json").read_text()) == to_dict(config("seed=3"))
    begun(tmp_path)
    folder(tmp_path, "train.max_duration=9ba").claim()
    there = json.loads((tmp_path / "config.json").read_text())
    assert there["train"]["max_duration"] == "6ba"


def test_a_claim_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_whole", full)
    with pytest.raises(ConfigError, match=r"cannot be written .No space left on device.; choose"):
        folder(tmp_path).claim()


def test_a_start_from_a_bundle_is_noted_once(tmp_path):
    run = folder(tmp_path)
    run.record_start(None)
    assert not (tmp_path / "history.json").exists()
    assert run.start() is None
    run.record({"seed": {}}, 2)
    for bundle in ("one", "two"):  # a start that failed is begun again
        run.record_start({"init_from": bundle})
    assert run.start() == {"time": history(tmp_path)[1]["time"], "init_from": "two"}
    assert [entry.get("init_from") for entry in history(tmp_path)] == [None, "two"]
    before = (tmp_path / "history.json").stat().st_ino
    run.record_start(None)
    assert run.start() is None
    run.record_start(None)
    assert len(history(tmp_path)) == 1
    assert (tmp_path / "history.json").stat().st_ino != before


def test_changes_and_results_are_noted_in_order(tmp_path):
    run = folder(tmp_path)
    run.record_result()  # of a run that was never changed: config.json says all
    assert run.history() == []
    run.record({"seed": {"from": 0, "to": 3}}, 4)
    run.record_result()
    change, result = history(tmp_path)
    assert (change["after_step"], change["changes"]) == (4, {"seed": {"from": 0, "to": 3}})
    assert result["result"] == "6ba"
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(config())
    again = RunFolder(tmp_path, replace(run.config, seed=3))
    assert len(again.history()) == 2
