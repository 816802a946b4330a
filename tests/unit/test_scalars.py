"""What a state holds besides tensors: times, rates, and what callbacks remember."""

from __future__ import annotations

import json
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Timestamp
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lgm_scale.checkpoint import scalars
from lgm_scale.checkpoint.scalars import load_scalars, read_scalars, renew_learning_rates


class Counting:
    """A callback that remembers."""

    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen} if self.seen else {}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.seen = values["seen"]


class Forgetful(Counting):
    """Another one, which has nothing to remember."""


def state(factor: float = 1.0) -> Any:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups)
    schedule = LambdaLR(optimizer, lambda step: factor / (1 + step))
    return SimpleNamespace(
        timestamp=Timestamp(), optimizers=[optimizer], schedulers=[schedule],
        callbacks=[Counting(), Forgetful()], position=None,
    )  # fmt: skip


def step(state: Any) -> None:
    state.optimizers[0].step()
    state.schedulers[0].step()
    state.timestamp = state.timestamp.to_next_batch(samples=8, duration=timedelta(seconds=2))
    state.position = {"step": state.timestamp.batch.value}
    state.callbacks[0].seen += 1


def rates(state: Any) -> list[float]:
    return [group["lr"] for group in state.optimizers[0].param_groups]


@pytest.fixture(autouse=True)
def _position(monkeypatch):
    """Of the data: what is asked of Composer's loader."""
    monkeypatch.setattr(scalars, "dataset_position", lambda state: state.position)
    restore = lambda state, position: setattr(state, "position", position)  # noqa: E731
    monkeypatch.setattr(scalars, "restore_dataset_position", restore)


def told(state: Any) -> dict[str, Any]:
    """As it comes out of a manifest."""
    return json.loads(json.dumps(read_scalars(state)))


def test_a_state_that_is_read_goes_on_as_the_one_that_was_written():
    first, second = state(), state()
    for _ in range(3):
        step(first)
    load_scalars(told(first), second)
    for _ in range(2):
        assert rates(second) == rates(first)
        assert second.timestamp == first.timestamp
        assert second.timestamp.total_wct == first.timestamp.total_wct
        assert second.position == first.position
        assert [each.seen for each in second.callbacks] == [each.seen for each in first.callbacks]
        step(first)
        step(second)
    assert rates(first) == [1 / 6, 0.5 / 6]


def test_functions_and_callbacks_without_a_memory_are_not_written():
    first = state()
    step(first)
    found = told(first)
    assert found["callbacks"] == {"Counting": {"seen": 1}}
    assert found["schedulers"][0]["last_epoch"] == 1
    assert "lr_lambdas" not in found["schedulers"][0]


def test_a_state_before_the_first_sample_has_no_position():
    second = state()
    second.position = "its own"
    load_scalars(told(state()), second)
    assert second.position == "its own"


def test_rates_of_a_changed_schedule_are_those_of_its_step():
    first, second = state(), state(factor=3.0)
    step(first)
    load_scalars(told(first), second)
    assert rates(second) == rates(first)
    renew_learning_rates(second)
    assert rates(second) == [3 / 2, 1.5 / 2]
