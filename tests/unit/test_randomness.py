"""Keyed random numbers: their law, their independence, and their bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from lgm_scale.randomness import (
    Purpose,
    _bits,
    _unit_interval,
    keyed_normal,
    keyed_uniform,
    stream_keys,
)

NUM_DRAWS = 1_000_000
GOLDEN_RATIO = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
SEEDS = [0, 1, -1, 20_260_101, 2**63 - 1, -(2**63)]


def reference_mix(x: int) -> int:
    """SplitMix64's finaliser in plain integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def reference_words(state: int, count: int) -> list[int]:
    """The first outputs of SplitMix64 seeded with `state`."""
    words = []
    for _ in range(count):
        state = (state + GOLDEN_RATIO) & MASK
        words.append(reference_mix(state))
    return words


def reference_key(seed: int, purpose: int, step: int, sample_id: int) -> int:
    key = 0
    for part in (seed, purpose, step, sample_id):
        key = reference_mix(((key ^ (part & MASK)) + GOLDEN_RATIO) & MASK)
    return key


def unsigned(values: torch.Tensor) -> list[int]:
    return [value & MASK for value in values.flatten().tolist()]


def keys(seed: int = 0, purpose: Purpose = Purpose.NOISE, step: int = 0, count: int = NUM_DRAWS):
    return stream_keys(seed, purpose, step, torch.arange(count))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1])


# --- bits -------------------------------------------------------------------------------------


def test_reference_reproduces_the_published_outputs():
    """First outputs of the authors' generator for seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert reference_words(1234567, 3) == published


@pytest.mark.parametrize("key", [0, 1234567, -1, 2**63 - 1, -(2**63)])
def test_bits_are_splitmix64(key):
    words = _bits(torch.tensor([key, 5]), 100)
    assert words.shape == (2, 100)
    assert unsigned(words[0]) == reference_words(key & MASK, 100)
    assert unsigned(words[1]) == reference_words(5, 100)


@pytest.mark.parametrize("seed", SEEDS)
def test_stream_keys_are_chained_splitmix64(seed):
    ids = torch.tensor([0, 1, 49_999, -7, 2**62])
    for purpose, step in ((Purpose.NOISE, 0), (Purpose.TIMESTEP, 400_000)):
        expected = [reference_key(seed, int(purpose), step, i) for i in ids.tolist()]
        assert unsigned(stream_keys(seed, purpose, step, ids)) == expected


def test_numbers_follow_from_the_bits():
    key = torch.tensor([42])
    words = reference_words(42, 2)
    uniform = [(half + 0.5) / 2**32 for word in words for half in (word >> 32, word & 0xFFFFFFFF)]
    assert keyed_uniform(key).item() == pytest.approx(uniform[0], abs=1e-7)
    expected = []
    for radius_bits, angle_bits in (uniform[:2], uniform[2:]):
        radius = math.sqrt(-2 * math.log(radius_bits))
        angle = 2 * math.pi * angle_bits
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    assert keyed_normal(key, (4,))[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_unit_interval_is_open_at_both_ends():
    """Too rare to be met by chance: a zero here is an infinite normal number."""
    words = torch.tensor([0, 1, 2**31, 2**32 - 1])
    assert _unit_interval(words).tolist() == [2**-33, 1.5 * 2**-32, 0.5, 1 - 2**-24]


def test_purposes_are_distinct():
    assert len(set(Purpose)) == len(Purpose.__members__)


# --- law --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (1000,), (999,)])
def test_normal_law(shape):
    """Across streams, along them, and with an odd count. Limits are four standard errors."""
    num_streams = NUM_DRAWS // math.prod(shape)
    draws = keyed_normal(keys(seed=11, count=num_streams), shape).flatten().double().numpy()
    n = len(draws)
    assert abs(draws.mean()) < 4 / n**0.5
    assert abs(draws.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(scipy.stats.skew(draws)) < 4 * (6 / n) ** 0.5
    assert abs(scipy.stats.kurtosis(draws)) < 4 * (24 / n) ** 0.5
    assert scipy.stats.kstest(draws, "norm").pvalue > 1e-3
    assert 4 < abs(draws).max() < 7


def test_uniform_law():
    draws = keyed_uniform(keys(seed=12))
    assert draws.dtype == torch.float32
    assert 0 < draws.min() < 1e-5
    assert 1 - 1e-5 < draws.max() < 1
    draws = draws.double().numpy()
    assert abs(draws.mean() - 0.5) < 4 * (1 / 12 / NUM_DRAWS) ** 0.5
    assert abs(draws.var() - 1 / 12) < 4 * (1 / 180 / NUM_DRAWS) ** 0.5
    assert scipy.stats.kstest(draws, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("shape", [(), (1,), (3,), (7, 5), (256, 32), (1, 1, 3)])
def test_shapes(shape):
    draws = keyed_normal(keys(count=5), shape)
    assert draws.shape == (5, *shape)
    assert draws.dtype == torch.float32
    assert draws.isfinite().all()


def test_a_longer_draw_begins_with_the_shorter_one():
    streams = keys(count=4)
    assert torch.equal(keyed_normal(streams, (7,)), keyed_normal(streams, (10,))[:, :7])


# --- independence -----------------------------------------------------------------------------

LIMIT = 5 / 100_000**0.5  # five standard errors of a correlation of 1e5 pairs


@pytest.mark.parametrize(
    "other",
    [
        {"purpose": Purpose.TIMESTEP},
        {"purpose": Purpose.SAMPLING_NOISE},
        {"seed": 1},
        {"seed": -1},
        {"seed": 2**62},
        {"step": 1},
        {"step": 2**40},
    ],
    ids=str,
)
def test_streams_of_other_purposes_seeds_and_steps_are_independent(other):
    a, b = keys(count=100_000), keys(**other, count=100_000)
    assert not torch.isin(a, b).any()
    assert abs(correlation(keyed_uniform(a), keyed_uniform(b))) < LIMIT
    assert abs(correlation(keyed_normal(a, (1,)), keyed_normal(b, (1,)))) < LIMIT


def test_samples_and_positions_are_independent():
    draws = keyed_normal(keys(count=100_000), (6,))
    assert len(keys(count=100_000).unique()) == 100_000
    between = np.corrcoef(draws.numpy().T) - np.eye(6)
    assert abs(between).max() < LIMIT
    squares = np.corrcoef(draws.square().numpy().T) - np.eye(6)
    assert abs(squares).max() < LIMIT
    for lag in (1, 2, 1000):  # neighbouring samples
        assert abs(correlation(draws[lag:, 0], draws[:-lag, 0])) < LIMIT


def test_steps_of_one_sample_are_independent():
    steps = torch.cat(
        [stream_keys(0, Purpose.NOISE, step, torch.tensor([3])) for step in range(2000)]
    )
    draws = keyed_normal(steps, (50,))
    assert abs(correlation(draws[1:], draws[:-1])) < LIMIT
    assert scipy.stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3


def test_the_parts_of_a_key_do_not_commute():
    ids = torch.tensor([2])
    assert not torch.equal(
        stream_keys(1, Purpose.NOISE, 2, ids), stream_keys(2, Purpose.NOISE, 1, ids)
    )
    assert not torch.equal(
        stream_keys(0, Purpose.NOISE, 2, torch.tensor([1])),
        stream_keys(0, Purpose.TIMESTEP, 1, torch.tensor([1])),
    )


def test_a_sample_draws_the_same_in_every_batch():
    ids = torch.tensor([5, 0, 123_456, 5, *range(100, 120)])
    together = stream_keys(7, Purpose.NOISE, 3, ids)
    normal, uniform = keyed_normal(together, (9, 3)), keyed_uniform(together)
    for row, sample_id in enumerate(ids):
        alone = stream_keys(7, Purpose.NOISE, 3, sample_id[None])
        assert torch.equal(alone[0], together[row])
        assert torch.equal(keyed_normal(alone, (9, 3))[0], normal[row])
        assert torch.equal(keyed_uniform(alone)[0], uniform[row])
    assert torch.equal(normal[0], normal[3])


def test_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = keyed_normal(keys(count=3), (4,))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(keyed_normal(keys(count=3), (4,)), first)
