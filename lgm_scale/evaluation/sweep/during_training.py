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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from lgm_scale.config.loading import read_yaml, to_dict
from lgm_scale.config.schema import GeneratorRun, SpatialRun
from lgm_scale.data.epochs import EpochDataset
from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.features.spaces import Spaces
from lgm_scale.evaluation.sweep.config import SweepConfig, check_sweep
from lgm_scale.evaluation.sweep.families import family_of
from lgm_scale.evaluation.sweep.measure import Sweep
from lgm_scale.evaluation.sweep.results import headline
from lgm_scale.evaluation.sweep.rules import broken_rules
from lgm_scale.families.elit.bundle import SpatialBundle, build_spatial_generator
from lgm_scale.families.elit.pipeline import SpatialPipeline
from lgm_scale.families.lgm.bundle import (
    TOKENIZER_NAME,
    GeneratorBundle,
    build_generator,
    load_tokenizer,
    read_bundle,
)
from lgm_scale.families.lgm.data import TREE_NAME, LatentDataset
from lgm_scale.families.lgm.pipeline import LGMPipeline
from lgm_scale.pipeline import Pipeline
from lgm_scale.storage.files import write_whole
from lgm_scale.training.ema import EMA

__all__ = ["EvaluationDuringTraining", "load_training_sweep"]

log = logging.getLogger("lgm_scale")


def load_training_sweep(config: GeneratorRun | SpatialRun, classes: tuple[str, ...]) -> SweepConfig:
    """The sweep that a run names, checked against the run itself.

    Raises: ConfigError with every problem.
    """
    assert config.evaluation is not None
    path = config.evaluation.sweep
    values = read_yaml(path) | {"bundle": "(this run)", "out": f"{config.out}/evaluation"}
    info = _described(config, classes)

    def rules(sweep: SweepConfig) -> list[str]:
        problems = broken_rules(sweep, info)
        for key in ("part", "search", "metrics_log"):
            if getattr(sweep, key) is not None:
                problems.append(f"{key}: has no place during training; leave it out of this file")
        return problems

    return check_sweep(values, path, rules, family_of(info, "(this run)").sampler)


def _described(config: GeneratorRun | SpatialRun, classes: tuple[str, ...]) -> dict[str, Any]:
    """What bundle.json will say of the run's result, as far as the evaluation asks."""
    models = {"generator": to_dict(config.model)}
    if isinstance(config, SpatialRun):
        models["space"] = to_dict(config.space)
    else:
        models["tokenizer"] = read_bundle(config.tokenizer, "tokenizer")["models"]["tokenizer"]
    kind = SpatialPipeline.kind if isinstance(config, SpatialRun) else LGMPipeline.kind
    training = {"config": to_dict(config)}
    return {"kind": kind, "models": models, "classes": list(classes), "training": training}


@dataclass
class _Subject:
    """What is evaluated: a generator whose weights are still to come."""

    family: type[Pipeline[Any]]
    bundle: Any
    frozen: dict[str, str]
    """Identity of networks that are not trained, and that samples depend on."""
    tokenizer: dict[str, str]
    """Hashes of the files of tokenizer and tree, for reconstructions."""


def _subject(
    config: GeneratorRun | SpatialRun, dataset: EpochDataset, device: torch.device
) -> _Subject:
    classes = dataset.manifest.classes
    info = _described(config, classes)
    if isinstance(config, SpatialRun):
        vae, frozen = None, {}
        if config.space.kind == "sd_vae":
            from lgm_scale.families.elit.sd_vae import load_sd_vae

            assert config.space.vae is not None  # a rule of the configuration
            vae = load_sd_vae(config.space.vae, device)
            frozen = {"vae_sha256": _hash(vae.state_dict())}
        net = build_spatial_generator(config.model, config.space).eval().requires_grad_(False)
        bundle = SpatialBundle(net, vae, config.model, config.space, classes, info)
        return _Subject(SpatialPipeline, bundle, frozen, {})
    assert isinstance(dataset, LatentDataset)
    files = read_bundle(config.tokenizer, "tokenizer")["files"]
    bundle = GeneratorBundle(
        net=build_generator(config.model).eval().requires_grad_(False),
        tokenizer=load_tokenizer(config.tokenizer, device),
        tree=dataset.tree,
        stats=dataset.stats,
        classes=classes,
        info=info,
    )
    own = {name: files[name] for name in (TOKENIZER_NAME, TREE_NAME)}
    return _Subject(LGMPipeline, bundle, {}, own)


class EvaluationDuringTraining(Callback):
    """Runs a sweep on the average of the weights, every `config.evaluation.interval`.

    Args:
        config: Of the run.
        dataset: Gives the classes, and where tokens are merged tree and statistics.
        ema: Its whole average is gathered for each evaluation.

    Raises: ConfigError, CheckpointError, DataError for what cannot work, before training begins.
    """

    def __init__(self, config: GeneratorRun | SpatialRun, dataset: EpochDataset, ema: EMA) -> None:
        assert config.evaluation is not None
        if isinstance(config, GeneratorRun) and config.lora is not None:
            raise ConfigError(
                "evaluation: is for runs that train a whole generator, so far; leave it out with "
                "lora, and run eval/sweep.py on the result"
            )
        self.interval = Time.from_timestring(config.evaluation.interval)
        self.ema, self.out = ema, Path(config.out)
        self.config = replace(
            load_training_sweep(config, dataset.manifest.classes), keep_features=False
        )
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", dist.get_local_rank())
        with _own_randomness():
            self.subject = _subject(config, dataset, self.device)
            image_size = self.subject.family(self.subject.bundle).image_size
            self.spaces = Spaces.load(self.config, image_size, self.device)
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
        subject = self.subject
        pipe = subject.family(subject.bundle, dtype, "(this run)")
        weights = weights | subject.frozen
        return Sweep(config, pipe, weights, subject.tokenizer, self.spaces, quiet=True)

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


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Leave torch's global generators as they were, those of this rank's device too."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


def _hash(weights: dict[str, Tensor]) -> str:
    """SHA-256 of names and values, from rank 0."""
    found: list[Any] = [None]
    if dist.get_global_rank() == 0:
        total = hashlib.sha256()
        for name in sorted(weights):
            total.update(name.encode())
            total.update(weights[name].cpu().contiguous().numpy().tobytes())
        found = [total.hexdigest()]
    dist.broadcast_object_list(found)
    return found[0]
