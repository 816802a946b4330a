"""The flow objective: the direction of time, noise at K tokens, weights, timesteps."""

from __future__ import annotations

import itertools

import pytest
import scipy.stats
import torch

from lgm_scale.flow import (
    NoiseScale,
    flow_loss,
    interpolate,
    merged_noise,
    sample_timesteps,
    training_keys,
    unweighted_flow_loss,
    velocity_target,
)
from lgm_scale.merging.tree import MergeAssignment, MergeTree
from lgm_scale.randomness import Purpose, keyed_normal, stream_keys
from lgm_scale.sampling.config import SamplerConfig

LENGTHS = [32, 64, 128, 256]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tree() -> MergeTree:
    return MergeTree.from_embeddings(randn(64, 12))


def noise_keys(count: int) -> torch.Tensor:
    return stream_keys(3, Purpose.NOISE, 0, torch.arange(count))


# --- time -------------------------------------------------------------------------------------


def test_the_path_runs_from_noise_to_data():
    z, noise = randn(3, 5, 2, seed=1), randn(3, 5, 2, seed=2)
    assert torch.equal(interpolate(z, noise, torch.zeros(3)), noise)
    assert torch.equal(interpolate(z, noise, torch.ones(3)), z)
    each = interpolate(z, noise, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(each[1], 0.25 * z[1] + 0.75 * noise[1])


def test_velocity_is_the_derivative_of_the_path():
    z, noise = randn(3, 5, 2, seed=1), randn(3, 5, 2, seed=2)
    t = torch.tensor([0.1, 0.5, 0.9])
    step = 1e-3
    slope = (interpolate(z, noise, t + step) - interpolate(z, noise, t - step)) / (2 * step)
    torch.testing.assert_close(slope, velocity_target(z, noise), atol=1e-3, rtol=0)


def test_integrating_the_exact_velocity_from_noise_lands_on_data():
    z, noise = randn(3, 5, 2, seed=1).double(), randn(3, 5, 2, seed=2).double()
    grid = SamplerConfig(num_steps=12, timestep_shift=0.2).grid()
    x = noise
    for t, t_next in itertools.pairwise(grid):
        x = x + (t_next - t) * velocity_target(z, noise)
    torch.testing.assert_close(x, z)


def test_integrating_the_marginal_velocity_makes_the_data_distribution():
    """Data N(2, 0.5^2): E[v | z_t] is known in closed form, and so is where the flow must end."""
    mean, var = 2.0, 0.25
    z_t = randn(20_000, 1, 1).double()
    grid = torch.linspace(0, 1, 401, dtype=torch.float64)
    for t, t_next in itertools.pairwise(grid.tolist()):
        gain = (t * var - (1 - t)) / (t**2 * var + (1 - t) ** 2)
        z_t = z_t + (t_next - t) * (mean + gain * (z_t - t * mean))
    assert z_t.mean().item() == pytest.approx(mean, abs=0.02)
    assert z_t.std().item() == pytest.approx(var**0.5, abs=0.02)


# --- noise and weights ------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [4, 16, 64])
def test_corrected_noise_is_merged_full_noise(tree, num_tokens):
    keys, cut = noise_keys(6), tree.assignment(num_tokens)
    full = keyed_normal(keys, (64, 3))
    noise = merged_noise(keys, cut, 3, NoiseScale.CORRECTED)
    assert noise.shape == (6, num_tokens, 3)
    assert torch.equal(noise, cut.project_noise(full))


def test_corrected_noises_of_two_lengths_are_views_of_one_process(tree):
    keys, coarse, fine = noise_keys(6), tree.assignment(8), tree.assignment(32)
    noise = merged_noise(keys, fine, 3, NoiseScale.CORRECTED)
    from_fine = coarse.merge(fine.unmerge(noise))
    torch.testing.assert_close(from_fine, merged_noise(keys, coarse, 3, NoiseScale.CORRECTED))


@pytest.mark.parametrize("scale", list(NoiseScale))
def test_noise_variance(tree, scale):
    cut = tree.assignment(8)
    noise = merged_noise(noise_keys(10_000), cut, 2, scale).transpose(1, 2).reshape(-1, 8)
    expected = 1 / cut.sizes if scale is NoiseScale.CORRECTED else torch.ones(8)
    assert (noise.var(0) / expected - 1).abs().max() < 5 * (2 / 20_000) ** 0.5


def test_noise_of_both_scales_is_equal_without_merging(tree):
    cut = tree.assignment(64)
    corrected = merged_noise(noise_keys(3), cut, 2, NoiseScale.CORRECTED)
    assert torch.equal(corrected, merged_noise(noise_keys(3), cut, 2, NoiseScale.LEGACY))


@pytest.mark.parametrize("scale", list(NoiseScale))
@pytest.mark.parametrize("num_tokens", [4, 17, 64])
def test_mean_of_the_weights_is_one(tree, num_tokens, scale):
    zero = torch.zeros(2, num_tokens, 3)
    loss = flow_loss(zero, zero + 1, tree.assignment(num_tokens), scale)
    torch.testing.assert_close(loss, torch.ones(2))


def test_a_token_weighs_as_many_as_it_merges():
    cut = MergeAssignment.from_labels(torch.tensor([0, 1, 1, 2, 2, 2, 0, 0]))
    error = torch.eye(3)[:, :, None].sqrt().expand(3, 3, 5)  # sample j errs on token j alone
    loss = flow_loss(error, torch.zeros(3, 3, 5), cut, NoiseScale.CORRECTED)
    torch.testing.assert_close(loss, torch.tensor([3.0, 2.0, 3.0]) / 8)
    plain = flow_loss(error, torch.zeros(3, 3, 5), cut, NoiseScale.LEGACY)
    torch.testing.assert_close(plain, torch.full((3,), 1 / 3))


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_loss_equals_the_release(golden, golden_cut, num_tokens):
    file, (cut, order) = golden("dit_tiny_io"), golden_cut(num_tokens)
    z, noise = cut.merge(file["x1_full"]), cut.project_noise(file["eps_full"])
    z_t = interpolate(z, noise, file["t"])
    torch.testing.assert_close(z_t, file[f"k{num_tokens}.x_t"][:, order], atol=1e-6, rtol=0)

    v_pred, v_target = file[f"k{num_tokens}.velocity"][:, order], velocity_target(z, noise)
    corrected = flow_loss(v_pred, v_target, cut, NoiseScale.CORRECTED)
    legacy = flow_loss(v_pred, v_target, cut, NoiseScale.LEGACY)
    expected = file[f"k{num_tokens}.loss_per_sample"]
    unweighted = file[f"k{num_tokens}.loss_per_sample_unweighted"]
    torch.testing.assert_close(corrected, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(legacy, unweighted, atol=1e-6, rtol=0)


def test_loss_is_computed_in_float32(tree):
    cut, v = tree.assignment(16), randn(2, 16, 4).bfloat16()
    loss = flow_loss(v, torch.zeros(2, 16, 4), cut, NoiseScale.CORRECTED)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, flow_loss(v.float(), torch.zeros(2, 16, 4), cut, NoiseScale.CORRECTED))


# --- timesteps --------------------------------------------------------------------------------


def grid(num_steps: int, shift: float) -> torch.Tensor:
    points = SamplerConfig(num_steps=num_steps, timestep_shift=shift).grid()
    return torch.tensor(points, dtype=torch.float64)


@pytest.mark.parametrize("shift", [0.1, 0.2, 0.3, 1.0, 3.0])
def test_shift(shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = grid(101, shift)
    assert shifted[0] == 0
    assert shifted[-1].item() == pytest.approx(1, abs=1e-15)
    assert (shifted.diff() > 0).all()
    inner = slice(1, -1)  # the odds t / (1 - t) are multiplied by the shift
    odds = shifted[inner] / (1 - shifted[inner])
    torch.testing.assert_close(odds, shift * t[inner] / (1 - t[inner]))
    assert grid(3, 0.2)[1].item() == pytest.approx(1 / 6)
    assert torch.equal(grid(101, 1.0), t)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.4, 0.7)])
def test_timesteps_are_logit_normal(mean, std):
    keys = stream_keys(5, Purpose.TIMESTEP, 0, torch.arange(200_000))
    t = sample_timesteps(keys, mean, std)
    assert t.shape == (200_000,)
    assert 0 < t.min() < t.max() < 1
    law = scipy.stats.norm(mean, std)
    assert scipy.stats.kstest(torch.logit(t.double()).numpy(), law.cdf).pvalue > 1e-3


def test_the_loss_of_a_grid_is_the_mean_over_all_but_the_batch():
    target = torch.zeros(2, 3, 2, 2, dtype=torch.bfloat16)
    target[1] = torch.arange(12.0).view(3, 2, 2)
    loss = unweighted_flow_loss(torch.ones_like(target), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([1.0, (1 + sum(i * i for i in range(11))) / 12]))


def test_default_timesteps_are_the_standard_logit_normal():
    keys = noise_keys(100)
    expected = torch.sigmoid(keyed_normal(keys, (1,))[:, 0])
    torch.testing.assert_close(sample_timesteps(keys), expected, atol=1e-6, rtol=0)


def test_a_timestep_does_not_depend_on_the_batch():
    """Up to the last bit, in which a vectorised sigmoid differs from a scalar one."""
    keys = noise_keys(100)
    alone = torch.cat([sample_timesteps(key) for key in keys.split(1)])
    torch.testing.assert_close(alone, sample_timesteps(keys), atol=1.2e-7, rtol=0)


def test_training_keys_depend_on_seed_step_sample_and_purpose_alone():
    ids = torch.tensor([4, 9])
    keys = training_keys(1, 2, ids, Purpose.END_TIME)
    purposes = {Purpose.NOISE, Purpose.TIMESTEP, Purpose.LABEL_DROPOUT, Purpose.END_TIME}
    assert set(keys) == purposes
    for purpose, key in keys.items():
        assert torch.equal(key, stream_keys(1, purpose, 2, ids))
