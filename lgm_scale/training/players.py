"""What each player of the adversarial game has for itself: the norm its gradient is clipped to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor, nn

from lgm_scale.training.record import LossRecord

__all__ = ["PlayerClipping"]


class PlayerClipping(Algorithm):
    """Clip the gradient norm of each player on its own, and note the norms.

    Args:
        players: Modules of each player. They are asked for their parameters at every step, for
            sharding replaces those.
        max_norm: The largest norm that is left alone; the same for all players.
        record: Where norms are noted, as `gradient_norm_<player>`.
    """

    def __init__(
        self, players: dict[str, list[nn.Module]], max_norm: float, record: LossRecord
    ) -> None:
        self.players = players
        self.max_norm = max_norm
        self.record = record

    def match(self, event: Event, state: State) -> bool:
        """After all micro-batches, before the optimizer."""
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Clip in place; no synchronisation."""
        for name, modules in self.players.items():
            norm = torch.nn.utils.clip_grad_norm_(parameters_of(modules), self.max_norm)
            self.record.note(f"gradient_norm_{name}", _whole(norm))


def parameters_of(modules: list[nn.Module]) -> Iterator[nn.Parameter]:
    """All parameters, module by module."""
    for module in modules:
        yield from module.parameters()


def _whole(norm: Tensor) -> Tensor:
    """The norm on this rank; of a sharded one, the whole."""
    full = getattr(norm, "full_tensor", None)
    return full() if full is not None else norm
