"""Heun, coarse guidance and growing length: what they reduce to, what they cost, what they need."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.lgm.guidance import coarse_guided_velocity, guided_velocity
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.lgm.sampling import initial_noise, sample, sample_latents
from lgm_scale.flow import NoiseScale
from lgm_scale.merging.nesting import ContrastStats, Nesting, contrast_basis
from lgm_scale.merging.tree import MergeTree
from lgm_scale.sampling.config import CFGRescale, Guidance, SamplerConfig, Solver

NULL = 10
LABELS = torch.tensor([1, 4, 7])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def net(golden_dit) -> MergeDiT:
    return golden_dit.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tree() -> MergeTree:
    return MergeTree.from_embeddings(randn(256, 12))


@pytest.fixture(scope="module")
def contrasts() -> ContrastStats:
    return ContrastStats(0.3 * randn(252, 8, seed=1), randn(252, 8, seed=2).abs())


class RowCounter:
    """A velocity that counts its rows by length."""

    def __init__(self, velocity) -> None:
        self.velocity = velocity
        self.rows: Counter[int] = Counter()
        self.times: list[float] = []

    def __call__(self, z_t, t, labels, assignment):
        assert z_t.shape[1] == assignment.num_tokens
        self.rows[assignment.num_tokens] += len(z_t)
        self.times.append(t[0].item())
        return self.velocity(z_t, t, labels, assignment)


def latents(velocity, tree, num_tokens, config, contrasts=None, indices=(0, 1, 2)):
    return sample_latents(
        velocity, tree, 0, torch.tensor(indices), LABELS[list(indices)], NULL, num_tokens, 8,
        config, contrasts=contrasts,
    )  # fmt: skip


# --- Heun -------------------------------------------------------------------------------------


def test_heun_is_of_second_order(tree):
    """dz/dt = z cos(4 t): the error falls with the square of the step, Euler's with the step."""
    cut, z = tree.assignment(32), randn(1, 32, 8).abs() + 0.5

    def velocity(z_t, t, labels, assignment):
        return z_t * torch.cos(4 * t).view(-1, 1, 1)

    exact = cut.unmerge(z) * torch.exp(torch.sin(torch.tensor(4.0)) / 4)

    def error(solver: Solver, num_steps: int) -> float:
        config = SamplerConfig(num_steps=num_steps, timestep_shift=1.0, solver=solver)
        out = sample(velocity, z, torch.tensor([0]), NULL, cut, config)
        return (out - exact).abs().max().item()

    assert 1.7 < error(Solver.EULER, 21) / error(Solver.EULER, 41) < 2.3
    assert 3.2 < error(Solver.HEUN, 21) / error(Solver.HEUN, 41) < 4.8
    assert error(Solver.HEUN, 21) < 0.3 * error(Solver.EULER, 41)


def test_heun_never_asks_for_the_velocity_of_clean_data(net, tree):
    config = SamplerConfig(num_steps=5, cfg_scale=2.0, timestep_shift=1.0, solver=Solver.HEUN)
    counter = RowCounter(net)
    latents(counter, tree, 32, config)
    assert counter.times == [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert config.num_forwards() == 1 + 2 * 6
    assert counter.rows == {32: 3 * 13}
    assert config.rows(32) == {32: 13}


# --- coarse guidance --------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", list(CFGRescale))
def test_coarse_guidance_at_equal_lengths_is_plain_guidance(net, tree, rescale):
    cut, t = tree.assignment(64), torch.full((3,), 0.5)
    z_t = randn(3, 64, 8)
    plain = guided_velocity(net, z_t, t, LABELS, NULL, cut, 4.0, rescale)
    nesting = Nesting.between(cut, cut)
    coarse = coarse_guided_velocity(net, z_t, t, LABELS, NULL, nesting, 4.0, rescale)
    torch.testing.assert_close(coarse, plain, atol=2e-5, rtol=0)
    for uncond in (64, 200):
        config = SamplerConfig(num_steps=6, cfg_scale=4.0, uncond_num_tokens=uncond)
        plain = SamplerConfig(num_steps=6, cfg_scale=4.0)
        assert torch.equal(latents(net, tree, 64, config), latents(net, tree, 64, plain))


@pytest.mark.parametrize("rescale", list(CFGRescale))
def test_coarse_guidance_moves_the_shared_subspace_alone(net, tree, rescale):
    fine, coarse = tree.assignment(64), tree.assignment(16)
    nesting, t, z_t = Nesting.between(fine, coarse), torch.full((3,), 0.5), randn(3, 64, 8)
    v = coarse_guided_velocity(net, z_t, t, LABELS, NULL, nesting, 4.0, rescale)
    v_cond = net(z_t, t, LABELS, fine)
    v_uncond = net(nesting.merge(z_t), t, torch.full((3,), NULL), coarse)
    push = v - v_cond
    if rescale is CFGRescale.PER_POSITION:
        push = push * fine.sizes[:, None]
    delta = nesting.merge(v_cond) - v_uncond
    torch.testing.assert_close(push, 3 * nesting.expand(delta), atol=2e-4, rtol=0)
    assert push.abs().max() > 0.1


def test_coarse_guidance_costs_coarse_rows(net, tree):
    config = SamplerConfig(num_steps=25, cfg_scale=4.0, uncond_num_tokens=16)
    counter = RowCounter(net)
    latents(counter, tree, 64, config)
    assert config.rows(64) == {64: 24, 16: 12}
    assert config.num_forwards() == 36
    assert counter.rows == {64: 3 * 24, 16: 3 * 12}


# --- autoguidance -----------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", list(CFGRescale))
def test_autoguidance_keeps_the_class_in_its_weak_branch(net, tree, rescale):
    config = SamplerConfig(
        num_steps=2, cfg_scale=4.0, cfg_rescale=rescale, cfg_interval=(0.0, 1.0),
        uncond_num_tokens=16, guidance=Guidance.AUTOGUIDANCE,
    )  # fmt: skip
    fine, coarse = tree.assignment(64), tree.assignment(16)
    nesting, t = Nesting.between(fine, coarse), torch.zeros(3)
    noise = initial_noise(0, torch.arange(3), fine, 8, NoiseScale.CORRECTED)
    v_cond = net(noise, t, LABELS, fine)
    v_weak = net(nesting.merge(noise), t, LABELS, coarse)
    push = 3 * nesting.expand(nesting.merge(v_cond) - v_weak)
    if rescale is CFGRescale.PER_POSITION:
        push = push / fine.sizes[:, None]
    expected = fine.unmerge(noise + v_cond + push)
    counter = RowCounter(net)
    torch.testing.assert_close(latents(counter, tree, 64, config), expected, atol=1e-4, rtol=0)
    assert counter.rows == {64: 3, 16: 3}
    assert config.rows(64) == {64: 1, 16: 1}
    plain = SamplerConfig(
        num_steps=2, cfg_scale=4.0, cfg_rescale=rescale, cfg_interval=(0.0, 1.0),
        uncond_num_tokens=16,
    )  # fmt: skip
    assert (latents(net, tree, 64, plain) - expected).abs().max() > 0.02


def test_autoguidance_without_a_weaker_branch_is_refused(net, tree, contrasts):
    auto = {"guidance": Guidance.AUTOGUIDANCE, "uncond_num_tokens": 32, "cfg_scale": 2.0}
    with pytest.raises(ConfigError, match="than in the strong one, and num_tokens is 32"):
        latents(net, tree, 32, SamplerConfig(**auto))
    growing = SamplerConfig(**auto, length_schedule=((0.0, 16), (0.3, 64)))
    with pytest.raises(ConfigError, match="length_schedule guides a step at 16"):
        latents(net, tree, 64, growing, contrasts)
    noise = initial_noise(0, torch.arange(3), tree.assignment(32), 8, NoiseScale.CORRECTED)
    with pytest.raises(ConfigError, match="needs fewer tokens in its weak branch"):
        sample(net, noise, LABELS, NULL, tree.assignment(32), SamplerConfig(**auto), tree)


# --- growing length ---------------------------------------------------------------------------

GROWTH = ((0.0, 16), (0.1, 48), (0.3, 64))


def test_equal_lengths_are_the_plain_sampler(net, tree, contrasts):
    flat = SamplerConfig(num_steps=9, cfg_scale=4.0, length_schedule=((0.0, 64), (0.2, 64)))
    plain = SamplerConfig(num_steps=9, cfg_scale=4.0)
    assert torch.equal(latents(net, tree, 64, flat), latents(net, tree, 64, plain))


def test_growing_costs_short_rows(net, tree, contrasts):
    config = SamplerConfig(
        num_steps=25, cfg_scale=4.0, length_schedule=GROWTH, uncond_num_tokens=32
    )
    counter = RowCounter(net)
    out = latents(counter, tree, 64, config, contrasts)
    assert out.shape == (3, 256, 8)
    starts = config.grid()[:-1]
    short, middle = sum(t < 0.1 for t in starts), sum(0.1 <= t < 0.3 for t in starts)
    guided = [t for t in starts if t >= 0.15]
    expected = {16: short, 48: middle, 64: 24 - short - middle, 32: len(guided)}
    assert config.rows(64) == expected
    assert counter.rows == {k: 3 * rows for k, rows in expected.items()}


def test_heun_keeps_one_length_within_a_step(net, tree, contrasts):
    config = SamplerConfig(num_steps=9, length_schedule=GROWTH, solver=Solver.HEUN)
    counter = RowCounter(net)
    latents(counter, tree, 64, config, contrasts)
    assert counter.rows == {k: 3 * rows for k, rows in config.rows(64).items()}
    assert sum(config.rows(64).values()) == config.num_forwards() == 15


def test_the_contrast_basis_is_built_once_per_tree(net, contrasts):
    """It is a property of the tree: neither steps nor batches of one generator build it again."""
    tree, other = (MergeTree.from_embeddings(randn(256, 12, seed=seed)) for seed in (1, 2))
    config = SamplerConfig(num_steps=9, length_schedule=((0.0, 16), (0.2, 32), (0.4, 64)))
    contrast_basis.cache_clear()
    for _ in range(2):
        latents(net, tree, 64, config, contrasts)
    assert contrast_basis.cache_info().misses == 1
    assert contrast_basis(tree) is contrast_basis(tree)
    assert not contrast_basis(tree).is_inference()  # of use to whoever trains, too
    assert not torch.equal(contrast_basis(other), contrast_basis(tree))


def test_growing_is_exact_for_gaussian_data(tree, contrasts):
    """Data with independent Gaussian contrasts, and the exact velocity at every length.

    The same image comes out whether its trajectory ran at 64 tokens or grew to them.
    """
    basis = contrast_basis(tree)
    mean, std = contrasts.mean.double(), contrasts.std.double()
    roots = tree.assignment(4)

    def velocity(z_t, t, labels, assignment):
        s = t[0].double()
        x = assignment.unmerge(z_t).double()
        u = basis.T @ x  # contrasts below the cut are zero, and stay unused
        variance = (1 - s) ** 2 + (s * std) ** 2
        slope = (s * std**2 - (1 - s)) / variance
        v = basis @ (mean + slope * (u - s * mean))
        shared = roots.unmerge(roots.merge(x))  # the data's block means: standard normal
        v = v + shared * ((s - (1 - s)) / ((1 - s) ** 2 + s**2))
        return assignment.merge(v.float())

    def out(schedule):
        config = SamplerConfig(num_steps=120, solver=Solver.HEUN, length_schedule=schedule)
        return latents(velocity, tree, 64, config, contrasts)

    torch.testing.assert_close(out(GROWTH), out(()), atol=1e-2, rtol=0)


@pytest.mark.parametrize("extra", [{}, {"uncond_num_tokens": 8}, {"solver": Solver.HEUN}])
def test_an_image_does_not_depend_on_its_batch(net, tree, contrasts, extra):
    config = SamplerConfig(num_steps=7, cfg_scale=4.0, length_schedule=GROWTH, **extra)
    together = latents(net, tree, 64, config, contrasts)
    for indices in ([2], [1, 0]):
        alone = latents(net, tree, 64, config, contrasts, indices)
        torch.testing.assert_close(alone, together[indices], atol=5e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


# --- what they need ---------------------------------------------------------------------------


def test_growing_without_contrasts_is_refused(net, tree):
    config = SamplerConfig(num_steps=9, length_schedule=GROWTH)
    with pytest.raises(CheckpointError, match="hold no contrasts of the merge tree"):
        latents(net, tree, 64, config)


@pytest.mark.parametrize("extra", [{"uncond_num_tokens": 8}, {"length_schedule": GROWTH}])
def test_legacy_noise_is_refused(net, tree, contrasts, extra):
    config = SamplerConfig(num_steps=9, **extra)
    with pytest.raises(ConfigError, match="trained with noise_scale 'corrected'"):
        sample_latents(
            net, tree, 0, torch.arange(3), LABELS, NULL, 64, 8, config, NoiseScale.LEGACY, contrasts
        )


def test_lengths_outside_the_tree_are_refused(net, tree, contrasts):
    for config in (
        SamplerConfig(num_steps=9, cfg_scale=2.0, uncond_num_tokens=3),
        SamplerConfig(num_steps=9, length_schedule=((0.0, 2), (0.1, 64))),
    ):
        with pytest.raises(ConfigError, match=r"outside \[4, 256\]"):
            latents(net, tree, 64, config, contrasts)


def test_without_its_tree_a_second_length_is_refused(net, tree):
    config = SamplerConfig(num_steps=9, cfg_scale=4.0, uncond_num_tokens=16)
    cut = tree.assignment(64)
    noise = initial_noise(0, torch.arange(3), cut, 8, NoiseScale.CORRECTED)
    with pytest.raises(ConfigError, match="pass `tree`"):
        sample(net, noise, LABELS, NULL, cut, config)


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        ([[0.1, 16], [0.3, 64]], "must start at t = 0 and rise in t"),
        ([[0.0, 16], [0.3, 32], [0.3, 64]], "must start at t = 0 and rise in t"),
        ([[0.0, 64], [0.3, 16]], "must not shrink"),
        ([[0.0, 0], [0.3, 16]], "must not shrink"),
        ([[0.0, 16], [0.95, 64]], "never reaches its last length: the last of 8 steps starts at"),
    ],
)
def test_a_schedule_without_meaning_is_named(schedule, text):
    with pytest.raises(ConfigError) as error:
        SamplerConfig(num_steps=9, length_schedule=schedule)
    assert len(error.value.problems) == 1
    assert text in error.value.problems[0]


def test_a_schedule_that_ends_elsewhere_is_named():
    config = SamplerConfig(length_schedule=[[0.0, 16], [0.3, 64]])
    assert config.length_schedule == ((0.0, 16), (0.3, 64))
    with pytest.raises(ConfigError, match="it ends at 64 tokens, but num_tokens is 128"):
        config.rows(128)
