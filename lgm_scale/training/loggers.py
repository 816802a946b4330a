"""Where a run reports besides its own folder: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from composer.core import State
from composer.loggers import Logger, LoggerDestination, TensorboardLogger, WandBLogger
from torch import Tensor
from typing_extensions import override

from lgm_scale.config.schema import TrainingRun
from lgm_scale.errors import ConfigError

__all__ = ["STEP", "StepAxisWandB", "build_loggers"]

STEP = "step"
"""Name of the horizontal axis in Weights & Biases: steps of the training."""


class StepAxisWandB(WandBLogger):
    """Composer's logger, with the step as a number of its own beside those that it belongs to.

    W&B drops whatever comes for a step before the last one that it was told, and the numbers of an
    interval come together at its end, when other numbers of later steps are there already.
    """

    @override
    def init(self, state: State, logger: Logger) -> None:
        super().init(state, logger)
        if self._enabled:
            import wandb  # type: ignore[import-not-found]  # an extra

            wandb.define_metric(STEP)
            wandb.define_metric("*", step_metric=STEP)

    @override
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        super().log_metrics(metrics if step is None else metrics | {STEP: step})

    @override
    def log_images(
        self,
        images: np.ndarray | Tensor | Sequence[np.ndarray | Tensor],
        name: str = "Images",
        channels_last: bool = False,
        step: int | None = None,
        *rest: Any,
        **named: Any,
    ) -> None:
        if self._enabled and step is not None:
            import wandb  # type: ignore[import-not-found]

            wandb.log({STEP: step}, commit=False)  # goes along with what is logged next
        super().log_images(images, name, channels_last, None, *rest, **named)


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
        loggers.append(StepAxisWandB(project=config.logging.wandb_project, name=config.run_name))
    return loggers
