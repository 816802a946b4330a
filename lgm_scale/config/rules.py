"""Rules between the keys of a training run, and between a run and its machine. Free of torch.

Each rule yields lines `key: value; rule; fix`. `load_training_run` is the door: every problem of
a file, of its types and of these rules comes in one ConfigError, before a GPU is touched. Rules
about the keys of one family of models are in that family's `config.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, get_args, get_type_hints

from lgm_scale.config.loading import (
    check_config,
    find_recipe,
    read_yaml,
)
from lgm_scale.config.schema import TrainingRun
from lgm_scale.data.config import broken_data_rules
from lgm_scale.errors import ConfigError
from lgm_scale.families.base import Family, families, family_of
from lgm_scale.families.generator import generator_families
from lgm_scale.parallel.rules import parallel_rules

_TIME = re.compile(r"[1-9][0-9]*(ep|ba)")


def load_training_run(
    path: str,
    overrides: list[str],
    world_size: int,
    has_gpu: bool | None,
    more: Callable[[TrainingRun], Iterable[str]] = lambda run: (),
) -> TrainingRun:
    """Read, type-check and validate the configuration of a training run.

    Args:
        path: YAML file.
        overrides: `key=value` strings.
        world_size: Number of ranks that will run it.
        has_gpu: Whether ranks have a GPU; None leaves the rules about it out (dry runs).
        more: Gives lines about what is no matter of the configuration alone: data, files, folders.

    Raises: ConfigError with every problem.
    """
    values = read_yaml(path, overrides)
    task = values.get("task")
    if task is None and "cells" in values:
        raise ConfigError(
            f"config: {path} configures a sweep, and a training is needed; start it with "
            "`composer eval/sweep.py`, or give a configuration with a `task`",
        )
    if task not in families():
        raise ConfigError(f"task: {task!r} is unknown; write {' or '.join(families())}", path)
    return check_config(
        values,
        families()[task].schema,
        lambda config: [*broken_rules(config, world_size, has_gpu), *more(config)],
        path,
    )


def broken_rules(config: TrainingRun, world_size: int, has_gpu: bool | None) -> list[str]:
    """Every rule that the configuration breaks at this world size."""
    family = family_of(config)
    problems = [*_batch(config, world_size, family.least_batch(config)), *_lengths(config, family)]
    problems += [*_numbers(config), *_optimizer(config), *_times(config, family)]
    problems += [*_mup(config, family), *_batch_scaling(config)]
    problems += [*_attention(config, has_gpu), *_float8(config, has_gpu)]
    problems += broken_data_rules(config.data)
    problems += parallel_rules(config, world_size, has_gpu)
    problems += family.rules(config)
    if has_gpu is False and config.train.precision == "amp_bf16":
        problems.append("train.precision: amp_bf16 needs a GPU and none is here; use fp32")
    return problems


def uncompiled_reason(config: TrainingRun) -> str | None:
    """Why a run is not compiled on a GPU; None if it is.

    `auto` is on unless a rule would refuse `true`, and that rule's words are the reason.
    """
    wanted = config.train.compile
    if wanted != "auto":
        return None if wanted else "train.compile: false"
    asked = replace(config, train=replace(config.train, compile=True))
    lines = [*parallel_rules(asked, 1, None), *family_of(config).rules(asked)]
    against = [line for line in lines if line.startswith("train.compile: ")]
    if not against:
        return None
    return f"train.compile: auto is off; {against[0].rsplit('; ', 1)[0].split(': ', 1)[1]}"


def _batch(config: TrainingRun, world_size: int, least: int) -> Iterator[str]:
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
    tokens, longest = train.device_microbatch_tokens, max(config.lengths.choices, default=1)
    if tokens is not None and micro is not None:
        yield (
            f"train.device_microbatch_tokens: {tokens} beside train.device_microbatch_size: "
            f"{micro}; set one of them to null"
        )
    if tokens is not None and tokens < longest:
        yield (
            f"train.device_microbatch_tokens: {tokens} does not hold one sample of {longest} "
            f"tokens, the longest of lengths.choices; make it {longest} or more"
        )
    elif tokens is not None and tokens < least * longest:
        yield (
            f"train.device_microbatch_tokens: {tokens} holds too few samples of {longest} tokens "
            f"for the losses, which need {least}; make it {least * longest} or more"
        )
    if micro is not None and 1 <= micro < least:
        yield (
            f"train.device_microbatch_size: {micro} is too small for the losses, which need "
            f"{least} samples; make it {least} or more"
        )
    if per_rank < least:
        yield (
            f"train.global_batch_size: {size} over {world_size} ranks is too small for the "
            f"losses, which need {least} samples on each; make it {least * world_size} or more"
        )


def _lengths(config: TrainingRun, family: Family) -> Iterator[str]:
    choices, weights = config.lengths.choices, config.lengths.weights
    if config.lengths.longest_first < 0:
        yield f"lengths.longest_first: {config.lengths.longest_first} must be 0 or more"
    if not choices:
        yield "lengths.choices: empty; name at least one token length"
    if config.lengths.per_sample and not family.mixes_lengths(config):
        yield (
            "lengths.per_sample: true needs model.length_control: truncate, or a generator on "
            "merged tokens; the others run at one K per batch; set it to false"
        )
    if weights is None:
        return
    if len(weights) != len(choices):
        yield f"lengths.weights: {len(weights)} weights for {len(choices)} choices; give one each"
    if min(weights, default=0) < 0 or sum(weights) <= 0:
        yield f"lengths.weights: {list(weights)} must be 0 or more, with a sum above 0"


def _attention(config: TrainingRun, has_gpu: bool | None) -> Iterator[str]:
    reason = "no GPU is here" if has_gpu is False else uncompiled_reason(config)
    if config.train.attention == "flex" and reason is not None:
        yield f"train.attention: flex needs blocks compiled for a GPU ({reason}); use auto"


def _float8(config: TrainingRun, has_gpu: bool | None) -> Iterator[str]:
    if not config.train.float8:
        return
    reason = uncompiled_reason(config)
    problems = {
        "torchao is not installed; pip install torchao": find_spec("torchao") is None,
        "no GPU is here": has_gpu is False,
        f"the blocks are not compiled ({reason})": reason is not None,
        "train.precision: fp32 rounds nothing": config.train.precision == "fp32",
        f"parallel.strategy: {config.parallel.strategy} was not tried with it; use ddp": (
            config.parallel.strategy != "ddp"
        ),
    }
    for problem, found in problems.items():
        if found:
            yield f"train.float8: true, but {problem}; or set it to false"


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


def _mup(config: TrainingRun, family: Family) -> Iterator[str]:
    base = config.optimizer.mup_base
    model: Any = getattr(config, "model", None)
    if base is None:
        return
    sizes = get_args(get_type_hints(type(model)).get("size"))
    if config.task not in generator_families() or base not in sizes:
        known = f"; it has {', '.join(sizes)}" if config.task in generator_families() else ""
        yield f"optimizer.mup_base: {base} is no size of a generator{known}; set it to null"
        return
    smaller: Any = {"model": replace(model, size=base)}
    there = replace(config, **smaller)
    new = [line for line in family.rules(there) if line not in [*family.rules(config)]]
    yield from (f"optimizer.mup_base: {base} cannot be compared with; {line}" for line in new)


def _times(config: TrainingRun, family: Family) -> Iterator[str]:
    times = {
        "train.max_duration": config.train.max_duration,
        "checkpoint.interval": config.checkpoint.interval,
    }
    if config.logging.pictures is not None:
        times["logging.pictures"] = config.logging.pictures
    reconstructions = family.reconstructions(config)
    if reconstructions is not None:
        times["evaluation.interval"] = reconstructions.interval
    elif "logging.pictures" in times and config.task not in generator_families():
        yield (
            f"logging.pictures: {config.logging.pictures} asks for pictures of validation images; "
            "name them with evaluation.images and evaluation.interval, or set it to null"
        )
    evaluation = family.evaluation(config)
    if evaluation is not None:
        times["evaluation.interval"] = evaluation.interval
        try:
            find_recipe(evaluation.sweep)
        except ConfigError as error:
            problem = error.problems[0].replace("config:", "evaluation.sweep:", 1)
            yield f"{problem} with the keys of a sweep, or leave `evaluation` out"
    for key, value in times.items():
        if not _TIME.fullmatch(value):
            yield f"{key}: {value!r} is no duration; write epochs as 400ep or batches as 1500ba"


def _batch_scaling(config: TrainingRun) -> Iterator[str]:
    if config.train.batch_scaling != "constant_tokens":
        return
    if config.lengths.weights is not None:
        yield (
            "train.batch_scaling: constant_tokens needs a cycle of lengths, or an epoch has no "
            "known number of steps; drop lengths.weights"
        )
    if config.lengths.longest_first:
        yield (
            f"train.batch_scaling: constant_tokens needs a cycle of lengths from the first step; "
            f"set lengths.longest_first to 0, not {config.lengths.longest_first}"
        )
    longest = max(config.lengths.choices, default=1)
    odd = sorted({k for k in config.lengths.choices if k < 1 or longest % k != 0})
    if odd:
        yield (
            f"lengths.choices: {odd} do not divide the longest, {longest}; with "
            "train.batch_scaling: constant_tokens a step takes whole batches"
        )
