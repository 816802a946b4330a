"""What the trainer asks of every model that it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from composer.models import ComposerModel
from torch import Tensor, nn

from lgm_scale.training.record import LossRecord


class TrainingModel(ComposerModel):
    """A network and its losses, as Composer trains them.

    Batches are dictionaries with "step" (int), "num_tokens" (int) and "sample_ids" ([B] int64)
    besides what the data set gives.

    Args:
        net: The network that is the result; a direct child, which is what sharding wraps.
    """

    net: Any
    fixed_buffers: tuple[str, ...] = ()
    """Buffers given by the data. The resume state holds them, so that it never meets others."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.record = LossRecord()

    def parameter_groups(self) -> dict[str, list[nn.Module]]:
        """Modules of each parameter group; the gradient norms of groups are clipped apart."""
        return {"generator": [self.net]}

    def labels(self) -> dict[str, Any]:
        """What every row of metrics says about the run, besides its numbers."""
        return {}

    def below_zero(self) -> str:
        """What a loss below 0 means, for the console; nothing where none can be."""
        return ""


@dataclass(frozen=True)
class Rehearsal:
    """A training step without data: what is needed to simulate one.

    Args:
        model: In its Composer shell, with fresh weights, on the meta device where that is default.
        batch: What the data set gives of a batch besides `sample_ids`: shapes and dtypes count.
        frozen: Networks that losses look through and that are no part of `model`.
    """

    model: TrainingModel
    batch: Mapping[str, Tensor]
    frozen: Sequence[nn.Module] = ()
