"""The sweep's evaluator during training: the same code on the EMA, every so many steps.

A run asks for it with `evaluation: {interval: 5000ba, sweep: FILE.yaml}`. The file has the keys of
a sweep; bundle and out are the run's own. Results are below `<run>/evaluation`, one folder per
step, and one line per cell in `<run>/evaluation.jsonl`; loggers get the metrics. Training does not
notice: no random number is drawn from a global state, and losses are the same bits with and
without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from lgm_scale.config.loading import read_yaml, to_dict
from lgm_scale.config.schema import TrainingRun
from lgm_scale.data.epochs import EpochDataset
from lgm_scale.evaluation.engine.parts import from_rank_zero
from lgm_scale.evaluation.sweep.config import SweepConfig
from lgm_scale.evaluation.sweep.measure import Sweep, load_spaces
from lgm_scale.evaluation.sweep.results import headline
from lgm_scale.evaluation.sweep.rules import broken_rules, check_sweep
from lgm_scale.families.base import family_of, generator_families
from lgm_scale.storage.files import write_whole
from lgm_scale.training.ema import EMA

log = logging.getLogger("lgm_scale")


def load_training_sweep(config: TrainingRun, info: dict[str, Any]) -> SweepConfig:
    """The sweep that a run names, checked against the run itself.

    `info` is what the run's bundle.json will say.

    Raises: ConfigError with every problem.
    """
    evaluation = family_of(config).evaluation(config)
    assert evaluation is not None
    path = evaluation.sweep
    values = read_yaml(path) | {"bundle": "(this run)", "out": f"{config.out}/evaluation"}

    def rules(sweep: SweepConfig) -> list[str]:
        problems = broken_rules(sweep, info)
        for key in ("part", "search", "metrics_log"):
            if getattr(sweep, key) is not None:
                problems.append(f"{key}: has no place during training; leave it out of this file")
        return problems

    return check_sweep(values, path, rules, generator_families()[config.task].sampler_defaults)


class EvaluationDuringTraining(Callback):
    """Runs a sweep on the average of the weights, every `config.evaluation.interval`.

    Args:
        dataset: The training set; gives the classes.
        ema: Its whole average is gathered for each evaluation.

    Raises: ConfigError, CheckpointError, DataError for what cannot work, before training begins.
    """

    def __init__(self, config: TrainingRun, dataset: EpochDataset, ema: EMA) -> None:
        family = generator_families()[config.task]
        evaluation = family.evaluation(config)
        assert evaluation is not None
        self.interval = Time.from_timestring(evaluation.interval)
        self.ema, self.out, self.pipeline = ema, Path(config.out), family.pipeline()
        info = {
            "kind": config.task,
            "models": family.described_models(config),
            "classes": list(dataset.manifest.classes),
            "training": {"config": to_dict(config)},
        }
        self.config = replace(load_training_sweep(config, info), keep_features=False)
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", dist.get_local_rank())
        with _own_randomness():
            self.subject = family.evaluated(config, dataset, info, self.device)
            image_size = self.pipeline(self.subject.bundle).image_size
            self.spaces = load_spaces(self.config, image_size, self.device)
        self.frozen = {name: _hash(weights) for name, weights in self.subject.frozen.items()}
        self._sweep(0, {})  # finds out now what would fail then

    def batch_end(self, state: State, logger: Logger) -> None:
        """Evaluate if an interval of steps is over; after the average has moved."""
        if self.interval.unit is TimeUnit.BATCH:
            self._evaluate_at(state.timestamp.batch.value, self.interval.value, state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Evaluate if an interval of epochs is over."""
        if self.interval.unit is TimeUnit.EPOCH:
            self._evaluate_at(state.timestamp.epoch.value, self.interval.value, state, logger)

    def _evaluate_at(self, now: int, every: int, state: State, logger: Logger) -> None:
        if now % every == 0:
            self.evaluate(state.timestamp.batch.value, logger)

    def evaluate(self, step: int, logger: Logger | None = None) -> list[dict[str, Any]]:
        """Rows of the average as it is now. Every rank must call it."""
        with _own_randomness():
            average, bundle = self.ema.full_weights(), self.subject.bundle
            state = bundle.net.state_dict()
            assert average.keys() <= state.keys(), "the average belongs to another network"
            bundle.net.load_state_dict(state | average)
            bundle.info["training"]["steps"] = step
            bundle.net.to(self.device)
            rows = self._sweep(step, {"ema_sha256": _hash(average)}).run({})["rows"]
            bundle.net.to("cpu")  # the training has the memory again
        self._record(step, rows, logger)
        return rows

    def _sweep(self, step: int, weights: dict[str, Any]) -> Sweep:
        config = replace(self.config, out=str(self.out / "evaluation" / f"step-{step:08d}"))
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
        pipe = self.pipeline(self.subject.bundle, dtype, "(this run)")
        files = dict(self.subject.reconstruction)
        return Sweep(config, pipe, weights | self.frozen, files, self.spaces, quiet=True)

    def _record(self, step: int, rows: list[dict[str, Any]], logger: Logger | None) -> None:
        for row in rows:
            label = row["label"]
            if logger is not None:
                metrics = {f"evaluation/{label}/{k}": v for k, v in row["metrics"].items()}
                logger.log_metrics(metrics, step=step)
            if dist.get_global_rank() == 0:
                log.info("evaluation after step %d | %s | %s", step, label, headline(row))
        if dist.get_global_rank() == 0:
            path = self.out / "evaluation.jsonl"
            kept = path.read_text().splitlines(keepends=True) if path.is_file() else []
            kept = [line for line in kept if json.loads(line)["step"] < step]
            lines = [
                json.dumps({key: row[key] for key in ("label", "num_images", "metrics", "names")}
                           | {"step": step}) + "\n"
                for row in rows
            ]  # fmt: skip
            write_whole(path, "".join([*kept, *lines]))


def _own_randomness() -> AbstractContextManager[None]:
    """Leave torch's global generators as they were, those of this rank's device too."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices)


def _hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values, from rank 0."""

    def compute() -> str:
        total = hashlib.sha256()
        for name in sorted(weights):
            total.update(name.encode())
            total.update(weights[name].cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    return from_rank_zero(compute)
