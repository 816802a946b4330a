"""The sweep's evaluator during training: the same code on the EMA, every so many steps.

A run asks for it with `evaluation: {interval: 5000ba, sweep: FILE.yaml}`. The file has the keys of
a sweep; bundle and out are the run's own. Results are below `<run>/evaluation`, one folder per
step, and one line per cell in `<run>/evaluation.jsonl`; loggers get the metrics. Training does not
notice: no random number is drawn from a global state, and losses are the same bits with and
without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from composer.loggers import Logger
from torch import Tensor
from typing_extensions import override

from lgm_scale.config.loading import read_yaml
from lgm_scale.config.schema import TrainingRun
from lgm_scale.evaluation.during_training.subjects import GeneratorSubject, own_randomness
from lgm_scale.evaluation.during_training.watching import Watch, record
from lgm_scale.evaluation.engine.parts import from_rank_zero
from lgm_scale.evaluation.sweep.config import SweepConfig
from lgm_scale.evaluation.sweep.measure import Sweep, load_spaces
from lgm_scale.evaluation.sweep.results import headline
from lgm_scale.evaluation.sweep.rules import broken_rules, check_sweep
from lgm_scale.families.base import family_of
from lgm_scale.families.generator import generator_families


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


class EvaluationDuringTraining(Watch):
    """Runs a sweep on the average of the weights, every `config.evaluation.interval`.

    Raises: ConfigError, CheckpointError, DataError for what cannot work, before training begins.
    """

    def __init__(self, config: TrainingRun, subject: GeneratorSubject) -> None:
        evaluation = family_of(config).evaluation(config)
        assert evaluation is not None
        super().__init__(evaluation.interval)
        self.subject, self.out = subject, Path(config.out)
        sweep = load_training_sweep(config, subject.info)
        self.config = replace(sweep, keep_features=False)
        with own_randomness():
            image_size = subject.pipeline().image_size
            self.spaces = load_spaces(self.config, image_size, subject.device)
        frozen = subject.evaluated.frozen
        self.frozen = {name: _hash(weights) for name, weights in frozen.items()}
        self._sweep(0, {})  # finds out now what would fail then

    @override
    def look(self, step: int, logger: Logger | None = None) -> list[dict[str, Any]]:
        """Rows of the average as it is now. Every rank must call it."""
        with self.subject.average() as average:
            self.subject.info["training"]["steps"] = step
            rows = self._sweep(step, {"ema_sha256": _hash(average)}).run({})["rows"]
        lines = [f"{row['label']} | {headline(row)}" for row in rows]
        record(self.out, step, rows, lines, logger)
        return rows

    def _sweep(self, step: int, weights: dict[str, Any]) -> Sweep:
        config = replace(self.config, out=str(self.out / "evaluation" / f"step-{step:08d}"))
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
        pipe, files = self.subject.pipeline(dtype), dict(self.subject.evaluated.reconstruction)
        return Sweep(config, pipe, weights | self.frozen, files, self.spaces, quiet=True)


def _hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values, from rank 0."""

    def compute() -> str:
        total = hashlib.sha256()
        for name in sorted(weights):
            total.update(name.encode())
            total.update(weights[name].cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    return from_rank_zero(compute)
