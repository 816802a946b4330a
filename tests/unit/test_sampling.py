"""The sampler: guidance, its interval and its cost, and images that depend on their index alone."""

from __future__ import annotations

import pytest
import torch

from lgm_scale.errors import ConfigError
from lgm_scale.families.lgm.guidance import guided_velocity
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.lgm.sampling import initial_noise, sample
from lgm_scale.flow import NoiseScale
from lgm_scale.merging.tree import MergeAssignment, MergeTree
from lgm_scale.sampling.config import CFGRescale, SamplerConfig, Solver
from lgm_scale.sampling.integration import integrate
from lgm_scale.sampling.replay import ReplayedVelocity

LENGTHS = [32, 64, 128, 256]
NULL = 10


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def net(golden_dit) -> MergeDiT:
    return golden_dit.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tree() -> MergeTree:
    return MergeTree.from_embeddings(randn(256, 12))


class Recorder:
    """A velocity that notes how it was called."""

    def __init__(self, velocity) -> None:
        self.velocity = velocity
        self.rows: list[int] = []
        self.times: list[float] = []
        self.labels: list[list[int]] = []

    def __call__(self, z_t, t, labels, assignment):
        assert len(z_t) == len(t) == len(labels)
        assert (t == t[0]).all()
        self.rows.append(len(z_t))
        self.times.append(t[0].item())
        self.labels.append(labels.tolist())
        return self.velocity(z_t, t, labels, assignment)


def by_label(z_t, t, labels, assignment):
    """A velocity whose value in channel d is label * (d + 1), everywhere."""
    channels = torch.arange(1, z_t.shape[-1] + 1)
    return (labels[:, None, None] * channels).float().expand_as(z_t)


# --- against the release ----------------------------------------------------------------------


@pytest.mark.parametrize("rescale", list(CFGRescale))
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_guided_velocity_equals_the_release(golden, golden_cut, net, num_tokens, rescale):
    file, (cut, order) = golden("dit_tiny_io"), golden_cut(num_tokens)
    noise = cut.project_noise(file["eps_full"])
    t = torch.full((4,), 0.5)
    v = guided_velocity(net, noise, t, file["y_conditional"], NULL, cut, 4.0, rescale)
    expected = file[f"k{num_tokens}.guided_{rescale.value}_cfg4"][:, order]
    torch.testing.assert_close(v, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "cfg_scale", "rescale"),
    [
        ("sample_cfg1", 1.0, CFGRescale.NONE),
        ("sample_cfg4_per_position", 4.0, CFGRescale.PER_POSITION),
    ],
)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_trajectory_equals_the_release(
    golden, golden_cut, net, num_tokens, name, cfg_scale, rescale
):
    file, (cut, _) = golden("dit_tiny_io"), golden_cut(num_tokens)
    config = SamplerConfig(
        num_steps=9,
        cfg_scale=cfg_scale,
        cfg_interval=(0.15, 1.0),
        cfg_rescale=rescale,
        timestep_shift=0.3,
    )
    noise = cut.project_noise(file["eps_full"])
    latents = sample(net, noise, file["y_conditional"], NULL, cut, config)
    torch.testing.assert_close(latents, file[f"k{num_tokens}.{name}"], atol=1e-4, rtol=0)


# --- the solver -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_the_exact_velocity_carries_noise_to_data(tree, num_tokens):
    cut = tree.assignment(num_tokens)
    z, noise = randn(2, num_tokens, 3, seed=1), randn(2, num_tokens, 3, seed=2)

    def towards_data(z_t, t, labels, assignment):
        return (z - z_t) / (1 - t.view(-1, 1, 1))

    config = SamplerConfig(num_steps=13, timestep_shift=0.2)
    latents = sample(towards_data, noise, torch.zeros(2).long(), NULL, cut, config)
    torch.testing.assert_close(latents, cut.unmerge(z), atol=1e-5, rtol=0)


def test_grid():
    assert SamplerConfig(num_steps=5, timestep_shift=1.0).grid() == [0, 0.25, 0.5, 0.75, 1]
    grid = SamplerConfig(num_steps=25, timestep_shift=0.2).grid()
    assert len(grid) == 25
    assert grid[0] == 0
    assert grid[-1] == pytest.approx(1, abs=1e-12)
    assert grid[12] == pytest.approx(0.2 * 0.5 / (1 - 0.8 * 0.5))
    assert SamplerConfig(num_steps=2).grid() == pytest.approx([0, 1])


def test_network_is_called_at_the_start_of_every_interval(tree):
    cut, config = tree.assignment(32), SamplerConfig(num_steps=9, timestep_shift=0.3)
    velocity = Recorder(by_label)
    sample(velocity, torch.zeros(2, 32, 3), torch.tensor([1, 2]), NULL, cut, config)
    assert velocity.times == pytest.approx(config.grid()[:-1])


def test_samples_are_float32_and_full_length_for_any_velocity(tree):
    def coarse(z_t, t, labels, assignment):
        return torch.ones_like(z_t, dtype=torch.bfloat16)

    cut, config = tree.assignment(32), SamplerConfig(num_steps=300, timestep_shift=1.0)
    latents = sample(coarse, torch.zeros(2, 32, 3), torch.tensor([1, 2]), NULL, cut, config)
    assert latents.shape == (2, 256, 3)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, torch.ones(2, 256, 3), atol=1e-4, rtol=0)


# --- guidance ---------------------------------------------------------------------------------


def test_guidance_formulas_hold_on_every_channel():
    cut = MergeAssignment.from_labels(torch.tensor([0, 1, 1, 2, 2, 2, 2, 0]))  # sizes 2, 2, 4
    z_t, t, labels = randn(2, 3, 6), torch.tensor([0.5, 0.5]), torch.tensor([1, 4])
    cond = by_label(z_t, t, labels, cut)
    uncond = by_label(z_t, t, torch.full((2,), NULL), cut)

    plain = guided_velocity(by_label, z_t, t, labels, NULL, cut, 4.0, CFGRescale.NONE)
    torch.testing.assert_close(plain, uncond + 4 * (cond - uncond))
    scaled = guided_velocity(by_label, z_t, t, labels, NULL, cut, 4.0, CFGRescale.PER_POSITION)
    torch.testing.assert_close(scaled[:, :2], cond[:, :2] + 3 / 2 * (cond - uncond)[:, :2])
    torch.testing.assert_close(scaled[:, 2], cond[:, 2] + 3 / 4 * (cond - uncond)[:, 2])
    for guided in (plain, scaled):
        assert ((guided - cond).abs() > 0.1).all(), "an entry without guidance"


@pytest.mark.parametrize("rescale", list(CFGRescale))
def test_guidance_of_a_network_touches_all_channels(net, tree, rescale):
    cut = tree.assignment(32)
    z_t, t, labels = randn(2, 32, 8), torch.tensor([0.5, 0.5]), torch.tensor([1, 4])
    guided = guided_velocity(net, z_t, t, labels, NULL, cut, 4.0, rescale)
    moved = (guided - net(z_t, t, labels, cut)).abs().amax(dim=(0, 1))
    assert moved.shape == (8,)
    assert (moved > 1e-3).all()


def test_both_rescales_are_equal_without_merging(net, tree):
    cut = tree.assignment(256)
    inputs = (net, randn(2, 256, 8), torch.tensor([0.5, 0.5]), torch.tensor([1, 4]), NULL, cut, 4.0)
    plain = guided_velocity(*inputs, CFGRescale.NONE)
    scaled = guided_velocity(*inputs, CFGRescale.PER_POSITION)
    torch.testing.assert_close(plain, scaled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rescale", list(CFGRescale))
def test_scale_one_is_the_conditional_velocity(net, tree, rescale):
    cut = tree.assignment(64)
    z_t, t, labels = randn(2, 64, 8), torch.tensor([0.5, 0.5]), torch.tensor([1, 4])
    guided = guided_velocity(net, z_t, t, labels, NULL, cut, 1.0, rescale)
    torch.testing.assert_close(guided, net(z_t, t, labels, cut), atol=2e-6, rtol=0)


def test_scale_one_never_runs_the_null_label(tree):
    velocity, config = Recorder(by_label), SamplerConfig(num_steps=9, cfg_interval=(0.0, 1.0))
    cut = tree.assignment(32)
    sample(velocity, torch.zeros(2, 32, 3), torch.tensor([1, 2]), NULL, cut, config)
    assert velocity.labels == [[1, 2]] * 8
    assert config.num_forwards() == 8


@pytest.mark.parametrize(
    ("interval", "guided_times"),
    [
        ((0.25, 0.5), [0.25, 0.375, 0.5]),
        ((0.26, 0.49), [0.375]),
        ((0.0, 0.0), [0.0]),
        ((0.875, 1.0), [0.875]),
        ((0.9, 1.0), []),
        ((0.0, 1.0), [i / 8 for i in range(8)]),
    ],
)
def test_interval_includes_its_edges(tree, interval, guided_times):
    config = SamplerConfig(num_steps=9, cfg_scale=2.0, cfg_interval=interval, timestep_shift=1.0)
    velocity, cut = Recorder(by_label), tree.assignment(32)
    sample(velocity, torch.zeros(2, 32, 3), torch.tensor([1, 2]), NULL, cut, config)
    was_guided = [t for t, rows in zip(velocity.times, velocity.rows, strict=True) if rows == 4]
    assert was_guided == guided_times
    for labels in velocity.labels:
        assert labels in ([1, 2], [1, 2, NULL, NULL])


@pytest.mark.parametrize(
    ("config", "num_forwards"),
    [
        (SamplerConfig(num_steps=25, cfg_scale=4.0, timestep_shift=0.2), 36),
        (SamplerConfig(num_steps=9, cfg_scale=4.0, timestep_shift=0.3), 13),
        (SamplerConfig(num_steps=25, cfg_scale=1.0), 24),
        (SamplerConfig(num_steps=25, cfg_scale=4.0, cfg_interval=(0.0, 1.0)), 48),
        (SamplerConfig(num_steps=2, cfg_scale=4.0), 1),
    ],
)
def test_number_of_network_rows(tree, config, num_forwards):
    velocity, cut = Recorder(by_label), tree.assignment(32)
    sample(velocity, torch.zeros(3, 32, 3), torch.tensor([1, 2, 5]), NULL, cut, config)
    assert config.num_forwards() == num_forwards
    assert sum(velocity.rows) == 3 * num_forwards


# --- images depend on their index alone -------------------------------------------------------


@pytest.mark.parametrize("scale", list(NoiseScale))
def test_noise_depends_on_seed_and_index_alone(tree, scale):
    cut = tree.assignment(32)
    noise = initial_noise(5, torch.arange(8), cut, 3, scale)
    assert noise.shape == (8, 32, 3)
    assert noise.device.type == "cpu"
    order = torch.tensor([6, 2, 7])
    assert torch.equal(initial_noise(5, order, cut, 3, scale), noise[order])
    for index in range(8):
        alone = initial_noise(5, torch.tensor([index]), cut, 3, scale)
        assert torch.equal(alone[0], noise[index])
    assert not torch.isclose(initial_noise(6, torch.arange(8), cut, 3, scale), noise).all()
    assert len(noise.flatten(1).unique(dim=0)) == 8


def test_noises_of_two_lengths_are_views_of_one_process(tree):
    indices = torch.arange(4)
    full, fine, coarse = (
        initial_noise(5, indices, tree.assignment(k), 3, NoiseScale.CORRECTED)
        for k in (256, 128, 32)
    )
    fine_cut, coarse_cut = tree.assignment(128), tree.assignment(32)
    torch.testing.assert_close(fine, fine_cut.merge(full))
    torch.testing.assert_close(coarse, coarse_cut.merge(fine_cut.unmerge(fine)))


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_an_image_does_not_depend_on_its_batch(net, tree, cfg_scale):
    cut = tree.assignment(32)
    config = SamplerConfig(num_steps=6, cfg_scale=cfg_scale)
    labels = torch.tensor([3, 0, 9, 3, 7])

    def images(indices: list[int]) -> torch.Tensor:
        noise = initial_noise(0, torch.tensor(indices), cut, 8, NoiseScale.CORRECTED)
        return sample(net, noise, labels[indices], NULL, cut, config)

    together = images([0, 1, 2, 3, 4])
    for batch in ([0], [4, 1], [2, 0, 3]):
        torch.testing.assert_close(images(batch), together[batch], atol=5e-6, rtol=0)
    assert torch.equal(images([0, 1, 2, 3, 4]), together)
    assert (together[0] - together[3]).abs().max() > 0.1, "one label, two indices, one image"


def test_a_replayed_velocity_gives_the_same_bits(net, tree):
    """With a stand-in for a graph, which like one reads and writes fixed memory."""
    made = []

    def record(call, inputs):
        out = torch.full_like(inputs[0], float("nan"))
        made.append(inputs[0].shape)
        return lambda: out.copy_(call(*inputs)), out

    replayed = ReplayedVelocity(net, record, keep=2)
    config = SamplerConfig(num_steps=6, cfg_scale=3.0, cfg_interval=(0.3, 1.0))
    for num_tokens, size in ((32, 2), (32, 2), (64, 2), (32, 1)):
        cut = tree.assignment(num_tokens)
        noise, labels = randn(size, num_tokens, 8), torch.arange(size)
        images = [sample(v, noise, labels, NULL, cut, config) for v in (net, replayed)]
        assert torch.equal(*images)
    # Plain and guided steps have a graph each; two are kept, and a kept one is not made again.
    assert [shape[:2] for shape in made] == [
        (2, 32), (4, 32), (2, 64), (4, 64), (1, 32), (2, 32),
    ]  # fmt: skip


# --- configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"num_steps": 1}, "num_steps: 1 grid points; needs 2 or more"),
        ({"cfg_scale": 0.5}, "cfg_scale: 0.5 is below 1; 1 turns guidance off"),
        ({"cfg_interval": (0.9, 0.1)}, "cfg_interval: (0.9, 0.1) must be ordered"),
        ({"cfg_interval": (0.1, 1.1)}, "cfg_interval: (0.1, 1.1) must be ordered"),
        ({"timestep_shift": 0.0}, "timestep_shift: 0.0 must be above 0"),
    ],
)
def test_a_setting_without_meaning_is_named(setting, text):
    with pytest.raises(ConfigError) as error:
        SamplerConfig(**setting)
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(text)


def test_heun_averages_the_velocities_at_both_ends_but_in_the_last_step():
    """Of dz/dt = z, with a state that each step begins one higher."""
    config = SamplerConfig(num_steps=4, solver=Solver.HEUN, timestep_shift=1.0)
    expected, steps, ended = 1.0, [], []
    for t, t_next in zip(config.grid(), config.grid()[1:], strict=False):
        steps.append((t, 2))
        h = t_next - t
        expected = (expected + 1) * (1 + h + (h * h / 2 if t_next < 1 else 0))

    def begin(z: torch.Tensor, t: float, num_tokens: int) -> torch.Tensor:
        begun.append((t, num_tokens))
        return z + 1

    begun: list[tuple[float, int]] = []
    start = torch.ones(1, dtype=torch.float64)
    found = integrate(start, lambda z, *_: z, config, 2, begin, lambda: ended.append(len(begun)))
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert (begun, ended) == (steps, [1, 2, 3])
    plain = integrate(start, lambda z, *_: z, config, 2)
    assert plain.item() == pytest.approx((1 + 1 / 3 + 1 / 18) ** 2 * (1 + 1 / 3), rel=1e-12)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        SamplerConfig(num_steps=0, cfg_scale=0.0, cfg_interval=(-1.0, 2.0), timestep_shift=-1.0)
    keys = [problem.split(":")[0] for problem in error.value.problems]
    assert keys == ["num_steps", "cfg_scale", "cfg_interval", "timestep_shift"]
    assert str(error.value).startswith("4 problems in sampler:")


def test_plain_strings_are_taken_for_what_they_name():
    config = SamplerConfig(cfg_rescale="none", solver="heun")  # type: ignore[arg-type]
    assert config == SamplerConfig(cfg_rescale=CFGRescale.NONE, solver=Solver.HEUN)
    with pytest.raises(ConfigError, match="cfg_rescale: 'some' is unknown; use none or per_pos"):
        SamplerConfig(cfg_rescale="some")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(ConfigError) as caught:
        SamplerConfig(cfg_scale=value, timestep_shift=value)
    assert len(caught.value.problems) == 2
