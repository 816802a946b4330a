"""From a configuration to objects: one small function per part. The only file that knows both."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from composer import Trainer
from composer.core import Algorithm, Callback, DataSpec
from composer.optim import (
    ComposerScheduler,
    ConstantScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
)
from composer.utils import dist
from torch import Tensor, nn

from lgm_scale.checkpoint.checkpointer import Checkpointer
from lgm_scale.checkpoint.run_folder import HISTORY_NAME, METRICS_NAME, RunFolder
from lgm_scale.checkpoint.saver import StateSaver
from lgm_scale.config.inputs import count_problems
from lgm_scale.config.loading import to_dict
from lgm_scale.config.schema import OptimizerConfig, TrainingRun
from lgm_scale.data.epochs import CheckedLoader, EpochDataset, StreamOptions
from lgm_scale.data.streaming_internals import num_ranks, rank_place
from lgm_scale.errors import CheckpointError, ConfigError, DataError, LGMError
from lgm_scale.families.base import family_of
from lgm_scale.initial_weights import initial_weights
from lgm_scale.layers import choose_attention, initial_deviations
from lgm_scale.parallel.blocks import checkpoint_blocks, compile_blocks, transformer_blocks
from lgm_scale.parallel.collectives import on_rank_zero, raise_everywhere
from lgm_scale.parallel.float8 import float8_problem, use_float8
from lgm_scale.parallel.trainers import start_trainer
from lgm_scale.training.batch_scaling import (
    LoaderStep,
    ScaledLoader,
    split_by_tokens,
    split_evenly,
)
from lgm_scale.training.callbacks import MetricsLog, StepKeys
from lgm_scale.training.clipping import GroupClipping, parameters_of
from lgm_scale.training.ema import EMA
from lgm_scale.training.guard import FiniteGuard
from lgm_scale.training.length_schedule import LengthSchedule, spread_lengths
from lgm_scale.training.loggers import build_loggers
from lgm_scale.training.model import TrainingModel
from lgm_scale.training.stopping import StopRequest, ignore_stop_signals
from lgm_scale.training.throughput import Resources, Throughput
from lgm_scale.weights import Unfilled

log = logging.getLogger("lgm_scale")


def build_dataset(config: TrainingRun) -> EpochDataset:
    """The training set, checked against the model it is for. Raises: DataError."""
    batch_size = config.train.global_batch_size // dist.get_world_size()
    data = config.data
    options = StreamOptions(data.patience, data.predownload, data.cache_limit)
    dataset = family_of(config).dataset(config, batch_size, options)
    problems = list(count_problems(config, dataset.epoch_samples, dataset.manifest))
    if problems:
        raise DataError("\n".join(problems))
    return dataset


def take_initial_weights(
    config: TrainingRun, model: TrainingModel, dataset: EpochDataset, folder: RunFolder
) -> None:
    """Copy the weights of the bundle in `init_from`; without one, start as drawn, or as muP has it.

    What is taken is said and recorded. For a run without a state. On all ranks, before a strategy
    is applied: each holds the network as it does without a bundle, and one more weight at a time.

    Raises: CheckpointError; ConfigError for a weight that does not fit.
    """
    if config.init_from is None:
        start_as_base(config, model.net)
        on_rank_zero(lambda: folder.record_start(None))
        return
    files = on_rank_zero(lambda: initial_weights(config).info["files"])
    lines, error = [], None
    try:
        start = initial_weights(config, whole=dist.get_local_rank() == 0)  # hashed once per node
        if start.info["files"] != files:
            raise CheckpointError(
                f"init_from: {config.init_from} is another bundle on rank {dist.get_global_rank()} "
                "than on rank 0; put it where every node sees it"
            )
        lines = start.load(model.net, dataset)
    except LGMError as problem:
        error = problem
    raise_everywhere(error)

    def record() -> None:
        folder.record_start({"init_from": config.init_from, "files": files, "taken": lines})
        for line in lines:
            log.info("init_from: %s", line)

    on_rank_zero(record)


def build_data(config: TrainingRun, dataset: EpochDataset, lengths: LengthSchedule) -> DataSpec:
    """The loader of this rank's batches, and how they are counted and split."""
    train, batch_size = config.train, config.train.global_batch_size // dist.get_world_size()
    scaled, tokens = train.batch_scaling == "constant_tokens", train.device_microbatch_tokens
    if scaled and tokens is None:
        size = train.device_microbatch_size or batch_size
        tokens = size * max(config.lengths.choices)
    split = None if tokens is None else split_by_tokens(tokens)
    if family_of(config).spreads_lengths(config):
        split = split_evenly
    loader_class = partial(ScaledLoader, schedule=lengths) if scaled else CheckedLoader
    loader = loader_class(
        dataset,
        batch_size=batch_size,
        num_workers=config.data.num_workers,
        persistent_workers=config.data.num_workers > 0,
        worker_init_fn=ignore_stop_signals,
        pin_memory=torch.cuda.is_available(),
    )
    return DataSpec(
        loader,
        microbatch_transforms=dataset.finish_batch,
        get_num_samples_in_batch=lambda batch: len(batch["sample_ids"]),
        split_batch=split,
    )


def fan_in_growth(config: TrainingRun, net: nn.Module) -> dict[Tensor, float]:
    """Weights of linear layers -> their fan-in over what it is at the size `optimizer.mup_base`.

    Before a strategy is applied, which may rename or replace weights. Empty without that size.
    """
    if config.optimizer.mup_base is None:
        return {}
    base = {
        _in_any_block(name): layer.in_features
        for name, layer in _base_network(config).named_modules()
        if isinstance(layer, nn.Linear)
    }
    return {
        layer.weight: layer.in_features / base[_in_any_block(name)]
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Linear)
    }


def start_as_base(config: TrainingRun, net: nn.Module) -> None:
    """Rescale fresh weights so that they start as muP has it from `optimizer.mup_base` on.

    A weight whose fan-in is f times that of the base has the base's standard deviation over
    sqrt(f), and that of an input the base's own. Biases, norms and tables stay as drawn, as does
    every weight of the base's size, to the bit. On all ranks, before a strategy is applied.

    Source: arXiv 2203.03466, table 8.
    """
    if config.optimizer.mup_base is None:
        return
    growth = fan_in_growth(config, net)
    there = initial_deviations(_base_network(config))
    base = {_in_any_block(name): deviation for name, deviation in there.items()}
    with torch.no_grad():
        for name, drawn in initial_deviations(net).items():
            weight: Any = net.get_submodule(name).weight
            wanted = base[_in_any_block(name)] / growth.get(weight, 1.0) ** 0.5
            if wanted != drawn:
                weight.mul_(wanted / drawn)


def _base_network(config: TrainingRun) -> nn.Module:
    """The run's network in the size of `optimizer.mup_base`, on the meta device."""
    model: Any = getattr(config, "model")  # noqa: B009 - of every generator
    smaller: Any = {"model": replace(model, size=config.optimizer.mup_base)}
    with torch.device("meta"), Unfilled():
        return family_of(config).network(replace(config, **smaller))


def _in_any_block(name: str) -> str:
    """A module's name without its block's number: depths differ, blocks of one network do not."""
    return re.sub(r"(^|\.)blocks\.\d+\.", r"\1blocks.0.", name)


def build_optimizer(
    config: OptimizerConfig,
    parameter_groups: dict[str, list[nn.Module]],
    growth: Mapping[Tensor, float] = MappingProxyType({}),
) -> torch.optim.AdamW:
    """One AdamW for all groups; weight decay on matrices and tables, not on biases and gains.

    A matrix of `growth` f learns at lr / f, and so its decay is smaller, too; others at lr.
    """
    groups = []
    for modules in parameter_groups.values():
        parameters = [p for p in parameters_of(modules) if p.requires_grad]
        by_growth: dict[float, list[nn.Parameter]] = {1.0: []}  # first, for metrics show its rate
        for matrix in (p for p in parameters if p.ndim >= 2):
            by_growth.setdefault(growth.get(matrix, 1.0), []).append(matrix)
        groups += [
            {"params": matrices, "weight_decay": config.weight_decay, "lr": config.lr / factor}
            for factor, matrices in by_growth.items()
        ]
        groups.append({"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, fused=torch.cuda.is_available()
    )


def build_scheduler(config: OptimizerConfig) -> ComposerScheduler:
    """Constant, or cosine to min_lr; linear warm-up over `warmup` steps."""
    warmup = f"{config.warmup}ba"
    # Composer asks at every start whether 0 is a mistake. Ours is in batches, and the user's.
    warnings.filterwarnings("ignore", message="The warmup duration is 0")
    if config.schedule == "cosine":
        return CosineAnnealingWithWarmupScheduler(warmup, alpha_f=config.min_lr / config.lr)
    return ConstantWithWarmupScheduler(warmup) if config.warmup else ConstantScheduler()


def lengths_of_step(config: TrainingRun, first: int = 0, every: int = 1) -> list[int] | None:
    """K of a step's samples, of which a rank reads every n-th; None unless it holds all lengths."""
    if not family_of(config).spreads_lengths(config):
        return None
    return spread_lengths(config.lengths.choices, config.train.global_batch_size, first, every)


def _clipping(config: TrainingRun, model: TrainingModel) -> list[Algorithm]:
    threshold = config.optimizer.clip_norm
    if threshold is None or config.parallel.strategy == "deepspeed":  # the engine clips
        return []
    return [GroupClipping(model.parameter_groups(), threshold, model.record)]


def _throughput(config: TrainingRun, model: TrainingModel) -> Throughput:
    """Images, tokens and operations per second, for the loggers."""
    peak = config.logging.peak_tflops
    if peak is not None and family_of(config).forward_passes(config) != 3:
        peak = None  # a frozen network's backward pass costs less than the count says
    net: Any = model.net
    # Counted now: a network may read sizes off its weights, which FSDP is about to cut.
    flops = {k: net.flops(k) for k in set(config.lengths.choices)}.__getitem__
    peak_flops, spread = None if peak is None else peak * 1e12, lengths_of_step(config) or ()
    return Throughput(config.logging.interval, flops, peak_flops, spread)


def _watching(config: TrainingRun, dataset: EpochDataset, ema: EMA) -> list[Callback]:
    """What looks at the average of the weights while the run trains. Every rank must call it."""
    family, pictures = family_of(config), config.logging.pictures
    reconstructions = family.reconstructions(config)
    sweeps = family.evaluation(config) is not None
    if reconstructions is None and not sweeps and pictures is None:
        return []
    # Late: the evaluator's imports are for those who ask for it.
    from lgm_scale.evaluation.during_training.subjects import GeneratorSubject, TokenizerSubject
    from lgm_scale.evaluation.during_training.sweeps import EvaluationDuringTraining
    from lgm_scale.evaluation.during_training.watching import Pictures, Reconstructions, Watch

    looks: list[Watch] = []
    if reconstructions is not None:
        subject = TokenizerSubject(config, reconstructions, ema)
        count = reconstructions.num_images
        looks.append(Reconstructions(reconstructions.interval, subject, count))
    else:
        subject = GeneratorSubject(config, dataset, ema)
        looks += [EvaluationDuringTraining(config, subject)] if sweeps else []
    return [*looks, *([] if pictures is None else [Pictures(pictures, subject)])]


def build_trainer(
    config: TrainingRun,
    model: TrainingModel,
    dataset: EpochDataset,
    ema: EMA,
    checkpointer: Checkpointer,
    stop: StopRequest,
) -> Trainer:
    """Composer's trainer under the run's strategy. `checkpointer` is bound to it, not begun."""
    where = checkpointer.storage.root
    lower = f"optimizer.lr={config.optimizer.lr / 2:g} --allow-change optimizer.lr"
    advice = (
        f"The same command alone would come here again: add `{lower}` to go on with a lower "
        f"learning rate, from the last whole state in {where} (from the start where there is "
        "none yet), or look at the data."
    )
    asked = config.lengths
    lengths = LengthSchedule(asked.choices, asked.weights, config.seed, asked.longest_first)
    if config.train.float8:
        problem = float8_problem(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        raise_everywhere(None if problem is None else ConfigError(f"train.float8: {problem}"))
        use_float8(transformer_blocks(model))
    growth = fan_in_growth(config, model.net)
    checkpoint_blocks(transformer_blocks(model), config.parallel.activation_checkpointing)
    choose_attention(model.net, config.train.attention)
    if config.train.compile is True:  # auto is settled before
        compile_blocks(model.net, asked.choices)
    metrics, history = (Path(config.out) / name for name in (METRICS_NAME, HISTORY_NAME))
    beside = {path.name: path for path in (metrics, history)}
    callbacks: list[Callback] = [
        StepKeys(lengths, asked.per_sample, lengths_of_step(config, rank_place(), num_ranks())),
        FiniteGuard(model.record, advice),  # before the EMA moves
        ema,
        MetricsLog(
            metrics,
            config.logging.interval,
            model.record,
            config.logging.progress_bar,
            model.labels(),
            model.below_zero(),
            checkpointer.attempts.check,
        ),
        _throughput(config, model),
        stop,
        StateSaver(checkpointer, config.checkpoint.interval, stop, beside),
    ]
    callbacks += _watching(config, dataset, ema)  # after the EMA moved
    data = build_data(config, dataset, lengths)
    loader: Any = data.dataloader
    callbacks.append(Resources(config.logging.interval, lambda: loader.waited))
    if isinstance(loader, ScaledLoader):
        callbacks.append(LoaderStep(loader))
    batch_size = config.train.global_batch_size // dist.get_world_size()
    trainer, shards, reload = start_trainer(
        config,
        model=model,
        train_dataloader=data,
        max_duration=config.train.max_duration,
        optimizers=build_optimizer(config.optimizer, model.parameter_groups(), growth),
        schedulers=build_scheduler(config.optimizer),
        algorithms=_clipping(config, model),
        callbacks=callbacks,
        loggers=build_loggers(config),
        run_name=config.run_name,
        progress_bar=False,  # Composer's prints a line per step into a log file
        device="gpu" if torch.cuda.is_available() else "cpu",
        precision=config.train.precision,
        device_train_microbatch_size=config.train.device_microbatch_size or batch_size,
        seed=config.seed,
    )
    ema.start(shards)
    checkpointer.bind(model, shards, ema, reload)
    return trainer


def export_bundle(
    config: TrainingRun,
    model: TrainingModel,
    dataset: EpochDataset,
    average: dict[str, Tensor],
    steps: int,
) -> Path:
    """Write the run's result: EMA weights as a bundle. Call on rank 0.

    Args:
        config: The run.
        model: The trained model, under whatever strategy; only what is no weight is read.
        dataset: The training set.
        average: Whole averaged weights, by their names in the network.
        steps: How many made them.
    """
    folder = Path(config.out) / "bundle"
    training = {"steps": steps, "weights": "ema", "config": to_dict(config)}
    run = RunFolder(folder.parent, config)
    changes = [entry for entry in run.history() if "changes" in entry]
    training |= {"changes": changes} if changes else {}
    training |= {"start": run.start()} if config.init_from is not None else {}
    family_of(config).export(config, folder, model, dataset, average, training)
    return folder
