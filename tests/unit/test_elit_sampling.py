"""Sampling a state on a grid: direction of time, noise, guidance at one budget or two, errors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_elit import ELIT, small_network

from lgm_scale.errors import ConfigError
from lgm_scale.families.elit import network as elit
from lgm_scale.families.elit.sampling import initial_state_noise, sample_state
from lgm_scale.randomness import Purpose, keyed_normal, stream_keys
from lgm_scale.sampling.config import CFGRescale, Guidance, SamplerConfig, Solver

WINDOWS = 4  # a grid of 4 x 4 tokens in windows of 2 x 2: K = 4, 8, 12, 16
LABELS = torch.tensor([1, 4, 7])
EVERYWHERE = {"timestep_shift": 1.0, "cfg_interval": (0.0, 1.0)}


@pytest.fixture(scope="module")
def net() -> elit.ELIT:
    built = small_network(replace(ELIT, num_classes=10))
    assert isinstance(built, elit.ELIT)
    return built


class Watched:
    """A network that notes how it was called; or a function of (z_t, t, labels, K) in its place."""

    null_label = 10

    def __init__(self, velocity) -> None:
        self.velocity = velocity
        self.calls: list[tuple[float, int, list[int]]] = []
        """Time, K, labels."""

    def check_length(self, num_tokens: int) -> None:
        if num_tokens % WINDOWS or not 0 < num_tokens <= 16:
            raise ConfigError(f"num_tokens: {num_tokens} is no budget")

    def __call__(self, z_t, t, labels, num_tokens):
        assert (t == t[0]).all()
        self.calls.append((t[0].item(), num_tokens, labels.tolist()))
        return self.velocity(z_t, t, labels, num_tokens)

    @property
    def rows(self) -> Counter[int]:
        found: Counter[int] = Counter()
        for _, num_tokens, labels in self.calls:
            found[num_tokens] += len(labels)
        return found


def by_label_and_length(z_t, t, labels, num_tokens):
    """A velocity that tells its label and length, differently on every entry."""
    entries = torch.arange(1, z_t[0].numel() + 1).view(z_t.shape[1:]) / z_t[0].numel()
    return ((labels + 1)[:, None, None, None] * entries * num_tokens).float()


def noise(*indices: int, seed: int = 0) -> torch.Tensor:
    return initial_state_noise(seed, torch.tensor(indices), 3, 16)


# --- the solver -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [Solver.EULER, Solver.HEUN])
@pytest.mark.parametrize("shift", [0.3, 1.0])
def test_the_exact_velocity_carries_noise_to_data(solver, shift):
    """t = 0 is noise and t = 1 data: (data - z_t) / (1 - t) is the velocity of the way."""
    data = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def towards_data(z_t, t, labels, num_tokens):
        return (data - z_t) / (1 - t.view(-1, 1, 1, 1))

    oracle = Watched(towards_data)
    config = SamplerConfig(num_steps=13, timestep_shift=shift, solver=solver)
    state = sample_state(oracle, noise(0, 1, 2), LABELS, config, 16)
    torch.testing.assert_close(state, data, atol=1e-5, rtol=0)
    times = [t for t, _, _ in oracle.calls]
    assert times[0] == 0
    assert max(times) < 1, "no velocity is asked for at clean data"


def test_the_state_moves_from_the_noise_of_its_index(net):
    """Euler by hand, on the real network, in the real network's own convention."""
    config = SamplerConfig(num_steps=6, **EVERYWHERE)
    z_t = noise(4, 9, 2)
    for step in range(5):
        s = torch.full((3,), 1 - step / 5)  # theirs: 0 is data, and the velocity points to noise
        z_t = z_t - net.forward_released(z_t, s, LABELS, 8) / 5
    state = sample_state(net, noise(4, 9, 2), LABELS, config, 8)
    torch.testing.assert_close(state, z_t, atol=1e-5, rtol=0)


def test_steps_are_told(net):
    told: list[int] = []
    config = SamplerConfig(num_steps=6)
    sample_state(net, noise(0, 1, 2), LABELS, config, 8, lambda: told.append(1))
    assert len(told) == 5


def test_a_network_in_low_precision_gives_a_float32_state():
    coarse = Watched(lambda z_t, t, labels, num_tokens: torch.ones_like(z_t, dtype=torch.bfloat16))
    state = sample_state(
        coarse, torch.zeros(3, 3, 16, 16), LABELS, SamplerConfig(num_steps=300), 16
    )
    assert state.dtype == torch.float32
    torch.testing.assert_close(state, torch.ones(3, 3, 16, 16), atol=1e-4, rtol=0)


# --- noise ------------------------------------------------------------------------------------


def test_noise_depends_on_seed_and_index_alone():
    together = noise(*range(8), seed=5)
    assert together.shape == (8, 3, 16, 16)
    assert together.device.type == "cpu"
    assert torch.equal(noise(6, 2, 7, seed=5), together[[6, 2, 7]])
    for index in range(8):
        assert torch.equal(noise(index, seed=5)[0], together[index])
    assert not torch.isclose(noise(*range(8), seed=6), together).all()
    keys = stream_keys(5, Purpose.SAMPLING_NOISE, 0, torch.arange(8))
    assert torch.equal(together, keyed_normal(keys, (3, 16, 16)))
    assert abs(together.mean()) < 0.05
    assert abs(together.std() - 1) < 0.05


@pytest.mark.parametrize(
    "extra", [{}, {"cfg_scale": 3.0}, {"cfg_scale": 3.0, "uncond_num_tokens": 4}]
)
def test_an_image_does_not_depend_on_its_batch(net, extra):
    config = SamplerConfig(num_steps=6, **EVERYWHERE, **extra)
    labels = torch.tensor([3, 0, 9, 3, 7])

    def states(*indices: int) -> torch.Tensor:
        return sample_state(net, noise(*indices), labels[list(indices)], config, 8)

    together = states(0, 1, 2, 3, 4)
    for batch in ([0], [4, 1], [2, 0, 3]):
        torch.testing.assert_close(states(*batch), together[batch], atol=2e-5, rtol=0)
    assert (together[0] - together[3]).abs().max() > 0.1, "one label, two indices, one image"


def test_two_budgets_start_from_one_noise_and_end_apart(net):
    config = SamplerConfig(num_steps=6)
    first: list[torch.Tensor] = []

    def note(z_t, t, labels, num_tokens):
        if t[0] == 0:
            first.append(z_t.clone())
        return net(z_t, t, labels, num_tokens)

    few, all_tokens = (
        sample_state(Watched(note), noise(0, 1, 2), LABELS, config, k) for k in (4, 16)
    )
    assert torch.equal(first[0], first[1])
    assert (few - all_tokens).abs().max() > 1e-3


# --- guidance ---------------------------------------------------------------------------------


def step_of(config: SamplerConfig, num_tokens: int) -> tuple[torch.Tensor, Watched]:
    """The velocity of a single step, and how it was asked for."""
    watched = Watched(by_label_and_length)
    return sample_state(watched, torch.zeros(3, 3, 16, 16), LABELS, config, num_tokens), watched


def at(num_tokens: int, labels: torch.Tensor = LABELS) -> torch.Tensor:
    zero = torch.zeros(3, 3, 16, 16)
    return by_label_and_length(zero, torch.zeros(3), labels, num_tokens)


NULL = torch.full_like(LABELS, Watched.null_label)


@pytest.mark.parametrize("rescale", list(CFGRescale))
def test_at_one_budget_both_branches_share_a_batch(rescale):
    config = SamplerConfig(num_steps=2, cfg_scale=4.0, cfg_rescale=rescale, **EVERYWHERE)
    v, watched = step_of(config, 8)
    torch.testing.assert_close(v, at(8, NULL) + 4 * (at(8) - at(8, NULL)))
    assert watched.calls == [(0.0, 8, [1, 4, 7, 10, 10, 10])]


def test_cheap_guidance_runs_the_unconditional_branch_at_fewer_tokens():
    config = SamplerConfig(num_steps=2, cfg_scale=4.0, uncond_num_tokens=4, **EVERYWHERE)
    v, watched = step_of(config, 16)
    torch.testing.assert_close(v, at(4, NULL) + 4 * (at(16) - at(4, NULL)))
    assert watched.calls == [(0.0, 16, [1, 4, 7]), (0.0, 4, [10, 10, 10])]
    assert ((v - at(16)).abs() > 1e-3).all(), "an entry without guidance"


def test_autoguidance_keeps_the_class_in_its_weak_branch():
    config = SamplerConfig(
        num_steps=2, cfg_scale=4.0, uncond_num_tokens=4, guidance=Guidance.AUTOGUIDANCE,
        **EVERYWHERE,
    )  # fmt: skip
    v, watched = step_of(config, 16)
    torch.testing.assert_close(v, at(4) + 4 * (at(16) - at(4)))
    assert watched.calls == [(0.0, 16, [1, 4, 7]), (0.0, 4, [1, 4, 7])]


def test_scale_one_is_the_conditional_velocity_alone():
    config = SamplerConfig(num_steps=4, uncond_num_tokens=4, **EVERYWHERE)
    v, watched = step_of(config, 16)
    torch.testing.assert_close(v, at(16))
    assert [(k, labels) for _, k, labels in watched.calls] == [(16, [1, 4, 7])] * 3


@pytest.mark.parametrize("guidance", list(Guidance))
@pytest.mark.parametrize("solver", [Solver.EULER, Solver.HEUN])
def test_outside_the_interval_no_weak_branch_is_computed(guidance, solver):
    config = SamplerConfig(
        num_steps=9, cfg_scale=2.0, cfg_interval=(0.25, 0.5), timestep_shift=1.0,
        uncond_num_tokens=4, guidance=guidance, solver=solver,
    )  # fmt: skip
    _, watched = step_of(config, 16)
    weak = {t for t, num_tokens, _ in watched.calls if num_tokens == 4}
    assert weak == {0.25, 0.375, 0.5}
    assert watched.rows == {k: 3 * rows for k, rows in config.rows(16).items()}
    assert sum(watched.rows.values()) == 3 * config.num_forwards()


def test_a_budget_per_step():
    """K grows along the way; guidance is cheap where a step has more than the weak branch."""
    config = SamplerConfig(
        num_steps=9, cfg_scale=2.0, uncond_num_tokens=8, **EVERYWHERE,
        length_schedule=((0.0, 4), (0.25, 8), (0.5, 16)),
    )  # fmt: skip
    state, watched = step_of(config, 16)
    assert state.shape == (3, 3, 16, 16)
    lengths = [(t, k, len(labels)) for t, k, labels in watched.calls]
    assert lengths[:4] == [(0.0, 4, 6), (0.125, 4, 6), (0.25, 8, 6), (0.375, 8, 6)]
    assert lengths[4:6] == [(0.5, 16, 3), (0.5, 8, 3)]
    assert watched.rows == {k: 3 * rows for k, rows in config.rows(16).items()}


def test_equal_budgets_are_the_plain_sampler(net):
    plain = SamplerConfig(num_steps=5, cfg_scale=2.0)
    flat = SamplerConfig(
        num_steps=5, cfg_scale=2.0, uncond_num_tokens=16, length_schedule=((0.0, 8), (0.2, 8))
    )
    state = sample_state(net, noise(0, 1, 2), LABELS, plain, 8)
    assert torch.equal(sample_state(net, noise(0, 1, 2), LABELS, flat, 8), state)


def test_a_host_without_latents_runs_at_all_tokens_alone():
    sit = small_network(replace(ELIT, num_classes=10, interface=None))
    assert not isinstance(sit, elit.ELIT)
    config = SamplerConfig(num_steps=3, cfg_scale=2.0)
    assert sample_state(sit, noise(0, 1, 2), LABELS, config, 16).shape == (3, 3, 16, 16)
    with pytest.raises(ConfigError, match="a SiT has no latents and runs at 16"):
        sample_state(sit, noise(0, 1, 2), LABELS, config, 8)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "settings"),
    [
        (6, {}),
        (20, {}),
        (16, {"cfg_scale": 2.0, "uncond_num_tokens": 5}),
        (16, {"uncond_num_tokens": 5}),
        (16, {"length_schedule": ((0.0, 3), (0.1, 16))}),
    ],
)
def test_a_budget_that_the_network_lacks_is_refused_before_it_runs(net, num_tokens, settings):
    watched = Watched(net)
    watched.check_length = net.check_length  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="is no budget of this network; it is k x 4 windows"):
        sample_state(watched, noise(0, 1, 2), LABELS, SamplerConfig(**settings), num_tokens)
    assert watched.calls == []


def test_autoguidance_needs_fewer_tokens(net):
    with pytest.raises(ConfigError, match="guidance: autoguidance needs uncond_num_tokens"):
        SamplerConfig(guidance="autoguidance")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="guidance: 'auto' is unknown; use cfg or autoguidance"):
        SamplerConfig(guidance="auto")  # type: ignore[arg-type]
    auto = {"guidance": Guidance.AUTOGUIDANCE, "uncond_num_tokens": 8, "cfg_scale": 2.0}
    for num_tokens in (4, 8):
        with pytest.raises(
            ConfigError, match=f"than in the strong one, and num_tokens is {num_tokens}"
        ):
            sample_state(net, noise(0, 1, 2), LABELS, SamplerConfig(**auto), num_tokens)
    growing = auto | {"length_schedule": ((0.0, 4), (0.5, 16)), "timestep_shift": 1.0}
    with pytest.raises(ConfigError, match="length_schedule guides a step at 4"):
        sample_state(net, noise(0, 1, 2), LABELS, SamplerConfig(**growing), 16)
    late = SamplerConfig(**growing | {"cfg_interval": (0.5, 1.0)})  # no step at 4 is guided
    assert sample_state(net, noise(0, 1, 2), LABELS, late, 16).shape == (3, 3, 16, 16)
