"""Runs of a comparison: planned from its file, trained and measured where that is not done."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.commands import call, words
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
        folder: Where it is trained; None: it is not.
        changes: `key=value` of the training command.
        record: What templates and columns know of it before it is measured.
    """

    run: Run
    path: Path
    folder: RunFolder | None
    changes: tuple[str, ...]
    record: Record


def training_work(config: Any) -> tuple[float, int]:
    """Operations of a mean step of a run (forward and backward), and its cycle of lengths."""
    import torch

    from lgm_scale.training.length_schedule import spread_lengths

    lengths, batch_size, cycle = config.lengths.choices, config.train.global_batch_size, None
    if family_of(config).spreads_lengths(config):  # a step holds all, as nearly as they divide it
        lengths, cycle = spread_lengths(lengths, batch_size), 1
    with torch.device("meta"):  # shapes are enough to count
        net: Any = family_of(config).network(config)
    forward = statistics.mean(net.flops(k) for k in lengths)
    passes = family_of(config).forward_passes(config)
    return passes * batch_size * forward, cycle or len(lengths)


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
            changes = (*own, *run.changes, *overrides, *durations.get(run.name, ()))
            folder, steps = None, ""
            if run.config is not None:
                config = load_training_run(run.config, list(changes), world_size=1, has_gpu=None)
                folder = RunFolder(path, config)
                steps = config.train.max_duration.removesuffix("ba")
            values = {
                "name": run.name,
                "label": run.label or run.name,
                "seed": seed,
                "folder": str(path),
                "steps": steps,
                "cells": json.dumps(list(run.cells.values())),
            }
            record = {"out": experiment.out, "run": values}
            planned.append(PlannedRun(run, path, folder, changes, record))
    for each in planned:
        if each.folder is not None:
            each.folder.finished()  # refuses another run's folder before anything is trained
    return planned, budget


def _equal_durations(
    experiment: Experiment, overrides: Sequence[str]
) -> tuple[dict[str, list[str]], float]:
    configs = {
        run.name: load_training_run(
            run.config, [*run.changes, *overrides], world_size=1, has_gpu=None
        )
        for run in experiment.runs
        if run.config is not None
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
    missing = {path: made for path, made in experiment.needs.items() if not Path(path).exists()}
    if missing:
        raise ConfigError(
            [f"{path} is missing: run `{made}` first" for path, made in missing.items()]
        )
    for command in experiment.prepare:
        call(words(command, {"out": experiment.out}))


def train_and_measure(
    experiment: Experiment, planned: Sequence[PlannedRun], jobs: int
) -> dict[str, list[Record]]:
    """Records of every run, one per seed; `jobs` runs are worked on at once.

    Raises: DataError if a command fails.
    """
    # One seed of every run first: with --seeds, a page can be had before all are done.
    by_seed = sorted(planned, key=lambda each: each.record["run"]["seed"])
    with ThreadPoolExecutor(jobs) as pool:
        records = list(pool.map(lambda each: _record_of(experiment, each), by_seed))
    results: dict[str, list[Record]] = {run.name: [] for run in experiment.runs}
    for each, record in zip(by_seed, records, strict=True):
        results[each.run.name].append(record)
    return results


def _record_of(experiment: Experiment, planned: PlannedRun) -> Record:
    folder, config, bundle = planned.folder, planned.run.config, None
    if folder is not None and config is not None:
        if not folder.finished():
            call(["composer", "lgm_scale/train.py", config, *planned.changes])
        bundle = file_hash(folder.bundle / "bundle.json")  # it holds the hashes of the weights
    kept_path = planned.path / KEPT_NAME
    kept = json.loads(kept_path.read_text()) if kept_path.is_file() else {}
    record = dict(planned.record)
    for each in experiment.measure:
        if each.runs and planned.run.name not in each.runs:
            continue
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
