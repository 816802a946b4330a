"""The throughput callback: right rates per length, and one wait per interval."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lgm_scale.training.throughput import Throughput


class Clock:
    """A clock that is set by hand and notes when it is read."""

    def __init__(self) -> None:
        self.now, self.reads = 0.0, 0

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float) -> float:
        self.reads += 1
        return end - start


class Log:
    def __init__(self) -> None:
        self.reports: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.reports.append(metrics)


def run(callback: Throughput, clock: Clock, steps: list[tuple[Any, int, float, float]]) -> Log:
    """Steps of (K or one K per image, images, seconds of waiting for data, seconds of work)."""
    log: Any = Log()
    callback._clock = clock  # type: ignore[assignment]
    for num_tokens, images, waiting, working in steps:
        batch = {"num_tokens": num_tokens, "sample_ids": torch.arange(images)}
        state: Any = SimpleNamespace(batch=batch)
        clock.now += waiting
        callback.batch_start(state, log)
        clock.now += working
        callback.batch_end(state, log)
    return log


def flops(num_tokens: int) -> float:
    return 100.0 * num_tokens


def test_rates_per_length_and_over_the_interval():
    callback = Throughput(4, flops, peak_flops=1e6)
    steps = [(8, 10, 1.0, 0.5), (32, 10, 0.5, 2.0), (8, 10, 0.5, 0.5), (32, 10, 1.0, 2.0)]
    log = run(callback, Clock(), steps)
    assert log.reports == [
        pytest.approx(
            {
                "throughput/images_per_second": 40 / 7,  # from the first step's start on
                "throughput/mfu": 3 * (20 * 800 + 20 * 3200) / 7 / 1e6,
                "throughput/K=8/images_per_second": 20.0,
                "throughput/K=8/tokens_per_second": 160.0,
                "throughput/K=8/mfu": 3 * 20 * 800 / 1e6,
                "throughput/K=32/images_per_second": 5.0,
                "throughput/K=32/tokens_per_second": 160.0,
                "throughput/K=32/mfu": 3 * 5 * 3200 / 1e6,
            }
        )
    ]


def test_mixed_lengths_of_a_step_count_in_the_interval_alone():
    """`lengths.per_sample`: K is one value per image, and a step's time is that of them all."""
    callback = Throughput(2, flops, peak_flops=1e6)
    mixed = torch.tensor([8, 32, 8, 8])
    steps = [(mixed, 4, 1.0, 0.5), (mixed.flip(0), 4, 0.5, 1.0)]
    log = run(callback, Clock(), steps)
    assert log.reports == [
        pytest.approx(
            {
                "throughput/images_per_second": 4.0,
                "throughput/tokens_per_second": 4.0 * 14,
                "throughput/mfu": 3 * (6 * 800 + 2 * 3200) / 2 / 1e6,
            }
        )
    ]


def test_mixed_lengths_are_read_once_an_interval():
    """Reading one waits for the device; and at the end of a step its batch is a micro-batch."""
    reads = []

    class Lengths(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            reads.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    clock, callback = Clock(), Throughput(3, flops)
    mixed = torch.tensor([8, 32]).as_subclass(Lengths)
    reads.clear()
    log = run(callback, clock, [(mixed, 2, 0.0, 1.0)] * 2)
    assert (reads, log.reports) == ([], [])
    log = run(callback, clock, [(mixed, 2, 0.0, 1.0)])
    assert log.reports[0]["throughput/images_per_second"] == pytest.approx(2.0)


def test_waiting_between_intervals_is_not_lost():
    log = run(Throughput(1, flops), Clock(), [(8, 10, 3.0, 1.0), (8, 10, 3.0, 1.0)])
    rates = [report["throughput/images_per_second"] for report in log.reports]
    assert rates == [pytest.approx(10.0), pytest.approx(2.5)]
    assert all(r["throughput/K=8/images_per_second"] == pytest.approx(10.0) for r in log.reports)


def test_nothing_is_read_before_the_interval_ends():
    clock, callback = Clock(), Throughput(5, flops)
    log = run(callback, clock, [(8, 10, 0.1, 1.0)] * 4)
    assert (clock.reads, log.reports) == (0, [])
    run(callback, clock, [(8, 10, 0.1, 1.0)])
    assert clock.reads == 6


def test_without_a_peak_there_is_no_utilisation():
    log = run(Throughput(1, flops), Clock(), [(8, 10, 0.0, 1.0)])
    assert not [key for key in log.reports[0] if "mfu" in key]
