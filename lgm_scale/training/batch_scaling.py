"""More samples per step or micro-batch at small K, at the same tokens.

The stream delivers batches of one size, which is what makes its order elastic and resumable. A
step at K takes K_max / K of them in a row, K_max being the longest length of the run. K is a
function of the step alone, so every rank takes equally many, and a resumed run takes those that
it would have taken. The last step of an epoch takes what is left: every sample is visited as
often as it would be without.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from composer.core import Callback, State
from composer.core.data_spec import default_split_batch
from composer.loggers import Logger
from torch import Tensor

from lgm_scale.data.epochs import CheckedLoader
from lgm_scale.training.length_schedule import LengthSchedule, loader_batches, steps_per_epoch


class ScaledLoader(CheckedLoader):
    """A loader of batches for each step's length; `LoaderStep` tells it the step.

    Args:
        *args: Arguments of `CheckedLoader`, whose batches are for the longest length.
        **kwargs: Keyword arguments of `CheckedLoader`.
    """

    def __init__(self, *args: Any, schedule: LengthSchedule, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.schedule = schedule
        self.step = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches of one epoch. None is drawn before its step, when the step's length is known."""
        batches = super().__iter__()
        while True:
            count = loader_batches(self.schedule, self.schedule.num_tokens(self.step))
            parts = list(itertools.islice(batches, count))
            if not parts:
                return
            yield parts[0] if len(parts) == 1 else self._join(parts)

    def __len__(self) -> int:
        """The most steps that an epoch can make."""
        return steps_per_epoch(self.schedule, super().__len__())

    def _join(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if not self.pin_memory:
            return joined
        return {name: value.pin_memory() for name, value in joined.items()}


class LoaderStep(Callback):
    """Tell a `ScaledLoader` for which step it is asked next, resumed or not."""

    def __init__(self, loader: ScaledLoader) -> None:
        self.loader = loader

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Tell the step right before the loader is asked."""
        self.loader.step = state.timestamp.batch.value


def split_by_tokens(num_tokens: int) -> Callable[[dict[str, Any], int | float], Sequence[Any]]:
    """A splitter into micro-batches of at most so many tokens, whatever K is.

    Composer weighs each by its samples, so that the last one may be smaller.
    """

    def split(batch: dict[str, Any], microbatch_size: int | float) -> Sequence[Any]:
        size = min(num_tokens // batch["num_tokens"], len(batch["sample_ids"]))
        return default_split_batch(batch, size)

    return split


def split_evenly(batch: dict[str, Any], microbatch_size: int | float) -> Sequence[Any]:
    """Split a batch whose samples are sorted by K: every n-th sample goes to one micro-batch.

    So each holds all lengths, and as many tokens as the others, to one sample of each length.
    """
    count = -(-len(batch["sample_ids"]) // int(microbatch_size))
    return [{k: _every(v, i, count) for k, v in batch.items()} for i in range(count)]


def _every(value: Any, first: int, step: int) -> Any:
    if isinstance(value, Tensor):
        part = value[first::step].contiguous()
        return part.pin_memory() if value.is_pinned() else part
    return value[first::step] if isinstance(value, list) else value
