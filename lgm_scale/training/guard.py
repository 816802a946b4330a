"""Stop a run at the first loss that is not finite, before it reaches the weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from lgm_scale.errors import DivergenceError
from lgm_scale.merging.linkage import start_host_copy
from lgm_scale.training.record import LossRecord


class FiniteGuard(Callback):
    """Raise DivergenceError on all ranks when a loss or a gradient norm is NaN or infinite.

    A check at the metrics flush comes after the step, and reading a loss from a GPU right before
    the step would let the GPU idle. Losses are known when the backward pass is only being
    queued, though. So their flags are copied to the host on the side, behind the forward pass,
    and the host waits for that copy while the GPU is busy with the backward pass: the
    optimizer's kernels are still queued in time. Gradient norms are known later. They are looked
    at when the step ends, where Composer itself has just waited for the loss: before any resume
    state is written, and before the EMA moves.

    Ranks share their flags: one rank alone must neither step nor save.

    Args:
        advice: What the user can do; the message ends with it.
    """

    def __init__(self, record: LossRecord, advice: str) -> None:
        self.record = record
        self.advice = advice
        # Names, and what waits until the values have arrived on the host.
        self._waiting: list[tuple[list[str], Callable[[], Tensor]]] = []

    def after_loss(self, state: State, logger: Logger) -> None:
        """Send the micro-batch's losses on their way."""
        names, values = list(self.record.latest), torch.stack(list(self.record.latest.values()))
        if dist.get_world_size() > 1:
            # NaN and infinities survive a sum, and so does which term they are in.
            dist.all_reduce(values)
        self._waiting.append((names, start_host_copy(values)))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Look at the losses before the optimizer's step. Raises: DivergenceError."""
        waiting, self._waiting = self._waiting, []
        for names, arrived in waiting:
            self._check(dict(zip(names, arrived().tolist(), strict=True)), state, "before", 0)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look at the gradient norms after the step. Raises: DivergenceError."""
        norms = self.record.notes()
        if norms:
            values = torch.stack(list(norms.values())).tolist()
            # The timestamp has advanced.
            self._check(dict(zip(norms, values, strict=True)), state, "right after", 1)

    def _check(self, values: dict[str, float], state: State, when: str, passed: int) -> None:
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            num_tokens = state.batch["num_tokens"]
            length = num_tokens if isinstance(num_tokens, int) else "mixed"
            step = state.timestamp.batch.value - passed
            raise DivergenceError(
                f"step {step}, K = {length}: {', '.join(bad)}; stopped {when} the "
                f"optimizer's step, and nothing was saved since. {self.advice}"
            )
