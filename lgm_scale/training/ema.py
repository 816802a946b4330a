"""Exponential moving average of the weights.

Elementwise on the pieces of parameters that this rank holds, in float32, with one foreach kernel
and no communication, under every strategy. The average is never swapped into the model: it has
its own place in the resume state and is what export and evaluation read, gathered one parameter
at a time. (Composer's own EMA fails under FSDP.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from lgm_scale.parallel.pieces import Piece, gather

__all__ = ["EMA"]


class EMA(Callback):
    """Average of the trainable parameters below `prefix`, updated after optimizer steps.

    Args:
        decay: Weight of the past after one step; 0 copies the parameters.
        interval: Steps between updates; the past then weighs decay ** interval.
        prefix: Of the names of averaged parameters in the model; dropped from the names here.
    """

    def __init__(self, decay: float, interval: int = 1, prefix: str = "net.") -> None:
        self.decay = decay
        self.interval = interval
        self.prefix = prefix
        self.pieces: list[Piece] = []
        self.average: list[Tensor] = []
        """float32 [numel] for each of `pieces`."""

    def start(self, pieces: Sequence[Piece]) -> None:
        """Begin at the weights of this rank's pieces; once the strategy has been applied."""
        self.pieces = [p for p in pieces if p.trainable and p.name.startswith(self.prefix)]
        self.average = [piece.weight().float().clone() for piece in self.pieces]

    @torch.no_grad()
    def batch_end(self, state: State, logger: Logger) -> None:
        """One step of the average."""
        if state.timestamp.batch.value % self.interval == 0:
            current = [piece.weight().float() for piece in self.pieces]
            torch._foreach_lerp_(self.average, current, 1.0 - self.decay**self.interval)

    def full_weights(self, everywhere: bool = True) -> dict[str, Tensor]:
        """The average as whole tensors on the host. Every rank must call it.

        Args:
            everywhere: Whether all ranks keep them, or rank 0 alone; the others then get nothing.

        Shapes: name in the averaged module -> float32, the parameter's shape.
        """
        keep = everywhere or dist.get_global_rank() == 0
        return {
            name.removeprefix(self.prefix): whole
            for name, whole in gather(self.pieces, self.average)
            if keep
        }
