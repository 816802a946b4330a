"""Composer's trainer under the configured strategy, and what each rank keeps then."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from composer import Trainer

from lgm_scale.config.schema import DeepSpeedConfig, FSDPConfig, TrainingRun
from lgm_scale.parallel.fsdp import FSDP2Trainer, composer_fsdp1, fsdp1_on_cpu
from lgm_scale.parallel.pieces import Piece, local_pieces
from lgm_scale.parallel.zero_pieces import reload, zero_pieces

__all__ = ["StartedTrainer", "start_trainer"]


class StartedTrainer(NamedTuple):
    """A trainer that has applied its strategy.

    `reload` is to be called when something was loaded into the pieces: under ZeRO, the model reads
    other copies.
    """

    trainer: Trainer
    pieces: list[Piece]
    reload: Callable[[], None]


def start_trainer(config: TrainingRun, **arguments: Any) -> StartedTrainer:
    """Make the trainer of `parallel.strategy`.

    Args:
        config: The run.
        **arguments: Of `composer.Trainer`, `model` among them.
    """
    model, parallel = arguments["model"], config.parallel
    if parallel.strategy == "deepspeed":
        from lgm_scale.parallel.deepspeed import DeepSpeedTrainer  # an extra: maybe not installed

        zero = parallel.deepspeed or DeepSpeedConfig()
        clip_norm = config.optimizer.clip_norm
        trainer = DeepSpeedTrainer(zero=zero, clip_norm=clip_norm, **arguments)
        engine = trainer.zero_engine
        return StartedTrainer(trainer, zero_pieces(engine, model), partial(reload, engine))
    fsdp = parallel.fsdp or FSDPConfig()
    if parallel.strategy == "ddp":
        trainer = Trainer(**arguments)
    elif fsdp.version == 2:
        compute = torch.bfloat16 if config.train.precision == "amp_bf16" else torch.float32
        trainer = FSDP2Trainer(fsdp=fsdp, compute=compute, **arguments)
    else:
        with fsdp1_on_cpu():
            trainer = Trainer(parallelism_config=composer_fsdp1(fsdp, model), **arguments)  # type: ignore[arg-type]
    return StartedTrainer(trainer, local_pieces(model, trainer.state.optimizers[0]), lambda: None)
