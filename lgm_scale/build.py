"""From a configuration to objects: one small function per part. The only file that knows both."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination, TensorboardLogger, WandBLogger
from composer.optim import (
    ComposerScheduler,
    ConstantScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
)
from composer.utils import dist
from torch import Tensor, nn

from lgm_scale.build_data import TrainingDataset, build_data
from lgm_scale.checkpoint.checkpointer import Checkpointer
from lgm_scale.checkpoint.saver import StateSaver
from lgm_scale.config.loading import to_dict
from lgm_scale.config.schema import (
    GeneratorRun,
    OptimizerConfig,
    SpatialRun,
    TokenizerRun,
    TrainingRun,
)
from lgm_scale.errors import ConfigError
from lgm_scale.families.elit.bundle import build_spatial_generator, save_spatial_bundle
from lgm_scale.families.elit.data import SpatialLatentDataset
from lgm_scale.families.elit.training import SpatialModel
from lgm_scale.families.lgm.bundle import (
    build_generator,
    build_tokenizer,
    save_generator_bundle,
    save_tokenizer_bundle,
)
from lgm_scale.families.lgm.data import LatentDataset
from lgm_scale.families.lgm.lora import add_adapter
from lgm_scale.families.lgm.lora_run import export_adapter, load_base
from lgm_scale.families.lgm.training import GeneratorModel
from lgm_scale.families.tokenizer.assets import (
    FROM_HUB,
    TEACHER_WIDTHS,
    build_frozen,
    load_from_hub,
    load_pretrained,
)
from lgm_scale.families.tokenizer.critic import CriticHeads
from lgm_scale.families.tokenizer.network import AUXILIARY_SIZE, Decoder
from lgm_scale.families.tokenizer.training import TokenizerModel
from lgm_scale.flops import network_flops, tokenizer_flops
from lgm_scale.flow import NoiseScale
from lgm_scale.parallel.blocks import checkpoint_blocks, compile_blocks, transformer_blocks
from lgm_scale.parallel.collectives import mean_over_ranks
from lgm_scale.parallel.trainers import start_trainer
from lgm_scale.training.batch_scaling import LoaderStep, ScaledLoader
from lgm_scale.training.callbacks import MetricsLog, StepKeys
from lgm_scale.training.clipping import GroupClipping, parameters_of
from lgm_scale.training.ema import EMA
from lgm_scale.training.guard import FiniteGuard
from lgm_scale.training.length_schedule import LengthSchedule
from lgm_scale.training.stopping import StopRequest
from lgm_scale.training.throughput import Throughput

__all__ = [
    "build_auxiliary",
    "build_critic",
    "build_model",
    "build_trainer",
    "export_bundle",
]

log = logging.getLogger("lgm_scale")

TrainingModel = TokenizerModel | GeneratorModel | SpatialModel


def build_model(config: TrainingRun, dataset: TrainingDataset) -> TrainingModel:
    """The network in its Composer shell.

    Raises: MissingAssetError, CheckpointError, ConfigError.
    """
    if isinstance(config, TokenizerRun):
        return _build_tokenizer_model(config)
    if isinstance(config, SpatialRun):
        return _build_spatial_model(config, dataset)
    assert isinstance(dataset, LatentDataset)
    if config.lora is None:
        net, stats = build_generator(config.model), dataset.stats
    else:
        base = load_base(config, dataset.tree)
        net, stats = base.net, base.stats
        add_adapter(net, config.lora.rank, config.lora.alpha)
    return GeneratorModel(
        net,
        dataset.tree,
        stats.mean,
        stats.std,
        NoiseScale(config.objective.noise_scale),
        config.objective.label_dropout,
        config.objective.timestep_mean,
        config.objective.timestep_std,
        config.seed,
    )


def _build_spatial_model(config: SpatialRun, dataset: TrainingDataset) -> SpatialModel:
    objective = config.objective
    return SpatialModel(
        build_spatial_generator(config.model, config.space),
        dataset.scale if isinstance(dataset, SpatialLatentDataset) else None,
        objective.label_dropout,
        objective.timestep_mean,
        objective.timestep_std,
        config.seed,
    )


def _build_tokenizer_model(config: TokenizerRun) -> TokenizerModel:
    frozen = build_frozen(config)
    if frozen.random_assets:
        log.warning(
            "RANDOM WEIGHTS stand in for %s: a trial, its losses and its result mean nothing",
            ", ".join(frozen.random_assets),
        )
    net = build_tokenizer(config.model)
    pretrained = config.model.pretrained_encoder
    if pretrained == FROM_HUB:
        load_from_hub(net.encoder.vit, config.model.size)
    elif pretrained is not None and "model.pretrained_encoder" not in frozen.random_assets:
        load_pretrained(net.encoder.vit, pretrained)
    return TokenizerModel(
        net,
        config.objective,
        config.seed,
        frozen,
        build_auxiliary(config),
        build_critic(config),
        mean_over_ranks,
    )


def build_auxiliary(config: TokenizerRun) -> Decoder | None:
    """The decoder that predicts the teacher's features; None without that loss."""
    if config.objective.representation <= 0:
        return None
    model = config.model
    return Decoder(
        AUXILIARY_SIZE,
        model.image_size,
        model.patch_size,
        model.num_base_tokens,
        model.latent_dim,
        TEACHER_WIDTHS[config.assets.dinov2_size],
    )


def build_critic(config: TokenizerRun) -> CriticHeads | None:
    """The trained heads of the critic; None without an adversarial loss."""
    if config.objective.adversarial <= 0:
        return None
    return CriticHeads(reduce_mean=mean_over_ranks)


def build_optimizer(
    config: OptimizerConfig, players: dict[str, list[nn.Module]]
) -> torch.optim.AdamW:
    """One AdamW for all players; weight decay on matrices and tables, not on biases and gains."""
    groups = []
    for modules in players.values():
        parameters = [p for p in parameters_of(modules) if p.requires_grad]
        matrices = [p for p in parameters if p.ndim >= 2]
        groups.append({"params": matrices, "weight_decay": config.weight_decay})
        groups.append({"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, fused=torch.cuda.is_available()
    )


def build_scheduler(config: OptimizerConfig) -> ComposerScheduler:
    """Constant, or cosine to min_lr; linear warm-up over `warmup` steps."""
    warmup = f"{config.warmup}ba"
    if config.schedule == "cosine":
        return CosineAnnealingWithWarmupScheduler(warmup, alpha_f=config.min_lr / config.lr)
    return ConstantWithWarmupScheduler(warmup) if config.warmup else ConstantScheduler()


def build_loggers(config: TrainingRun) -> list[LoggerDestination]:
    """Composer's own loggers, as configured."""
    loggers: list[LoggerDestination] = []
    if config.logging.tensorboard:
        loggers.append(TensorboardLogger(log_dir=str(Path(config.out) / "tensorboard")))
    if config.logging.wandb_project:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                "logging.wandb_project: set, but wandb is not installed; "
                "pip install 'lgm-scale[wandb]', or set it to null"
            )
        loggers.append(WandBLogger(project=config.logging.wandb_project, name=config.run_name))
    return loggers


def _players(model: TrainingModel) -> dict[str, list[nn.Module]]:
    return (
        model.parameter_groups()
        if isinstance(model, TokenizerModel)
        else {"generator": [model.net]}
    )


def _clipping(config: TrainingRun, model: TrainingModel) -> list[Algorithm]:
    threshold = config.optimizer.clip_norm
    if threshold is None or config.parallel.strategy == "deepspeed":  # the engine clips
        return []
    return [GroupClipping(_players(model), threshold, model.record)]


def _labels(model: TrainingModel) -> dict[str, Any]:
    """What every row of metrics says about the run."""
    random = model.frozen.random_assets if isinstance(model, TokenizerModel) else ()
    return {"random_assets": list(random)} if random else {}


def _throughput(config: TrainingRun, model: TrainingModel) -> Throughput:
    """Images, tokens and operations per second, for the loggers."""
    if not isinstance(model, TokenizerModel):
        forward = partial(network_flops, model.net)
    else:
        assert isinstance(config, TokenizerRun)
        cost = tokenizer_flops(model.net, config.model.size)
        forward = lambda num_tokens: cost  # noqa: E731  a tokenizer's cost is the same at every K
    peak = config.logging.peak_tflops
    if isinstance(config, GeneratorRun) and config.lora is not None:
        peak = None  # a frozen network's backward pass costs less than the count says
    return Throughput(config.logging.interval, forward, None if peak is None else peak * 1e12)


def build_evaluation(
    config: GeneratorRun | SpatialRun, dataset: TrainingDataset, ema: EMA
) -> Callback:
    """The sweep's evaluator as a callback.

    The package's only look outwards, at the moment a run asks for it: the evaluator stays one
    implementation in eval/, and training without it imports nothing of it.
    """
    from lgm_scale.evaluation.sweep.during_training import EvaluationDuringTraining

    return EvaluationDuringTraining(config, dataset, ema)


def build_trainer(
    config: TrainingRun,
    model: TrainingModel,
    dataset: TrainingDataset,
    ema: EMA,
    checkpointer: Checkpointer,
    stop: StopRequest,
) -> Trainer:
    """Composer's trainer under the run's strategy. `checkpointer` is bound to it, not begun."""
    where = checkpointer.storage.root
    advice = f"Run it again from {where} with a lower optimizer.lr, or look at the data."
    lengths = LengthSchedule(config.lengths.choices, config.lengths.weights, config.seed)
    checkpoint_blocks(transformer_blocks(model), config.parallel.activation_checkpointing)
    if config.train.compile and not isinstance(model, TokenizerModel):
        compile_blocks(model.net, config.lengths.choices)
    metrics = Path(config.out) / "metrics.jsonl"
    callbacks: list[Callback] = [
        StepKeys(lengths, config.lengths.per_sample),
        FiniteGuard(model.record, advice),  # before the EMA moves
        ema,
        MetricsLog(
            metrics,
            config.logging.interval,
            model.record,
            config.logging.progress_bar,
            _labels(model),
            checkpointer.attempts.check,
        ),
        _throughput(config, model),
        stop,
        StateSaver(checkpointer, config.checkpoint.interval, stop, {metrics.name: metrics}),
    ]
    if not isinstance(config, TokenizerRun) and config.evaluation is not None:
        callbacks.append(build_evaluation(config, dataset, ema))  # after the EMA has moved
    data = build_data(config, dataset, lengths)
    if isinstance(data.dataloader, ScaledLoader):
        callbacks.append(LoaderStep(data.dataloader))
    batch_size = config.train.global_batch_size // dist.get_world_size()
    trainer, shards, reload = start_trainer(
        config,
        model=model,
        train_dataloader=data,
        max_duration=config.train.max_duration,
        optimizers=build_optimizer(config.optimizer, _players(model)),
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
    dataset: TrainingDataset,
    average: dict[str, Tensor],
    steps: int,
) -> Path:
    """Write the run's result: EMA weights as a bundle. Call on rank 0.

    Args:
        config: The run.
        model: As trained, under whatever strategy; only what is no weight is read.
        dataset: The training set.
        average: Whole averaged weights, by their names in the network.
        steps: How many made them.
    """
    folder = Path(config.out) / "bundle"
    training: dict[str, Any] = {"steps": steps, "weights": "ema", "config": to_dict(config)}
    if isinstance(config, GeneratorRun) and config.lora is not None:
        export_adapter(folder, config, average, training)
        return folder
    if isinstance(config, TokenizerRun):
        assert isinstance(model, TokenizerModel)
        training["random_assets"] = list(model.frozen.random_assets)
        net = build_tokenizer(config.model)  # a plain one: the trained one may be sharded
        weights = net.state_dict() | average
        net.load_state_dict(weights)
        tree = net.merge_tree() if net.merging.has_tree else None
        network = dataclasses.replace(config.model, pretrained_encoder=None)
        save_tokenizer_bundle(folder, network, weights, tree, training)
    elif isinstance(config, SpatialRun):
        classes, vae = dataset.manifest.classes, config.space.vae
        save_spatial_bundle(folder, config.model, config.space, average, classes, training, vae)
    else:
        assert isinstance(dataset, LatentDataset)
        save_generator_bundle(
            folder,
            config.model,
            average,
            dataset.stats,
            dataset.manifest.classes,
            config.tokenizer,
            training,
        )
    return folder
