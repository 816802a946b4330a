"""Everything of Composer that is private and that sharding and checkpoints need.

Read from mosaicml 0.32.1. `tests/unit/test_private_names_parallel.py` fails, and says why, when
one of these names is gone.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from composer import Trainer
from composer.core import State
from composer.distributed.fsdp2_utils import (
    sync_optimizer_and_model_params as sync_optimizer_and_model_params,
)
from composer.utils import collect_env

# `sync_optimizer_and_model_params`, public in a module that is not documented: a context inside
# which parameters may be replaced, and after which the optimizer's groups hold the new ones.


class ShardingTrainer(Trainer):
    """Composer's trainer with a strategy that Composer does not know.

    `Trainer.__init__` calls `_wrap_model_for_distributed` to apply its own FSDP. It is the one
    place that is late enough (precision is known, and schedulers are bound to the optimizer) and
    early enough (nothing was loaded yet, and callbacks have not seen the model).

    Args:
        shard: Shards the state's model, and lets the state's optimizer step the shards.
        **arguments: Keyword arguments of `composer.Trainer`.
    """

    def __init__(self, shard: Callable[[State], None], **arguments: Any) -> None:
        self._shard = shard
        super().__init__(**arguments)

    def _wrap_model_for_distributed(self, model: Any, optimizers: Any) -> None:
        self._shard(self.state)


def skip_processor_name() -> None:
    """Let trainers start without the processor's name, which they ask for and do not use.

    Composer describes its whole environment to log two lines of it. The name takes an interpreter,
    and with it a second of every rank's start; the architecture stands in for it.
    """
    collect_env.get_cpu_model = platform.machine  # type: ignore[assignment]


def dataset_position(state: State) -> dict[str, Any] | None:
    """Where in the training data a run is, as its data set tells it; None if it does not.

    `State._dataset_state_dict` turns Composer's count of samples into a call of the data set's
    `state_dict`, as Composer's own checkpoints do.
    """
    return state._dataset_state_dict()["train"]


def restore_dataset_position(state: State, position: dict[str, Any]) -> None:
    """Let the training data go on where `dataset_position` says.

    `State._load_dataset_state` also notes that the data set skips by itself: without that note
    Composer would read and drop every batch up to that place.
    """
    state._load_dataset_state({"train": dict(position), "eval": {}})
