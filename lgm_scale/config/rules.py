"""Rules between the keys of a training run, and between a run and its machine. Free of torch.

Each rule yields lines `key: value; rule; fix`. `load_training_run` is the door: every problem of
a file, of its types and of these rules comes in one ConfigError, before a GPU is touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lgm_scale.config.loading import InvalidValues, find_recipe, load_config, read_yaml
from lgm_scale.config.schema import (
    TRAINING_TASKS,
    GeneratorRun,
    SpatialRun,
    TokenizerRun,
    TrainingRun,
)
from lgm_scale.data.config import broken_data_rules
from lgm_scale.errors import ConfigError
from lgm_scale.families.elit.rules import spatial_rules
from lgm_scale.parallel.rules import parallel_rules

__all__ = ["broken_rules", "load_training_run"]

_TIME = re.compile(r"[1-9][0-9]*(ep|ba)")


def load_training_run(
    path: str, overrides: list[str], world_size: int, has_gpu: bool | None
) -> TrainingRun:
    """Read, type-check and validate the configuration of a training run.

    Args:
        path: YAML file.
        overrides: `key=value` strings.
        world_size: Number of ranks that will run it.
        has_gpu: Whether ranks have a GPU; None leaves the rules about it out (dry runs).

    Raises: ConfigError with every problem.
    """
    values = read_yaml(path, overrides)
    task = values.get("task")
    if task not in TRAINING_TASKS:
        known = " or ".join(TRAINING_TASKS)
        raise ConfigError(f"task: {task!r} is unknown; write {known}", path)
    problems: list[str] = []
    config: TrainingRun | None
    try:
        config = load_config(values, TRAINING_TASKS[task], path)
    except InvalidValues as error:
        problems, config = error.problems, error.rest
    if config is not None:
        told = {problem.split(":")[0] for problem in problems}
        problems += [
            problem
            for problem in broken_rules(config, world_size, has_gpu)
            if problem.split(":")[0] not in told
        ]
    if problems or config is None:
        raise ConfigError(problems, path)
    return config


def broken_rules(config: TrainingRun, world_size: int, has_gpu: bool | None) -> list[str]:
    """Every rule that the configuration breaks at this world size."""
    problems = [*_batch(config, world_size), *_lengths(config), *_numbers(config)]
    problems += [*_optimizer(config), *_times(config), *_batch_scaling(config)]
    problems += broken_data_rules(config.data)
    problems += parallel_rules(config, world_size, has_gpu)
    if isinstance(config, TokenizerRun):
        problems += _tokenizer(config)
    elif isinstance(config, SpatialRun):
        problems += spatial_rules(config)
    else:
        problems += _generator(config)
    if not isinstance(config, TokenizerRun):
        problems += _flow(config)
    adapter = isinstance(config, GeneratorRun) and config.lora is not None
    if config.train.compile and (isinstance(config, TokenizerRun) or adapter):
        problems.append(
            "train.compile: true is for generators without lora, so far; set it to false"
        )
    if has_gpu is False and config.train.precision == "amp_bf16":
        problems.append("train.precision: amp_bf16 needs a GPU and none is here; use fp32")
    return problems


def _batch(config: TrainingRun, world_size: int) -> Iterator[str]:
    train = config.train
    size, micro = train.global_batch_size, train.device_microbatch_size
    if size < 1:
        yield f"train.global_batch_size: {size} must be 1 or more"
        return
    if size % world_size != 0:
        below = size // world_size * world_size
        near = [str(value) for value in (below, below + world_size) if value > 0]
        yield (
            f"train.global_batch_size: {size} is not divisible by {world_size} ranks; "
            f"nearest valid: {' or '.join(near)}"
        )
        return
    per_rank = size // world_size
    if micro is not None and (micro < 1 or per_rank % micro != 0):
        valid = [value for value in range(1, per_rank + 1) if per_rank % value == 0]
        yield (
            f"train.device_microbatch_size: {micro} does not divide the {per_rank} samples per "
            f"rank ({size} over {world_size} ranks); valid: {', '.join(map(str, valid))}"
        )


def _lengths(config: TrainingRun) -> Iterator[str]:
    choices, weights = config.lengths.choices, config.lengths.weights
    if not choices:
        yield "lengths.choices: empty; name at least one token length"
    if not isinstance(config, SpatialRun):
        yield from _outside(config)
    if config.lengths.per_sample:
        yield from _per_sample(config)
    if weights is None:
        return
    if len(weights) != len(choices):
        yield f"lengths.weights: {len(weights)} weights for {len(choices)} choices; give one each"
    if min(weights, default=0) < 0 or sum(weights) <= 0:
        yield f"lengths.weights: {list(weights)} must be 0 or more, with a sum above 0"


def _outside(config: TokenizerRun | GeneratorRun) -> Iterator[str]:
    lowest, highest = _least_tokens(config), config.model.num_base_tokens
    outside = [value for value in config.lengths.choices if not lowest <= value <= highest]
    if outside:
        yield (
            f"lengths.choices: {outside} outside [{lowest}, {highest}], the range from one token "
            "per block to no merging"
        )


def _least_tokens(config: TokenizerRun | GeneratorRun) -> int:
    """The least K of the model's length control."""
    if isinstance(config, GeneratorRun):
        return config.model.num_blocks
    model = config.model
    special = {"truncate": 1, "none": model.num_base_tokens}
    return special.get(model.length_control, model.num_codebooks)


def _per_sample(config: TrainingRun) -> Iterator[str]:
    if not isinstance(config, TokenizerRun) or config.model.length_control != "truncate":
        yield (
            "lengths.per_sample: true needs model.length_control: truncate; the others run at "
            "one K per batch"
        )


def _numbers(config: TrainingRun) -> Iterator[str]:
    optimizer = config.optimizer
    positive = {
        "optimizer.lr": optimizer.lr,
        "logging.interval": config.logging.interval,
        "checkpoint.keep": config.checkpoint.keep,
    }
    if config.logging.peak_tflops is not None:
        positive["logging.peak_tflops"] = config.logging.peak_tflops
    for key, value in positive.items():
        if value <= 0:
            yield f"{key}: {value} must be above 0"
    not_negative = {
        "optimizer.weight_decay": optimizer.weight_decay,
        "optimizer.warmup": optimizer.warmup,
        "optimizer.min_lr": optimizer.min_lr,
        "data.num_workers": config.data.num_workers,
        "seed": config.seed,
    }
    for key, value in not_negative.items():
        if value < 0:
            yield f"{key}: {value} must be 0 or more"
    if not 0 <= config.ema.decay < 1:
        yield f"ema.decay: {config.ema.decay} must be in [0, 1)"
    if config.ema.interval < 1:
        yield f"ema.interval: {config.ema.interval} must be 1 or more"


def _optimizer(config: TrainingRun) -> Iterator[str]:
    optimizer = config.optimizer
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield f"optimizer.betas: {list(optimizer.betas)} must be in [0, 1)"
    if optimizer.clip_norm is not None and optimizer.clip_norm <= 0:
        yield f"optimizer.clip_norm: {optimizer.clip_norm} must be above 0; null turns it off"
    if optimizer.schedule == "constant" and optimizer.min_lr > 0:
        yield "optimizer.min_lr: has no effect with schedule: constant; use cosine or drop it"
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr: {optimizer.min_lr} is above lr {optimizer.lr}"


def _times(config: TrainingRun) -> Iterator[str]:
    times = {
        "train.max_duration": config.train.max_duration,
        "checkpoint.interval": config.checkpoint.interval,
    }
    if not isinstance(config, TokenizerRun) and config.evaluation is not None:
        times["evaluation.interval"] = config.evaluation.interval
        try:
            find_recipe(config.evaluation.sweep)
        except ConfigError as error:
            problem = error.problems[0].replace("config:", "evaluation.sweep:", 1)
            yield f"{problem} with the keys of a sweep, or leave `evaluation` out"
    for key, value in times.items():
        if not _TIME.fullmatch(value):
            yield f"{key}: {value!r} is no duration; write epochs as 400ep or batches as 1500ba"


def _tokenizer(config: TokenizerRun) -> Iterator[str]:
    model = config.model
    if model.dropped_tokens != "zero" and model.length_control != "truncate":
        yield (
            f"model.dropped_tokens: {model.dropped_tokens} has no effect with length_control: "
            f"{model.length_control}, which drops no tokens; remove it"
        )
    if model.image_size < 1 or model.patch_size < 1 or model.image_size % model.patch_size != 0:
        yield (
            f"model.image_size: {model.image_size} is not divisible by patch_size "
            f"{model.patch_size}"
        )
    if model.num_codebooks < 1 or model.num_base_tokens % max(model.num_codebooks, 1) != 0:
        yield (
            f"model.num_base_tokens: {model.num_base_tokens} is not divisible by num_codebooks "
            f"{model.num_codebooks}; tokens merge within equal segments only"
        )
    elif model.num_base_tokens <= model.num_codebooks:
        yield f"model.num_base_tokens: {model.num_base_tokens} leaves nothing to merge"
    if model.latent_init == "aligned" and round(model.num_base_tokens**0.5) ** 2 != (
        model.num_base_tokens
    ):
        yield (
            f"model.latent_init: aligned needs a square num_base_tokens, not "
            f"{model.num_base_tokens}; use normal"
        )
    for name, value in vars(config.objective).items():
        if value < 0:
            yield f"objective.{name}: {value} must be 0 or more"
    if model.pretrained_encoder is not None and model.size == "tiny":
        yield "model.pretrained_encoder: there is none of size tiny; use null, or size s, b or l"


def _batch_scaling(config: TrainingRun) -> Iterator[str]:
    if config.train.batch_scaling != "constant_tokens":
        return
    if isinstance(config, TokenizerRun):
        yield (
            "train.batch_scaling: constant_tokens is for generators; a tokenizer's step costs the "
            "same at every length"
        )
    if isinstance(config, SpatialRun):
        yield (
            "train.batch_scaling: constant_tokens is for generators of merged tokens; the first "
            "and last blocks of this one see all tokens at every length"
        )
    if config.lengths.weights is not None:
        yield (
            "train.batch_scaling: constant_tokens needs a cycle of lengths, or an epoch has no "
            "known number of steps; drop lengths.weights"
        )
    longest = max(config.lengths.choices, default=1)
    odd = sorted({k for k in config.lengths.choices if k < 1 or longest % k != 0})
    if odd:
        yield (
            f"lengths.choices: {odd} do not divide the longest, {longest}; with "
            "train.batch_scaling: constant_tokens a step takes whole batches"
        )


def _lora(config: GeneratorRun) -> Iterator[str]:
    if config.lora is None:
        return
    if len(set(config.lengths.choices)) > 1:
        lengths = ", ".join(map(str, sorted(set(config.lengths.choices))))
        yield f"lengths.choices: {lengths}; an adapter (lora) is for one token length, name one"
    for key, value in (("rank", config.lora.rank), ("alpha", config.lora.alpha)):
        if value <= 0:
            yield f"lora.{key}: {value} must be above 0"


def _generator(config: GeneratorRun) -> Iterator[str]:
    yield from _lora(config)
    model: Any = config.model
    for name in ("latent_dim", "num_base_tokens", "num_blocks", "num_classes"):
        if getattr(model, name) < 1:
            yield f"model.{name}: {getattr(model, name)} must be 1 or more"
    if model.num_blocks >= 1 and model.num_base_tokens % model.num_blocks != 0:
        yield (
            f"model.num_base_tokens: {model.num_base_tokens} is not divisible by num_blocks "
            f"{model.num_blocks}"
        )


def _flow(config: GeneratorRun | SpatialRun) -> Iterator[str]:
    if not 0 <= config.objective.label_dropout < 1:
        yield f"objective.label_dropout: {config.objective.label_dropout} must be in [0, 1)"
    if config.objective.timestep_std <= 0:
        yield f"objective.timestep_std: {config.objective.timestep_std} must be above 0"
