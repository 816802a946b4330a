"""Composer's trainer under the configured strategy, and what each rank keeps then."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from composer import Trainer

from lgm_scale.config.schema import DeepSpeedConfig, FSDPConfig, TrainingRun
from lgm_scale.parallel.composer_internals import ShardingTrainer, skip_processor_name
from lgm_scale.parallel.deepspeed_internals import update_model_weights, zero_shards
from lgm_scale.parallel.fsdp import shard_state
from lgm_scale.parallel.shards import ParameterShard, local_shards


class StartedTrainer(NamedTuple):
    """A trainer that has applied its strategy, and what this rank keeps under it.

    `reload` is to be called, on all ranks, when something was loaded into the shards: under ZeRO
    the optimizer steps one copy of the weights and the model reads another.
    """

    trainer: Trainer
    shards: list[ParameterShard]
    reload: Callable[[], None]


def start_trainer(config: TrainingRun, **arguments: Any) -> StartedTrainer:
    """Make the trainer of `parallel.strategy`. Every rank must call it.

    Args:
        config: The run.
        **arguments: Keyword arguments of `composer.Trainer`, `model` among them.
    """
    skip_processor_name()
    model, parallel = arguments["model"], config.parallel
    if parallel.strategy == "deepspeed":
        from lgm_scale.parallel import deepspeed  # maybe not installed

        zero, clip_norm = parallel.deepspeed or DeepSpeedConfig(), config.optimizer.clip_norm
        shard = partial(deepspeed.shard_state, zero=zero, clip_norm=clip_norm)
        trainer = ShardingTrainer(shard, **arguments)
        engine = trainer.state.model.engine
        reload = partial(update_model_weights, engine)
        return StartedTrainer(trainer, zero_shards(engine, model), reload)
    if parallel.strategy == "fsdp":
        compute = torch.bfloat16 if config.train.precision == "amp_bf16" else torch.float32
        fsdp = parallel.fsdp or FSDPConfig()
        trainer = ShardingTrainer(partial(shard_state, config=fsdp, compute=compute), **arguments)
    else:
        trainer = Trainer(**arguments)
    return StartedTrainer(trainer, local_shards(model, trainer.state.optimizers[0]), lambda: None)
