"""Runs of a comparison: planned from its file, trained and measured where that is not done."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import Experiment, Run, fill
from lgm_scale.checkpoint.run_folder import RunFolder
from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import ConfigError, DataError
from lgm_scale.families.base import family_of
from lgm_scale.storage.files import file_hash

Record = dict[str, Any]
KEPT_NAME = "measured.json"


@dataclass(frozen=True)
class PlannedRun:
    """One run at one seed.

    Args:
        changes: `key=value` of the training command.
        record: What templates and columns know of it before it is measured.
    """

    run: Run
    folder: RunFolder
    changes: tuple[str, ...]
    record: Record


def training_work(config: Any) -> tuple[float, int]:
    """Operations of a mean step of a run (forward and backward), and its cycle of lengths."""
    import torch

    choices = config.lengths.choices
    with torch.device("meta"):  # shapes are enough to count
        net: Any = family_of(config).network(config)
    forward = statistics.mean(net.flops(k) for k in choices)
    return 3 * config.train.global_batch_size * forward, len(choices)


def equal_steps(work: float, cycle: int, budget: float) -> int:
    """Steps that make `budget` operations, rounded to whole cycles of lengths.

    `work` is that of a mean step, and `cycle` the steps in which every length had its turn.
    """
    return max(1, round(budget / (work * cycle))) * cycle


def plan_runs(
    name: str, experiment: Experiment, seeds: Sequence[int], overrides: Sequence[str]
) -> tuple[list[PlannedRun], float | None]:
    """Every run at every seed, and the operations of training of each if they are equal.

    Run names of training begin with `name`; `overrides` are `key=value` for every run.

    Raises: ConfigError if a configuration is invalid, or its folder holds another run.
    """
    durations, budget = {}, None
    if experiment.equal_work is not None:
        durations, budget = _equal_durations(experiment, overrides)
    planned = []
    for run in experiment.runs:
        for seed in seeds:
            path = Path(experiment.out) / f"{run.name}-seed{seed}"
            own = (f"seed={seed}", f"run_name={name}-{run.name}-seed{seed}", f"out={path}")
            changes = (*own, *overrides, *durations.get(run.name, ()))
            config = load_training_run(run.config, list(changes), world_size=1, has_gpu=None)
            values = {
                "name": run.name,
                "label": run.label or run.name,
                "seed": seed,
                "folder": str(path),
                "steps": config.train.max_duration.removesuffix("ba"),
                "cells": json.dumps(list(run.cells.values())),
            }
            record = {"out": experiment.out, "run": values}
            planned.append(PlannedRun(run, RunFolder(path, config), changes, record))
    for each in planned:
        each.folder.finished()  # refuses another run's folder before anything is trained
    return planned, budget


def _equal_durations(
    experiment: Experiment, overrides: Sequence[str]
) -> tuple[dict[str, list[str]], float]:
    configs = {
        run.name: load_training_run(run.config, list(overrides), world_size=1, has_gpu=None)
        for run in experiment.runs
    }
    first = experiment.equal_work or ""
    duration = configs[first].train.max_duration
    if not duration.endswith("ba"):
        raise ConfigError(
            f"equal_work: train.max_duration of {first!r} is {duration}; give it in steps (600ba)"
        )
    work = {name: training_work(config) for name, config in configs.items()}
    budget = int(duration.removesuffix("ba")) * work[first][0]
    steps = {name: equal_steps(*each, budget) for name, each in work.items()}
    return {name: [f"train.max_duration={each}ba"] for name, each in steps.items()}, budget


def prepare(experiment: Experiment) -> None:
    """Run what comes before every run. Raises: ConfigError if a path of `needs` is missing."""
    missing = [path for path in experiment.needs if not Path(path).exists()]
    if missing:
        raise ConfigError([f"{path} is missing: run `make quickstart` first" for path in missing])
    for command in experiment.prepare:
        call(words(command, {"out": experiment.out}))


def words(command: str, record: Mapping[str, Any]) -> list[str]:
    """The words of a command, filled in after they were split; `python` is this interpreter."""
    first, *rest = (fill(word, record) for word in shlex.split(command))
    return [sys.executable if first == "python" else first, *rest]


def call(command: Sequence[str]) -> None:
    """Show a command and run it. Raises: DataError if it fails."""
    text = shlex.join(command)
    print("$", text, flush=True)
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode != 0:
        raise DataError(f"{text}: stopped with an error:\n{result.stderr[-3000:]}")


def train_and_measure(
    experiment: Experiment, planned: Sequence[PlannedRun], jobs: int
) -> dict[str, list[Record]]:
    """Records of every run, one per seed; `jobs` runs are worked on at once.

    Raises: DataError if a command fails.
    """
    with ThreadPoolExecutor(jobs) as pool:
        records = list(pool.map(lambda each: _record_of(experiment, each), planned))
    results: dict[str, list[Record]] = {run.name: [] for run in experiment.runs}
    for each, record in zip(planned, records, strict=True):
        results[each.run.name].append(record)
    return results


def _record_of(experiment: Experiment, planned: PlannedRun) -> Record:
    if not planned.folder.finished():
        call(["composer", "lgm_scale/train.py", planned.run.config, *planned.changes])
    kept_path = planned.folder.path / KEPT_NAME
    kept = json.loads(kept_path.read_text()) if kept_path.is_file() else {}
    bundle = file_hash(planned.folder.bundle / "bundle.json")  # it holds the hashes of the weights
    record = dict(planned.record)
    for each in experiment.measure:
        command = words(each.command, record)
        key = [bundle, *command[1:]]
        entry = kept.get(each.name)
        if each.resumable or not isinstance(entry, dict) or entry.get("key") != key:
            call(command)
            result = Path(fill(each.result, record))
            if not result.is_file():
                raise DataError(f"{shlex.join(command)}: did not write {result}")
            entry = {"key": key, "values": json.loads(result.read_text())}
        record[each.name] = entry["values"]
        if not each.resumable:
            kept[each.name] = entry
            kept_path.write_text(json.dumps(kept, indent=1) + "\n")
    return record
