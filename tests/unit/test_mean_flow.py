"""MeanFlow: its identity on a known Gaussian, its target, networks, samples, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_pipeline
import torch
from test_flops import counted
from torch import Tensor

from lgm_scale.bundle import read_info
from lgm_scale.config.rules import load_training_run
from lgm_scale.config.schema import FlowObjectiveConfig, MeanFlowConfig
from lgm_scale.errors import ConfigError
from lgm_scale.families.elit.network import ELIT, SiT
from lgm_scale.families.elit.training import ELITTrainingModel
from lgm_scale.families.generator import solver_problems
from lgm_scale.families.lgm.bundle import save_lgm_bundle
from lgm_scale.families.lgm.config import LGMModelConfig, LGMObjectiveConfig
from lgm_scale.families.lgm.initial_weights import LGMInitialWeights
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.network import MergeDiT, build_merge_dit
from lgm_scale.families.lgm.pipeline import LGMPipeline
from lgm_scale.families.lgm.sampling import sample
from lgm_scale.families.lgm.training import LGMTrainingModel
from lgm_scale.layers import EndTimeEmbedding
from lgm_scale.mean_flow import (
    adaptively_weighted,
    mean_flow_velocity,
    rate_along_flow,
    sample_spans,
)
from lgm_scale.merging.tree import MergeAssignment, MergeTree
from lgm_scale.parallel.blocks import checkpoint_blocks
from lgm_scale.randomness import Purpose, stream_keys
from lgm_scale.sampling.config import SamplerConfig, Solver

N, K, D = 16, 6, 3
bundle = test_pipeline.bundle  # a fixture: a generator of the velocity, random weights
RECIPE = str(Path(__file__).resolve().parents[2] / "yamls/experiments/few_steps/mean_flow.yaml")


@pytest.fixture(scope="module")
def tree() -> MergeTree:
    return MergeTree.from_embeddings(torch.randn(N, 8, generator=torch.manual_seed(3)), 2)


@pytest.fixture
def cut(tree) -> MergeAssignment:
    found = tree.assignment(K)
    assert len(set(found.sizes.tolist())) > 1  # sizes that are all one would prove little
    return found


def shuffled(net: torch.nn.Module) -> torch.nn.Module:
    """The network with weights of which none is zero."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.15, generator=torch.Generator().manual_seed(parameter.numel()))
    return net.eval()


def merge_dit(end_time: bool = True) -> MergeDiT:
    return MergeDiT(32, 2, 2, D, N, 5, end_time)


# --- on a Gaussian --------------------------------------------------------------------------------


class Gaussian:
    """Velocity and average velocity where latents of N tokens are Gaussian, seen at K tokens.

    Merged data have the covariance C = P^T cov P over tokens, merged noise diag(1 / size). With
    z = S w, S = diag(1 / size)^(1/2) and Q the eigenvectors of S^-1 C S^-1 with values c, the parts
    Q^T w are independent: their deviation at t is (t^2 c + (1 - t)^2)^(1/2).
    """

    def __init__(self, cut: MergeAssignment, dtype: torch.dtype) -> None:
        gen = torch.Generator().manual_seed(3)
        root = cut.pool.double().T @ torch.randn(N, N, generator=gen, dtype=torch.float64) / 2
        scale = cut.sizes.double().rsqrt()  # deviation of the noise of each token
        values, vectors = torch.linalg.eigh((root @ root.T) / scale[:, None] / scale[None, :])
        self.mean = cut.merge(torch.randn(1, N, D, generator=gen)).to(dtype)
        self.values = values.clamp_min(0)[:, None].to(dtype)  # [K, 1]
        self.into, self.back = (vectors.T / scale).to(dtype), (scale[:, None] * vectors).to(dtype)
        self.state = torch.randn(32, K, D, generator=gen).to(dtype)
        self.t, self.end = torch.rand(2, 32, generator=gen).to(dtype).sort(0).values

    def deviation(self, t: Tensor) -> Tensor:
        t = t[:, None, None]
        return (t.square() * self.values + (1 - t).square()).sqrt()  # [B, K, 1]

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        times = t[:, None, None]
        rate = (times * self.values - (1 - times)) / self.deviation(t).square()
        return self.mean + self.back @ (rate * (self.into @ (z - times * self.mean)))

    def average(self, z: Tensor, t: Tensor, labels: Tensor, end: Tensor) -> Tensor:
        growth = self.deviation(end) / self.deviation(t) - 1
        moved = self.back @ (growth * (self.into @ (z - t[:, None, None] * self.mean)))
        span = (end - t)[:, None, None]
        far = self.mean + moved / span.clamp_min(1e-30)
        return torch.where(span > 0, far, self.velocity(z, t))


def test_the_identity_holds_where_the_average_velocity_is_known(cut):
    """v = u - (end - t) du/dt, to 1e-4 in float32, with noise of every token's own size."""
    world = Gaussian(cut, torch.float32)
    z, t, end, labels = world.state, world.t, world.end, torch.zeros(32, dtype=torch.int64)
    v = world.velocity(z, t)
    found, target = mean_flow_velocity(world.average, z, (t, end), labels, 1, v + 1, 1.0)
    assert (world.average(z, t, labels, end) - v).abs().max() > 0.5  # what du/dt makes up for
    torch.testing.assert_close(found, v, atol=1e-4, rtol=1e-4)
    assert torch.equal(target, v + 1)


def test_a_step_of_the_average_velocity_ends_where_small_steps_do(cut):
    world = Gaussian(cut, torch.float64)
    z, t, length = world.state, world.t, (world.end - world.t) / 400
    for i in range(400):  # the midpoints of time, by Euler steps of half a length before
        half = z + length[:, None, None] / 2 * world.velocity(z, t + i * length)
        z = z + length[:, None, None] * world.velocity(half, t + (i + 0.5) * length)
    config = SamplerConfig(num_steps=2, solver=Solver.MEAN_FLOW)
    jump = world.state + 400 * length[:, None, None] * world.average(
        world.state, t, torch.zeros(32), world.end
    )
    torch.testing.assert_close(jump, z, atol=1e-4, rtol=1e-4)
    # The sampler takes such steps: from noise to data in one evaluation.
    net = lambda z_t, times, labels, cut, end: world.average(z_t, times, labels, end)  # noqa: E731
    ends = torch.zeros(32), torch.ones(32)
    whole = world.state + world.average(world.state, ends[0], torch.zeros(32), ends[1])
    made = sample(net, world.state, torch.zeros(32, dtype=torch.int64), 1, cut, config)
    torch.testing.assert_close(made, cut.unmerge(whole.float().double()), atol=1e-5, rtol=1e-5)


# --- the target -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["merged", "grid"])
def test_the_derivative_is_that_of_finite_differences(cut, family):
    labels, end, t = torch.tensor([1, 5]), torch.tensor([0.9, 0.4]), torch.tensor([0.2, 0.3])
    if family == "merged":
        net, z = shuffled(merge_dit()).double(), torch.randn(2, K, D, dtype=torch.float64)
        u = lambda z_t, t: net(z_t, t, labels, cut, end.double())  # noqa: E731
    else:
        net, z = (
            shuffled(SiT(32, 2, 2, 3, 8, 4, 5, True)).double(),
            torch.randn(2, 3, 8, 8).double(),
        )
        u = lambda z_t, t: net(z_t, t, labels, 4, end.double())  # noqa: E731
    velocity, h = torch.randn_like(z), 1e-3
    found = rate_along_flow(u, z, t.double(), velocity)
    with torch.no_grad():
        late, early = (u(z + s * h * velocity, t.double() + s * h) for s in (1, -1))
    assert found.abs().max() > 0.05
    torch.testing.assert_close(found, (late - early) / (2 * h), atol=2e-4, rtol=2e-3)


def test_the_target_is_fixed_where_guidance_is_learned():
    """With v_cond = v_null + w (v - v_null), what is learned is what was."""
    v, v_null, w = torch.tensor(3.0), torch.tensor(1.0), torch.tensor([[1.5], [4.0]])
    guided = v_null + w * (v - v_null)
    net = lambda z, t, labels, end: torch.where(labels[:, None, None] < 5, guided, v_null) + 0 * z  # noqa: E731
    z, t, labels = torch.zeros(2, 2, 1), torch.zeros(2), torch.tensor([2, 5])
    _, target = mean_flow_velocity(net, z, (t, t), labels, 5, v.expand(2, 2, 1), w)
    torch.testing.assert_close(target[0], guided)
    torch.testing.assert_close(target[1], v.expand(2, 1))  # without a class there is no guidance


def test_guidance_is_divided_by_the_sizes_as_the_sampler_does(tree, cut):
    objective = LGMObjectiveConfig(mean_flow=MeanFlowConfig(guidance=2.0))
    model = LGMTrainingModel(
        merge_dit(), tree, LatentStats(torch.zeros(D), torch.ones(D)), objective, 0
    )
    sizes = model.relative_sizes(cut)
    assert sizes is not None
    per_position = (1 + N / K - 1) / cut.sizes  # `cfg_rescale: per_position` at w = 1 + N / K
    torch.testing.assert_close(1 / sizes[:, 0], per_position)


def test_spans_keep_the_law_of_t():
    keys = stream_keys(0, Purpose.END_TIME, 1, torch.arange(4000))
    t = torch.linspace(0.01, 0.99, 4000)
    start, end = sample_spans(keys, t, 0.25, 0.0, 1.0)
    far = end > start
    assert far.float().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(start[~far], t[~far])
    assert ((start == t) | (end == t)).all()
    other = torch.where(start == t, end, start)[far].logit()
    assert other.mean() == pytest.approx(0, abs=0.1)
    assert other.std() == pytest.approx(1, abs=0.1)
    again = sample_spans(keys[7:9], t[7:9], 0.25, 0.0, 1.0)  # whatever the batch
    assert torch.equal(torch.stack(again), torch.stack((start, end))[:, 7:9])


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_adaptive_weights_are_constants_and_what_is_noted_has_none(tree, power):
    error = torch.tensor([0.1, 2.0, 30.0], requires_grad=True)
    assert adaptively_weighted(error, 0.0) is error
    adaptively_weighted(error, power).sum().backward()
    torch.testing.assert_close(error.grad, (error.detach() + 1e-3) ** -power)
    stats, ids = LatentStats(torch.zeros(D), torch.ones(D)), torch.arange(6)
    latents = torch.randn(6, N, D, generator=torch.manual_seed(0))
    batch = {"latents": latents, "labels": ids % 5, "sample_ids": ids, "step": 0, "num_tokens": K}
    found = []
    for given in (0.0, power):
        objective = LGMObjectiveConfig(mean_flow=MeanFlowConfig(adaptive=given))
        model = LGMTrainingModel(shuffled(merge_dit()), tree, stats, objective, 0)  # type: ignore[arg-type]
        output = model(batch)
        assert not isinstance(output, list)
        found.append((model.loss(output, batch), model.record.take()["loss"]))
        each = model._per_sample(output)
    torch.testing.assert_close(found[0][0], found[0][1])
    torch.testing.assert_close(found[1][1], found[0][1])
    torch.testing.assert_close(found[1][0], (each / (each + 1e-3) ** power).mean())


# --- networks -------------------------------------------------------------------------------------


def test_weights_of_a_velocity_give_the_same_bits_up_to_any_end(cut):
    old, new = shuffled(merge_dit(False)), merge_dit()
    missing = new.load_state_dict(old.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert {name.split(".")[0] for name in missing.missing_keys} == {"end_embed"}
    inputs = torch.randn(4, K, D), torch.rand(4), torch.arange(4), cut
    for end in ((), (inputs[1],), (torch.ones(4),)):
        assert torch.equal(new(*inputs, *end), old(*inputs))
    with pytest.raises(ConfigError, match="end: a network of the velocity"):
        old(*inputs, torch.ones(4))
    assert isinstance(new.end_embed, EndTimeEmbedding)
    shuffled(new)
    assert not torch.equal(new(*inputs, torch.ones(4)), new(*inputs))
    assert torch.equal(new(*inputs, inputs[1]), new(*inputs))


@pytest.mark.parametrize("recompute", [0.0, 1.0])
@pytest.mark.parametrize("half", [False, True])
def test_every_weight_has_a_gradient(tree, half, recompute):
    """Also under autocast, which keeps weights that were cast where there was no gradient."""
    objective = LGMObjectiveConfig(mean_flow=MeanFlowConfig(share=1.0))
    stats = LatentStats(torch.zeros(D), torch.ones(D))
    model = LGMTrainingModel(shuffled(merge_dit()), tree, stats, objective, 0)
    checkpoint_blocks(list(model.net.blocks), recompute)
    ids = torch.arange(8)
    batch = {"latents": torch.randn(8, N, D, generator=torch.manual_seed(0)), "labels": ids % 5,
             "sample_ids": ids, "step": 0, "num_tokens": K}  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model.loss(model(batch), batch)
    loss.backward()
    missing = [
        name for name, p in model.net.named_parameters() if p.grad is None or not p.grad.any()
    ]
    assert missing == []


@pytest.mark.parametrize("num_tokens", [4, 16])
def test_a_grid_learns_it_at_every_budget(num_tokens):
    split = dict(head_blocks=1, tail_blocks=1, group_size=2, position_rows=16)
    net = shuffled(ELIT(32, 3, 2, 3, 16, 4, 5, True, **split))
    objective = FlowObjectiveConfig(mean_flow=MeanFlowConfig(share=1.0))
    model, ids = ELITTrainingModel(net, None, objective, 0), torch.arange(4)
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    batch = {
        "images": images,
        "labels": ids,
        "sample_ids": ids,
        "step": 0,
        "num_tokens": num_tokens,
    }
    model.loss(model(batch), batch).backward()
    assert all(p.grad is not None and p.grad.any() for p in net.end_embed.parameters())


def test_operations_are_those_that_torch_counts(cut):
    """Of an evaluation to a percent; a training step is seven, and attention once more."""
    net = shuffled(merge_dit())
    z, t, labels, end = torch.randn(4, K, D), torch.rand(4), torch.arange(4), torch.ones(4)
    one = 4 * net.flops(K)
    assert one == pytest.approx(counted(lambda: net(z, t, labels, cut, end)), rel=0.01)
    assert net.flops(K) - merge_dit(False).flops(K) == 2 * (256 * 32 + 32 * 32)
    attention = 4 * 2 * 4 * K**2 * 32
    u = lambda z_t, t: net(z_t, t, labels, cut, end)  # noqa: E731
    assert counted(lambda: rate_along_flow(u, z, t, z)) == pytest.approx(
        2 * one + attention, rel=0.01
    )


# --- bundles --------------------------------------------------------------------------------------


def test_a_bundle_samples_in_two_evaluations(bundle, tmp_path):
    """And goes on from one of the velocity, whose numbers it has at first."""
    old = read_info(bundle)
    model = LGMModelConfig(
        size="tiny", latent_dim=4, num_base_tokens=16, num_classes=3, end_time=True
    )
    run = SimpleNamespace(
        task="generator", model=model, objective=LGMObjectiveConfig(),
        tokenizer=str(bundle.parent / "tokenizer"), lengths=SimpleNamespace(choices=(8,)),
    )  # fmt: skip
    start, net = LGMInitialWeights(run, str(bundle), old), build_merge_dit(model)  # type: ignore[arg-type]
    stats = LatentStats.load(bundle / "latent_stats.safetensors")
    names = SimpleNamespace(classes=test_pipeline.CLASSES)
    tree = MergeTree.load(bundle / "merge_tree.safetensors")
    start.load(net, SimpleNamespace(manifest=names, stats=stats, tree=tree))
    assert any(line.startswith("end times: the bundle's network") for line in start.stated())
    save_lgm_bundle(
        tmp_path / "dit",
        model,
        net.state_dict(),
        stats,
        test_pipeline.CLASSES,
        run.tokenizer,
        old["training"],
    )  # fmt: skip
    pipe = LGMPipeline.from_bundle(tmp_path / "dit", device="cpu")
    plain = LGMPipeline.from_bundle(bundle, device="cpu")
    config = pipe.config(8)
    assert (config.solver, config.num_steps, config.cfg_scale) == (Solver.MEAN_FLOW, 3, 1.0)
    # The velocity is the average velocity as long as nothing is learned: Euler's steps, unguided.
    same = plain([0, 2], 8, 1.0, num_steps=3, timestep_shift=0.5, progress_bar=False)
    assert (pipe([0, 2], 8, progress_bar=False) == same).all()
    assert pipe.image_flops(config, 8) == 2 * pipe.bundle.net.flops(8) + pipe.decoder_flops()
    with pytest.raises(ConfigError, match="sampler: solver euler knows no end of a step"):
        pipe.config(8, solver="euler")
    with pytest.raises(ConfigError, match="sampler: solver mean_flow needs a generator"):
        plain.config(8, solver="mean_flow", cfg_scale=1.0)
    back = SimpleNamespace(**{**vars(run), "model": replace(model, end_time=False)})
    lost = LGMInitialWeights(back, str(tmp_path / "dit"), read_info(tmp_path / "dit"))  # type: ignore[arg-type]
    assert "end_embed" in lost.misfits(build_merge_dit(back.model))[0]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.end_time=false"], "objective.mean_flow: needs a network .* set model.end_time"),
        (["objective.mean_flow=null"], "model.end_time: true, and nothing trains it"),
        (["objective.mean_flow.share=0"], "objective.mean_flow.share: 0.0 must be above 0"),
        (["objective.mean_flow.guidance=0.5"], "objective.mean_flow.guidance: 0.5 must be 1"),
        (["objective.mean_flow.adaptive=2"], "objective.mean_flow.adaptive: 2.0 must be in"),
        (["train.compile=true"], "train.compile: true is not for objective.mean_flow"),
        (
            ["parallel.strategy=deepspeed", "parallel.deepspeed.stage=3"],
            "parallel.deepspeed.stage: 3 gathers weights by hooks",
        ),
        (["lora.base=bundle"], "objective.mean_flow: trains a whole generator; remove it"),
    ],
)
def test_runs_that_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_training_run(RECIPE, overrides, 1, None)


def test_solvers_that_a_network_does_not_have():
    plain, average = ({"models": {"generator": {"end_time": end}}} for end in (False, True))
    euler, jump = SamplerConfig(), SamplerConfig(solver=Solver.MEAN_FLOW)
    assert not list(solver_problems(plain, [euler], "sampler"))
    assert not list(solver_problems({}, [euler], "sampler"))  # a bundle from before there was one
    assert not list(solver_problems(average, [jump], "sampler"))
    (line,) = solver_problems(average, [euler, euler], "cells")
    assert line.startswith("cells: solver euler knows no end of a step")
    (line,) = solver_problems(plain, [jump], "cells")
    assert line.startswith("cells: solver mean_flow needs a generator that was trained with")
    for more in ({"cfg_scale": 2.0}, {"uncond_num_tokens": 4}):
        with pytest.raises(ConfigError, match="solver: mean_flow has no weak branch"):
            SamplerConfig(solver=Solver.MEAN_FLOW, **more)
