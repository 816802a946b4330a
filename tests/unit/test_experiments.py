"""Comparisons: their files, what is kept and continued, what a page says. Nothing is trained."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_pipeline import assert_user_error, run_command
from typed_commands import refusal

from experiments import runs
from experiments.__main__ import main
from experiments.config import Experiment, fill, load_experiment, lookup
from experiments.page import markers, render
from experiments.runs import (
    Record,
    equal_steps,
    plan_runs,
    prepare,
    train_and_measure,
    training_work,
)
from lgm_scale.config.loading import load_config, read_yaml, to_dict
from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import ConfigError, DataError
from lgm_scale.evaluation.sweep.config import SweepConfig, expand, with_lists

SHIPPED = ("elastic", "faster", "few_steps", "few_steps_grid", "samplers", "tokenizers")
HOME = Path("yamls/experiments")


def measured(experiment: Experiment) -> str:
    """What the experiment's page holds between its markers."""
    page = Path(experiment.page).read_text(encoding="utf-8")
    begin, end = markers(experiment.section)
    return page.split(f"{begin}\n")[1].split(f"\n{end}")[0]


# --- the file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shipped_is_valid_and_plans_every_run_at_every_seed(name, tmp_path):
    experiment = dataclasses.replace(load_experiment(name), out=str(tmp_path))
    planned, _ = plan_runs(name, experiment, (0, 5), [])
    assert [each.path.name for each in planned] == [
        f"{run.name}-seed{seed}" for run in experiment.runs for seed in (0, 5)
    ]
    for each in planned:
        if each.folder is not None:
            assert each.folder.config.seed == each.record["run"]["seed"]
            assert each.folder.config.out == str(each.path)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shipped_has_the_table_of_its_page(name):
    experiment = load_experiment(name)
    page = measured(experiment)
    for table in experiment.tables:
        assert f"| {' | '.join(column.head for column in table.columns)} |" in page
    cells = [cell for run in experiment.runs for cell in run.cells]
    if name == "samplers":
        assert cells == re.findall(r"^\| (K =.*?) \|", page, re.MULTILINE)


@pytest.mark.parametrize("name", ["elastic", "faster", "samplers"])
def test_every_cell_is_one_valid_row_of_a_sweep(name):
    values = read_yaml(HOME / name / "sweep.yaml")
    for run in load_experiment(name).runs:
        own = with_lists(values | {"cells": list(run.cells.values())})
        cells = expand(load_config(own, SweepConfig))
        assert len(cells) == len(run.cells)
        for label, cell in zip(run.cells, cells, strict=True):
            assert cell.sampler.lengths(cell.num_tokens) == {
                int(k) for k in re.findall(r"\b(?:8|16|32|64)\b", label)
            } | {cell.num_tokens}


def test_only_what_must_differ_does():
    files = {run.name: read_yaml(str(run.config)) for run in load_experiment("elastic").runs}
    for key in ("optimizer", "ema", "objective"):
        assert files["sit"][key] == files["elit"][key] == files["lgm"][key]
    for run in load_experiment("elastic").runs:
        lengths = [cell["num_tokens"] for cell in run.cells.values()]
        assert sorted(files[run.name]["lengths"]["choices"]) == lengths
        assert files[run.name]["train"]["global_batch_size"] == 32
    assert files["sit"]["space"] == files["elit"]["space"]


def small(tmp_path: Path, **changes: Any) -> Path:
    """The file of a comparison of two runs that differ in one value."""
    config = str(HOME / "tokenizers" / "tokenizer.yaml")
    values: dict[str, Any] = {
        "out": str(tmp_path / "runs"),
        "page": str(tmp_path / "page.md"),
        "runs": [
            {"name": "a", "label": "First", "config": config},
            {"name": "b", "config": config, "changes": ["model.length_control=tome"]},
        ],
        "measure": [
            {
                "name": "score",
                "command": "python -m score --of {run.folder}/bundle '--note={run.label} of {out}'",
                "result": "{run.folder}/score.json",
            }
        ],
        "seeds": [0, 1],
        "caption": "{seeds} seeds of {run.steps} steps, {score.images:03d} images.",
        "tables": [
            {
                "columns": [
                    {"head": "run", "value": "run.label"},
                    {"head": "x", "value": "score.values.0", "digits": 1},
                ]
            }
        ],
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def test_every_problem_of_a_file_is_told_at_once(tmp_path):
    measure = {"name": "run", "command": "x {run.foldr}", "result": "{what}"}
    same = {"name": "a", "config": "no.yaml"}
    bare = {"name": "z", "cells": {"x": {}}}
    path = small(
        tmp_path,
        runs=[same, same, bare],
        measure=[measure | {"runs": ["d", "a"]}, measure | {"runs": ["a"]}],
        tables=[{"columns": [{"head": "x", "value": "run.label", "without": ["e"]}]}],
        prepare=["composer 'no end"],
        equal_work="c",
        rows="score.rows",
        seeds=[],
        captions="x",
    )
    with pytest.raises(ConfigError) as caught:
        load_experiment(str(path))
    text = str(caught.value)
    for line in (
        f"19 problems in {path}:",
        "captions: unknown key; did you mean 'caption'?",
        "seeds: empty",
        "runs: 'a' is the name of 2 entries",
        "runs.0.config: no.yaml is not a file",
        "runs.1.cells: empty, and `rows` needs a name for each row",
        "equal_work: 'c' is no run; choose from a, a, z",
        "runs.2.config: missing; name a training run's YAML",
        "measure of a: 'run' is the name of 2 entries",
        "measure.0.runs: d: no run; choose from a, a, z",
        "tables.0.columns.0.without: e: no run; choose from a, a, z",
        "measure.0.name: 'run' is taken",
        "measure.0.command: run.foldr: no 'foldr' here; known: name, label, seed",
        "measure.0.result: what: no 'what' here; known: out, run",
        "prepare.0: No closing quotation",
    ):
        assert line in text


def test_wrong_keys_and_types_inside_entries_are_told(tmp_path):
    entry = {"name": "x", "command": "y", "result": "z"}
    panel = {"x": "a", "y": "b", "x_label": "K"}
    path = small(
        tmp_path,
        measure=[entry | {"resumeable": True}],
        panels=[panel],
        equal_work=3,
    )
    with pytest.raises(ConfigError) as caught:
        load_experiment(str(path))
    for line in (
        "measure.0.resumeable: unknown key; did you mean 'resumable'?",
        "panels.0.y_label: missing",
        "equal_work: 3 is wrong",
    ):
        assert line in str(caught.value)


def test_an_unknown_name_and_a_wrong_option_end_with_status_2():
    for given, line in (
        (["elastik"], "'elastik' is neither a YAML file nor one of elastic, faster, "),
        (["elastic", "--jobs", "0"], "--jobs: 0 must be 1 or more"),
        (["elastic", "modell.size=b"], "modell: unknown key; did you mean 'model'?"),
    ):
        assert line in refusal(main, *given)
    assert_user_error(run_command("-m", "experiments", "elastik", fresh=True), "'elastik' is nei")


# --- paths and templates ------------------------------------------------------------------------


def test_a_path_reaches_mappings_lists_and_each_of_a_list():
    record = {"a": {"8": [[1, 2], [3, 4]]}, "k": 8}
    assert lookup(record, "a.8.1.0") == 3
    assert lookup(record, "a.8.*.-1") == [2, 4]
    assert lookup(record, "a.8.*") == [[1, 2], [3, 4]]
    assert lookup(record, fill("a.{k}.0.1", record)) == 2
    assert fill("{k:04d} of {a.8.0.0}, {not a path}", record) == "0008 of 1, {not a path}"
    for path in ("b", "a.9", "a.8.2", "a.8.x", "k.0"):
        with pytest.raises(DataError, match=re.escape(path.rsplit(".", maxsplit=1)[-1])):
            lookup(record, path)


# --- runs ---------------------------------------------------------------------------------------


def test_every_generator_gets_the_same_work(tmp_path):
    experiment = dataclasses.replace(load_experiment("elastic"), out=str(tmp_path))
    work = {
        run.name: training_work(load_training_run(str(run.config), [], 1, None))
        for run in experiment.runs
    }
    planned, budget = plan_runs("elastic", experiment, (0,), [])
    assert budget is not None
    assert budget == 1000 * work["sit"][0]
    for each in planned:
        per_step, cycle = work[each.run.name]
        steps = int(each.record["run"]["steps"])
        assert f"train.max_duration={steps}ba" in each.changes
        assert steps == equal_steps(per_step, cycle, budget)
        assert steps % cycle == 0  # every length equally often
        assert steps * per_step == pytest.approx(budget, rel=0.01), each.run.name
    assert [each.record["run"]["steps"] for each in planned] == ["1000", "1143", "2616"]
    assert render_caption(experiment, budget).startswith("16.0 TFLOPs of training each; 1 seeds;")


def test_a_step_of_all_lengths_counts_each_of_its_samples(tmp_path):
    config = load_experiment("faster").runs[0].config
    one, all_lengths = (
        training_work(load_training_run(str(config), [f"lengths.per_sample={each}"], 1, None))
        for each in ("false", "true")
    )
    assert (one[1], all_lengths[1]) == (5, 1)  # one step has every length
    assert all_lengths[0] / one[0] == pytest.approx(1.0188, abs=1e-4)  # 13 of 32 at K = 64
    experiment = dataclasses.replace(load_experiment("faster"), out=str(tmp_path))
    planned, _ = plan_runs("faster", experiment, (0,), [])
    steps = {each.run.name: each.record["run"]["steps"] for each in planned}
    assert (steps["plain"], steps["all_lengths"], steps["shorter"]) == ("500", "491", "616")


def test_work_stays_equal_when_the_first_run_is_shortened(tmp_path):
    experiment = dataclasses.replace(load_experiment("elastic"), out=str(tmp_path))
    planned, _ = plan_runs("elastic", experiment, (0,), ["train.max_duration=60ba"])
    assert [each.record["run"]["steps"] for each in planned] == ["60", "69", "156"]
    with pytest.raises(ConfigError, match=r"of 'sit' is 1ep; give it in steps"):
        plan_runs("elastic", experiment, (0,), ["train.max_duration=1ep"])


def render_caption(experiment: Experiment, budget: float) -> str:
    bare = dataclasses.replace(experiment, tables=(), rows="")
    records = [{"sweep": {"rows": [{"num_images": 544}]}}]
    return render(bare, {run.name: records for run in experiment.runs}, budget)


def test_steps_are_whole_cycles_and_never_none():
    assert equal_steps(2.0, 3, 61.0) == 30
    assert equal_steps(2.0, 3, 0.1) == 3


class FakeCommands:
    """Stands for `runs.call`: a training leaves a bundle, a measurement its file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[str]] = []
        self.fail_on = ""
        monkeypatch.setattr(runs, "call", self)

    def __call__(self, command: list[str]) -> None:
        self.calls.append(list(command))
        if self.fail_on and any(self.fail_on in word for word in command):
            raise DataError("stopped")
        if command[0] == "composer":
            config = runs.load_training_run(command[2], command[3:], 1, None)
            folder = runs.RunFolder(Path(config.out), config)
            folder.claim()
            folder.bundle.mkdir(exist_ok=True)
            (folder.bundle / "bundle.json").write_text(json.dumps({"seed": config.seed}))
        else:
            folder_path = Path(command[command.index("--of") + 1]).parent
            seed = int(folder_path.name[-1])
            score = {"images": 7, "values": [seed + 0.5]}
            (folder_path / "score.json").write_text(json.dumps(score))


def execute(path: Path, *overrides: str, jobs: int = 1) -> dict[str, list[Record]]:
    experiment = load_experiment(str(path))
    planned, _ = plan_runs("small", experiment, experiment.seeds, overrides)
    return train_and_measure(experiment, planned, jobs)


@pytest.mark.parametrize("jobs", [1, 3])
def test_runs_are_trained_measured_and_kept(tmp_path, monkeypatch, jobs):
    commands, path = FakeCommands(monkeypatch), small(tmp_path)
    results = execute(path, "train.max_duration=30ba", jobs=jobs)
    controls = [
        json.loads((tmp_path / "runs" / f"{name}-seed1" / "config.json").read_text())["model"]
        for name in "ab"
    ]
    assert [model["length_control"] for model in controls] == ["lgm", "tome"]
    trained = [call for call in commands.calls if call[0] == "composer"]
    assert len(trained) == 4
    assert len(commands.calls) == 8
    assert all(call[-1] == "train.max_duration=30ba" for call in trained)
    assert [record["score"]["values"] for record in results["b"]] == [[0.5], [1.5]]
    score = next(
        call for call in commands.calls if "a-seed1" in " ".join(call[3:5]) and "-m" in call
    )
    assert score[0] == sys.executable
    assert score[-1] == f"--note=First of {tmp_path / 'runs'}"  # one word, filled after the split

    commands.calls.clear()
    assert execute(path, "train.max_duration=30ba") == results
    assert commands.calls == []

    bundle = tmp_path / "runs" / "a-seed0" / "bundle" / "bundle.json"
    bundle.write_text("{}")  # another training's weights: measured anew
    execute(path, "train.max_duration=30ba")
    assert len(commands.calls) == 1


def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch):
    commands, path = FakeCommands(monkeypatch), small(tmp_path)
    commands.fail_on = "b-seed0/bundle"
    with pytest.raises(DataError, match="stopped"):
        execute(path)
    done = {" ".join(call) for call in commands.calls if "b-seed0/bundle" not in " ".join(call)}
    commands.calls, commands.fail_on = [], ""
    execute(path)
    assert not done & {" ".join(call) for call in commands.calls}
    assert any("b-seed0/bundle" in " ".join(call) for call in commands.calls)


def test_a_measurement_of_some_runs_leaves_the_others_alone(tmp_path, monkeypatch):
    FakeCommands(monkeypatch)
    entry = to_dict(load_experiment(str(small(tmp_path))))["measure"][0]
    results = execute(small(tmp_path, measure=[entry | {"runs": ["b"]}]))
    assert ["score" in results[name][0] for name in "ab"] == [False, True]


def test_a_resumable_command_is_called_every_time(tmp_path, monkeypatch):
    commands = FakeCommands(monkeypatch)
    entry = to_dict(load_experiment(str(small(tmp_path))))["measure"][0] | {"resumable": True}
    path = small(tmp_path, measure=[entry])
    execute(path)
    commands.calls.clear()
    execute(path)
    assert len(commands.calls) == 4
    assert not list(tmp_path.rglob("measured.json"))


def test_a_folder_of_another_run_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    commands, path = FakeCommands(monkeypatch), small(tmp_path)
    execute(path)
    commands.calls.clear()
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0.002 there, 0.1 here"):
        execute(path, "optimizer.lr=0.1")
    assert commands.calls == []


def test_a_command_without_its_file_and_one_that_fails_are_data_errors(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"stopped with an error:\nno such luck"):
        runs.call([sys.executable, "-c", "raise SystemExit('no such luck')"])
    FakeCommands(monkeypatch)
    entry = to_dict(load_experiment(str(small(tmp_path))))["measure"][0]
    path = small(tmp_path, measure=[entry | {"result": "{run.folder}/other.json"}])
    with pytest.raises(DataError, match=r"did not write .*other.json"):
        execute(path)


def test_preparation_asks_for_what_is_needed_and_then_runs(tmp_path, monkeypatch):
    commands = FakeCommands(monkeypatch)
    needs = {str(tmp_path): "x", str(tmp_path / "no"): "make demo", "nor/this": "this way"}
    path = small(tmp_path, needs=needs)
    with pytest.raises(ConfigError, match=r"(?s)no is missing: run `make demo`.*nor/this.*`this w"):
        prepare(load_experiment(str(path)))
    path = small(tmp_path, prepare=["composer"])
    monkeypatch.setattr(runs, "call", commands.calls.append)
    prepare(load_experiment(str(path)))
    assert commands.calls == [["composer"]]
