"""Work of all ranks beside the training: each in a thread of its own, its end agreed on by all.

A rank must not act on what another one may not have done yet, and threads of several ranks cannot
ask each other: the process group belongs to the main threads, whose collectives come in one order.
So a thread works alone, its rank tells the others with the flags that they exchange at the end of
every step anyway (`training.stopping`) how many parts of such work it has done, and when all have
done the last one, all main threads learn it in the same step. There they tell each other results
and errors, which costs a moment, and begin the next part.

A rank that fails therefore waits for no one and is waited for by no one: its error is a result
like any other, and raised by all main threads together. A thread ends with its process, at any
line of its work, like a killed one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Background:
    """Parts of work, one at a time. Every rank must start the same ones at the same steps."""

    def __init__(self) -> None:
        self._begun = 0
        self._running: tuple[Future[Any], Callable[[Callable[[], Any]], object]] | None = None

    def start(self, work: Callable[[], Any], agree: Callable[[Callable[[], Any]], object]) -> None:
        """Begin a part; the one before must be over.

        Args:
            work: Called in a thread. It must not use the process group.
            agree: Called in the main threads of all ranks when all have done their work, with a
                function that gives this rank's result or raises its error. It may use the process
                group, and start the next part.
        """
        assert self._running is None, "finish() comes first"
        self._begun += 1
        future: Future[Any] = Future()
        self._running = future, agree
        # A daemon: where a run fails otherwise, it does not wait for a slow disk before it ends.
        threading.Thread(target=_work, args=(work, future), name="state", daemon=True).start()

    def count(self) -> int:
        """How many parts this rank has done."""
        return self._begun - (self._running is not None and not self._running[0].done())

    def proceed(self, least: int) -> None:
        """Take a part up that all ranks have done. At the same step on all ranks.

        Args:
            least: The smallest `count` of all ranks, equal on all of them; may be an older one.
        """
        if self._running is not None and least == self._begun:
            self._take_up()

    def finish(self) -> None:
        """Wait for this part and those that follow it. At the same step on all ranks."""
        while self._running is not None:
            self._take_up()

    def _take_up(self) -> None:
        assert self._running is not None
        (future, agree), self._running = self._running, None
        agree(future.result)


def _work(work: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # raised in the main thread
        future.set_exception(error)
