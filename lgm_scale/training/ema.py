"""Exponential moving average of the weights.

Each rank averages the shards that it keeps, in float32, in a few kernels and without communication,
under every strategy. The average is never swapped into the model: it has its own place in the
resume state, and is what export and evaluation read, gathered one parameter at a time.

(Composer's own EMA copies the model and swaps whole parameters, which fails under FSDP.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from lgm_scale.parallel.shards import ParameterShard, gather
from lgm_scale.parallel.torch_internals import lerp_all_


class EMA(Callback):
    """Average of the trainable parameters below `prefix`, updated after optimizer steps.

    Args:
        decay: Weight of the past after one step; 0 copies the parameters.
        interval: Steps between updates; the past then weighs decay ** interval.
        prefix: Beginning of the names of averaged parameters in the model; dropped from the
            names here.
    """

    def __init__(self, decay: float, interval: int = 1, prefix: str = "net.") -> None:
        self.decay = decay
        self.interval = interval
        self.prefix = prefix
        self.shards: list[ParameterShard] = []
        self.average: list[Tensor] = []
        """float32 [numel] for each of `shards`."""
        self._weights: list[Tensor] = []

    def start(self, shards: Sequence[ParameterShard]) -> None:
        """Begin at the weights of this rank's shards, once the strategy has been applied."""
        self.shards = [s for s in shards if s.trainable and s.name.startswith(self.prefix)]
        self.average = [shard.weight().float().clone() for shard in self.shards]

    def by_name(self) -> dict[str, Tensor]:
        """This rank's part of the average by the parameter's name in the model, flat."""
        return {shard.name: a for shard, a in zip(self.shards, self.average, strict=True)}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Forget views of the weights: between two fits, they may have moved."""
        self._weights = []

    @torch.no_grad()
    def batch_end(self, state: State, logger: Logger) -> None:
        """One step of the average."""
        if state.timestamp.batch.value % self.interval != 0:
            return
        if not self._weights:
            # Views, taken once: under FSDP each costs a dispatch of DTensor. Not before the first
            # forward, in which FSDP pads uneven shards and moves them to another storage.
            self._weights = [shard.weight() for shard in self.shards]
        lerp_all_(self.average, self._weights, 1.0 - self.decay**self.interval)

    def full_weights(self, everywhere: bool = True) -> dict[str, Tensor]:
        """The average as whole tensors on the host. Every rank must call it.

        Unless `everywhere`, rank 0 alone keeps them; the others then get nothing.

        Shapes: name in the averaged module -> float32, the parameter's shape.
        """
        keep = everywhere or dist.get_global_rank() == 0
        return {
            name.removeprefix(self.prefix): whole
            for name, whole in gather(self.shards, self.average)
            if keep
        }
