"""When a state is saved, without a training: every so often, at the end, and on request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composer.core import Time, Timestamp

from lgm_scale.checkpoint.saver import StateSaver

COMPANIONS = {"metrics.jsonl": Path("metrics.jsonl")}


class Checkpointer:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.saved: list[int] = []
        self.gone_on: list[int] = []

    def save(self, state: Any, companions: dict[str, Path]) -> None:
        assert companions is COMPANIONS
        self.saved.append(state.timestamp.batch.value)

    def proceed(self, least: int) -> None:
        self.gone_on.append(least)

    def parts_done(self) -> int:
        return 5


def trained(interval: str, end: str, asked: int | None = None, begun: int = 0) -> Any:
    """Epochs of four steps, from a step on to the end, or to where somebody asks."""
    own, stop = Checkpointer(), SimpleNamespace(agreed=False, least=0, tell=None)
    saver = StateSaver(own, interval, stop, COMPANIONS)  # type: ignore[arg-type]
    assert stop.tell() == 5
    stopped: list[int] = []
    state: Any = SimpleNamespace(
        timestamp=Timestamp(epoch=begun // 4, batch=begun),
        max_duration=Time.from_timestring(end),
        stop_training=lambda: stopped.append(state.timestamp.batch.value),
    )
    logger: Any = None
    saver.fit_start(state, logger)
    for step in range(begun + 1, 13):
        state.timestamp = Timestamp(epoch=(step - 1) // 4, batch=step)
        stop.agreed, stop.least = step == asked, 10 * step
        saver.batch_checkpoint(state, logger)
        if step % 4 == 0:
            state.timestamp = Timestamp(epoch=step // 4, batch=step)
            saver.epoch_checkpoint(state, logger)
        if stopped or state.timestamp >= state.max_duration:
            break
    own.stopped = stopped  # type: ignore[attr-defined]
    return own


@pytest.mark.parametrize(
    ("interval", "end", "steps"),
    [
        ("3ba", "9ba", [3, 6, 9]),
        ("3ba", "10ba", [3, 6, 9, 10]),
        ("4ba", "3ep", [4, 8, 12]),
        ("100ba", "5ba", [5]),
        ("1ep", "3ep", [4, 8, 12]),
        ("2ep", "3ep", [8, 12]),
        ("2ep", "10ba", [8, 10]),
    ],
)
def test_states_come_at_the_interval_and_at_the_end(interval, end, steps):
    run = trained(interval, end)
    assert run.saved == steps
    assert run.stopped == []
    assert run.gone_on == [10 * step for step in range(1, steps[-1] + 1)]


@pytest.mark.parametrize(("interval", "before"), [("3ba", [3]), ("1ep", [4])])
def test_who_asks_gets_a_state_and_the_end(interval, before):
    run = trained(interval, "12ba", asked=5)
    assert run.saved == [*before, 5]
    assert run.stopped == [5]


def test_no_step_is_saved_twice():
    assert trained("3ba", "12ba", asked=6).saved == [3, 6]
    # A finished run is entered again: the state that was loaded needs no second copy.
    own, stop = Checkpointer(), SimpleNamespace(agreed=False, least=0)
    saver = StateSaver(own, "2ba", stop)  # type: ignore[arg-type]
    state: Any = SimpleNamespace(timestamp=Timestamp(batch=4), max_duration=Time.from_batch(4))
    saver.fit_start(state, None)  # type: ignore[arg-type]
    saver.batch_checkpoint(state, None)  # type: ignore[arg-type]
    assert own.saved == []
