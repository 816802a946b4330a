"""Clip the gradient norm of each group of parameters on its own.

Where two networks play against each other, one of them may have gradients ten times as large as
the other's. Clipped together, it would decide how far the other one moves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lgm_scale.training.record import LossRecord


class GroupClipping(Algorithm):
    """Clip the gradient norm of each parameter group on its own, and note the norms.

    Args:
        groups: Name of each group, and the modules whose parameters it has.
        max_norm: The largest norm that is left alone; the same for all groups.
        record: Where norms are noted, as `gradient_norm_<group>`.
    """

    def __init__(
        self, groups: dict[str, list[nn.Module]], max_norm: float, record: LossRecord
    ) -> None:
        self.groups = groups
        self.max_norm = max_norm
        self.record = record
        self._parameters: dict[str, list[nn.Parameter]] = {}

    def match(self, event: Event, state: State) -> bool:
        """After all micro-batches, before the optimizer."""
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Clip in place; nothing waits for the device."""
        if not self._parameters:  # not before the first step, for sharding replaces parameters
            self._parameters = {k: list(parameters_of(v)) for k, v in self.groups.items()}
        for name, parameters in self._parameters.items():
            self.record.note(f"gradient_norm_{name}", self._clip(parameters))

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        """Clip one group. Returns: the norm before, of the whole gradient on every rank."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            # Under FSDP each rank has the norm of its shards, and the DTensor knows that; this is
            # the one collective of clipping.
            norm = norm.full_tensor()
        torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        return norm


def parameters_of(modules: list[nn.Module]) -> Iterator[nn.Parameter]:
    """All parameters, module by module."""
    for module in modules:
        yield from module.parameters()
