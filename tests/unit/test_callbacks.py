"""Loss spikes are told, once and per token length."""

from __future__ import annotations

import random

from lgm_scale.training.callbacks import SpikeWatch


def test_a_loss_that_stands_out_is_told_once():
    watch, draw = SpikeWatch(), random.Random(0)
    losses = [1 + 0.01 * draw.gauss(0, 1) for _ in range(200)]
    losses[150] = 1.2
    told = [watch.look(step, 64, loss) for step, loss in enumerate(losses)]
    assert [step for step, line in enumerate(told) if line] == [150]
    assert "step 150, K = 64: 1.2000" in str(told[150])


def test_lengths_are_apart_and_few_losses_are_no_base():
    watch = SpikeWatch()
    for step in range(SpikeWatch.LEAST - 1):
        assert watch.look(step, 64, 1.0) is None
    assert watch.look(SpikeWatch.LEAST, 8, 5.0) is None  # the first one at K = 8
    assert watch.look(SpikeWatch.LEAST, 64, 5.0) is None  # one too few before it
    assert watch.look(SpikeWatch.LEAST + 1, 64, 500.0) is not None


def test_a_new_level_is_told_three_times_and_no_more():
    watch = SpikeWatch()
    told = [watch.look(step, 64, 1.0 if step < 30 else 2.0) for step in range(100)]
    assert [step for step, line in enumerate(told) if line] == [30, 31, 32]
    assert str(told[32]).endswith("3 in a row, so later ones are compared with what follows")
    assert watch.look(100, 64, 9.0) is not None, "the new level has spikes of its own"
