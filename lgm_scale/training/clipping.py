"""What each player of the adversarial game has for itself: the norm its gradient is clipped to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
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

    Attributes:
        shard_group: Under FSDP1, the ranks that share one copy: a parameter's gradient there is
            a bare part of it, which does not say so. (FSDP2's does.)
    """

    shard_group: dist.ProcessGroup | None = None

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
            self.record.note(f"gradient_norm_{name}", self._clip(list(parameters_of(modules))))

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        """Clip one player; the norm before."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = _whole(torch.nn.utils.get_total_norm(gradients))
        if self.shard_group is not None:
            square = norm.to(parameters[0].device).square()
            dist.all_reduce(square, group=self.shard_group)
            norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        return norm


def parameters_of(modules: list[nn.Module]) -> Iterator[nn.Parameter]:
    """All parameters, module by module."""
    for module in modules:
        yield from module.parameters()


def _whole(norm: Tensor) -> Tensor:
    """The norm on this rank; of a sharded one, the whole."""
    full = getattr(norm, "full_tensor", None)
    return full() if full is not None else norm
