"""Where a run reports besides its own folder: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from composer.core import State
from composer.loggers import Logger, LoggerDestination, TensorboardLogger
from composer.utils import dist
from torch import Tensor
from typing_extensions import override

from lgm_scale.config.schema import TrainingRun
from lgm_scale.errors import ConfigError

STEP = "step"
"""Name of the horizontal axis in Weights & Biases: steps of the training."""


class WandB(LoggerDestination):
    """Weights & Biases, on rank 0, with the step as a number beside those that it belongs to.

    W&B drops whatever comes for a step before the last one that it was told, and the numbers of an
    interval come together at its end, when the trainer has told those of later steps. (Composer's
    own logger tells W&B such steps, and calls what newer versions of wandb do not have.)

    It knows its key from `wandb login` or WANDB_API_KEY, never from a configuration.
    """

    def __init__(self, project: str, name: str) -> None:
        self.project, self.name = project, name
        self._run: Any = None
        self._fitted = False

    @override
    def init(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            import wandb  # type: ignore[import-not-found]  # an extra

            self._run = wandb.init(project=self.project, name=self.name)
            self._run.define_metric(STEP)
            self._run.define_metric("*", step_metric=STEP)

    @override
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._run is not None:
            self._run.log(metrics if step is None else {**metrics, STEP: step})

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
        """One picture. Shapes: uint8 [height, width, 3]."""
        if self._run is not None:
            import wandb  # type: ignore[import-not-found]

            assert channels_last
            self.log_metrics({name: wandb.Image(images)}, step)

    @override
    def fit_end(self, state: State, logger: Logger) -> None:
        self._fitted = True

    @override
    def post_close(self) -> None:
        # What failed is told by wandb's own hook, which sees the exit status.
        if self._run is not None and self._fitted:
            self._run.finish()
            self._run = None


def build_loggers(config: TrainingRun) -> list[LoggerDestination]:
    """The loggers of the run, as configured. Raises: ConfigError where wandb is not installed."""
    loggers: list[LoggerDestination] = []
    if config.logging.tensorboard:
        loggers.append(TensorboardLogger(log_dir=str(Path(config.out) / "tensorboard")))
    if config.logging.wandb_project:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                "logging.wandb_project: set, but wandb is not installed; "
                "pip install 'lgm-scale[wandb]', or set it to null"
            )
        loggers.append(WandB(config.logging.wandb_project, config.run_name))
    return loggers
