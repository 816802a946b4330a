"""Stop when somebody asks for it: a signal to any rank, agreed on by all, at a step boundary."""

from __future__ import annotations

import logging
import multiprocessing.resource_tracker
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from composer.core import Callback, State
from composer.loggers import Logger

from lgm_scale.errors import end_at_once

log = logging.getLogger("lgm_scale")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""Sent by schedulers before they take the machine away, and by people: Ctrl-C."""


def ignore_stop_signals(worker: int | None = None) -> None:
    """Let no request to stop end this process: it ends with the trainer, which saves first.

    Schedulers signal every process of a job. A data worker that dies of it would take the trainer
    down before it has saved. Can be a loader's `worker_init_fn`.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest(Callback):
    """Whether all ranks have agreed to stop after the step that has just ended.

    Ranks must stop at the same step, and a signal reaches them at different moments, or one of
    them only. So each sends its flag around at the end of every step, on the host and without
    waiting, and looks at the answer one step later, when it has long been there: agreement costs
    no step any time, and a request one step more. (gloo, on the host: NCCL would put it into the
    device's queue, and reading the answer would wait for the device.) A rank whose peers are gone
    learns it here, too: its answer never comes, and it fails.

    With the flag travels a number of each rank, what `tell` returns, and all learn the smallest,
    `least`: how far all of them are with what they do beside their steps.

    It listens inside a `with` block.

    Args:
        timeout_seconds: How long a rank waits for an answer.
    """

    def __init__(self, timeout_seconds: int) -> None:
        self.agreed = False
        self.tell: Callable[[], int] = lambda: 0
        self.least = 0
        self._asked = False
        self._timeout = timedelta(seconds=timeout_seconds)
        self._group: Any = None
        self._sent = torch.zeros(2, dtype=torch.int32)
        self._work: Any = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        """Take the signals over, in the main thread, once ranks can talk to each other."""
        self._before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
        multiprocessing.resource_tracker.ensure_running()  # a program of its own, deaf from birth
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if (
            number == signal.SIGINT
        ):  # a launcher that hears it sends SIGTERM, which is no second one
            signal.signal(signal.SIGINT, end_at_once)
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nCtrl-C: saving after the next step; once more ends at once\n")

    def batch_end(self, state: State, logger: Logger) -> None:
        """Send this rank's flag, and look at the answer to the last one."""
        if self._group is None:
            self.agreed, self.least = self._asked, self.tell()
        else:
            answered = self._answer()
            self._sent = torch.tensor([int(self._asked), -self.tell()], dtype=torch.int32)
            self._work = dist.all_reduce(
                self._sent, op=dist.ReduceOp.MAX, group=self._group, async_op=True
            )
            self.agreed, self.least = answered
        if self.agreed:
            log.warning("asked to stop: saving after step %d", state.timestamp.batch.value)

    def _answer(self) -> tuple[bool, int]:
        if self._work is not None:
            self._work.wait()
            self._work = None
        asked, least = self._sent.tolist()
        return bool(asked), -least

    def fit_end(self, state: State, logger: Logger) -> None:
        """Leave no message behind, and let no scheduler interrupt what follows; a person may."""
        if self._group is not None:
            self._answer()
        ignore_stop_signals()
        signal.signal(signal.SIGINT, end_at_once)
