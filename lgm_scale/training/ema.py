"""Exponential moving average of the weights.

Elementwise on whatever part of a parameter this rank holds, in float32, with one foreach kernel
and no communication. The average is never swapped into the model: it has its own key in the
resume state and is what export and evaluation read. (Composer's own EMA fails under FSDP.)
"""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor, nn

from lgm_scale.errors import CheckpointError

__all__ = ["EMA"]


def _local(parameter: Tensor) -> Tensor:
    """The part of a parameter on this rank, detached; a DTensor's local shard."""
    parameter = parameter.detach()
    to_local = getattr(parameter, "to_local", None)
    return to_local() if to_local is not None else parameter


class EMA(Callback):
    """Average of the trainable parameters of `module`, updated after every optimizer step.

    Args:
        module: Whose parameters are averaged.
        decay: Weight of the past; 0 copies the parameters.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.average: dict[str, Tensor] = {}

    def _start(self) -> None:
        self.average = {
            name: _local(parameter).float().clone() for name, parameter in self.parameters.items()
        }

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start from the weights, unless a resume has brought an average."""
        if not self.average:
            self._start()
        for name, parameter in self.parameters.items():
            self.average[name] = self.average[name].to(parameter.device)

    @torch.no_grad()
    def batch_end(self, state: State, logger: Logger) -> None:
        """One step of the average."""
        current = [_local(parameter).float() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1.0 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """The average, for the resume state."""
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the average of a resume state.

        Raises: CheckpointError if it belongs to another model.
        """
        loaded = state["average"]
        if loaded.keys() != self.parameters.keys():
            raise CheckpointError("EMA: the resume state belongs to another model")
        self.average = dict(loaded)
