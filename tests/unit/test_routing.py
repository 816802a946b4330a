"""Nested routing: the middle of a MergeDiT on a coarser cut; training, operations, sampling."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lgm_scale.config.loading import load_config
from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.sweep.config import Cell, SweepConfig, expand, with_lists
from lgm_scale.families.base import families
from lgm_scale.families.lgm.config import LGMRun, RoutingConfig
from lgm_scale.families.lgm.data import LatentStats
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.lgm.sampling import sample_latents
from lgm_scale.merging.nesting import Nesting, nested_cuts
from lgm_scale.merging.tree import MergeTree
from lgm_scale.planning.plan import networks
from lgm_scale.planning.simulation import simulate
from lgm_scale.randomness import Purpose
from lgm_scale.sampling.config import SamplerConfig, Solver
from lgm_scale.sampling.replay import ReplayedVelocity
from lgm_scale.training.length_schedule import LengthSchedule

RECIPE = str(Path(__file__).resolve().parents[2] / "yamls/quickstart/dit.yaml")
ROUTED = [
    "model.routing={first: 1, last: 1}",
    "lengths={choices: [64, 32, 64], middle: [16, 32, 64]}",
]
LABELS = torch.tensor([1, 4, 7])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tree() -> MergeTree:
    return MergeTree.from_embeddings(randn(64, 12))


@pytest.fixture(scope="module")
def net() -> MergeDiT:
    torch.manual_seed(0)
    net = MergeDiT(32, 4, 2, 8, 64, 10, RoutingConfig(first=1, last=1))
    for parameter in net.parameters():  # the zero start would hide everything
        nn.init.normal_(parameter, std=0.2)
    return net.requires_grad_(False)


def inputs(num_tokens: int) -> tuple[torch.Tensor, ...]:
    return randn(3, num_tokens, 8, seed=1), torch.tensor([0.1, 0.5, 0.9]), LABELS


def run_of(*overrides: str) -> LGMRun:
    return load_training_run(RECIPE, [*ROUTED, *overrides], 1, None)  # type: ignore[return-value]


# --- the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [16, 64])
def test_a_middle_with_all_tokens_is_the_network_without_routing_to_the_bit(net, tree, num_tokens):
    plain = MergeDiT(32, 4, 2, 8, 64, 10)
    plain.load_state_dict(net.state_dict())  # no weight more, none less
    cut, same = tree.assignment(num_tokens), nested_cuts(tree, num_tokens, num_tokens)
    expected = plain(*inputs(num_tokens), cut)
    assert torch.equal(net(*inputs(num_tokens), cut), expected)
    assert torch.equal(net(*inputs(num_tokens), cut, same), expected)
    with pytest.raises(ConfigError, match=r"built without model\.routing"):
        plain(*inputs(num_tokens), cut, nested_cuts(tree, num_tokens, 8))


@pytest.mark.parametrize(("num_tokens", "inner"), [(64, 16), (32, 8), (16, 4)])
def test_the_middle_runs_on_the_coarse_cut(net, tree, num_tokens, inner):
    """Against the same blocks called by hand, with duplicated tokens instead of a matrix back."""
    nesting = nested_cuts(tree, num_tokens, inner)
    fine, coarse = nesting.fine, nesting.coarse
    z_t, t, labels = inputs(num_tokens)
    condition = net.t_embed(t) + net.label_embed(labels)
    sizes = None if num_tokens == 64 else fine.sizes.float().log()
    x = net.x_embed(z_t) + fine.merge(net.pos_embed)
    x = net.blocks[0](x, condition, sizes)
    before = coarse.merge(fine.unmerge(x))  # by way of all N
    after = before
    for block in list(net.blocks)[1:3]:
        after = block(after, condition, coarse.sizes.float().log())
    x = x + (after - before)[:, nesting.parents]
    expected = net.final(net.blocks[3](x, condition, sizes), condition)
    found = net(z_t, t, labels, fine, nesting)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert (found - net(z_t, t, labels, fine)).abs().max() > 1e-2


@pytest.mark.parametrize(("num_tokens", "inner"), [(64, 16), (64, 64), (32, 8)])
def test_operations_are_those_of_torchs_counter(tree, num_tokens, inner):
    net = MergeDiT.from_size("tiny", 16, 64, 10, RoutingConfig(first=1, last=1))
    z_t, t = torch.randn(16, num_tokens, 16), torch.rand(16)
    nesting = nested_cuts(tree, num_tokens, inner)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        net(z_t, t, torch.zeros(16).long(), nesting.fine, nesting)
    table = 2 * 64 * num_tokens * 128 if num_tokens < 64 else 0  # positions, once per batch
    assert 16 * net.flops(num_tokens, inner) == counter.get_total_flops() - table


# --- training ---------------------------------------------------------------------------------


def test_every_step_has_its_own_pair_and_k_is_what_it_was(tree):
    run = run_of("lengths.weights=[1, 2, 1]")
    model = families()["generator"].training_model(run, _Data(tree))
    schedule = LengthSchedule([64, 32, 64], [1, 2, 1], run.seed)
    pairs = [(schedule.num_tokens(step), model.middle(step)) for step in range(200)]  # type: ignore[attr-defined]
    assert set(pairs) == {(64, 16), (32, 32), (64, 64)}
    for step, (k, _) in enumerate(pairs):  # the draw of before there were pairs
        rng = np.random.default_rng([run.seed, int(Purpose.LENGTH), step])
        assert k == (64, 32, 64)[rng.choice(3, p=[0.25, 0.5, 0.25])]

    asked: list[tuple[int, int]] = []
    model.net.register_forward_pre_hook(
        lambda _, args, named: asked.append(
            (args[3].num_tokens, named["middle"].coarse.num_tokens)
        ),
        with_kwargs=True,
    )
    batch = {"latents": randn(4, 64, 16), "labels": torch.arange(4), "sample_ids": torch.arange(4)}
    for step in range(4):
        keyed = batch | {"step": step, "num_tokens": schedule.num_tokens(step)}
        model.loss(model(keyed), keyed).backward()
        assert f"loss/middle={pairs[step][1]}" in model.record.take_groups()
    assert asked == pairs[:4]


class _Data:
    """What a training model reads of its data set."""

    def __init__(self, tree: MergeTree) -> None:
        self.tree, self.stats = tree, LatentStats(torch.zeros(16), torch.ones(16))


def test_operations_of_training_are_the_mean_over_the_pairs():
    run = run_of()
    network = networks(run).network
    assert isinstance(network, MergeDiT)
    assert network.flops(64) == round((network.flops(64, 16) + network.flops(64, 64)) / 2)
    assert network.flops(32) == network.flops(32, 32)
    assert network.block_lengths(64) == {16, 64}
    two = run_of("lengths={choices: [64, 64], middle: [16, 32]}")
    found = simulate(two, 1, 4, 64)  # at the largest K'
    assert found is not None
    expected = 3 * 4 * network.flops(64, 32)
    assert found.passes[0].work.flops == pytest.approx(expected, rel=0.1)  # padded heads


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["lengths.middle=[16, 64, 64]"],
            "lengths.middle: 64 beside K = 32; K' must be in [4, 32]",
        ),
        (["lengths.middle=[2, 32, 64]"], "2 beside K = 64; K' must be in [4, 64]"),
        (["lengths.middle=[16]"], "lengths.middle: 1 K' for 3 choices"),
        (["lengths.middle=null"], "lengths.middle: missing; model.routing needs one K' for each"),
        (["model.routing=null"], "lengths.middle: [16, 32, 64] is for nested routing; set"),
        (["model.routing.last=3"], "model.routing.first: 1 and last 3 leave no middle of the 4"),
        (["model.routing.first=-1"], "model.routing.first: -1 must be 0 or more"),
    ],
)
def test_what_makes_no_sense_is_told(overrides, problem):
    with pytest.raises(ConfigError) as error:
        run_of(*overrides)
    assert problem in str(error.value)


# --- sampling ---------------------------------------------------------------------------------


def rows_of(net: MergeDiT, tree: MergeTree, config: SamplerConfig) -> Counter[tuple[int, int]]:
    """Rows that the network really runs, by K and K'."""
    rows: Counter[tuple[int, int]] = Counter()

    def velocity(z_t, t, labels, assignment, middle: Nesting | None = None):
        inner = assignment.num_tokens if middle is None else middle.coarse.num_tokens
        rows[assignment.num_tokens, inner] += len(z_t)
        return net(z_t, t, labels, assignment, middle)

    z = sample_latents(velocity, tree, 0, torch.arange(3), LABELS, 10, 32, 8, config)
    assert z.isfinite().all()
    return rows


@pytest.mark.parametrize(
    "settings",
    [
        {"middle_tokens": 8},
        {"uncond_middle_tokens": 4},
        {"middle_tokens": 16, "uncond_middle_tokens": 4, "uncond_num_tokens": 8},
        {"middle_schedule": ((0.0, 4), (0.3, 32))},
        {"middle_tokens": 16, "solver": Solver.HEUN},
    ],
)
def test_branches_and_times_have_their_own_middle(net, tree, settings):
    config = SamplerConfig(num_steps=6, cfg_scale=3.0, timestep_shift=1.0, **settings)
    expected = config.routed_rows(32)
    assert rows_of(net, tree, config) == {pair: 3 * count for pair, count in expected.items()}
    assert sum(expected.values()) == config.num_forwards()
    assert any(inner < k for k, inner in expected)


def test_a_replayed_velocity_knows_its_middle(net, tree):
    """With a stand-in for a graph: each pair of cuts has its own, in later batches too."""
    made = []

    def record(call, inputs):
        made.append(inputs[0].shape[1])
        out = call(*inputs)
        return lambda: out.copy_(call(*inputs)), out

    replayed = ReplayedVelocity(net, record)
    for middle in (8, 16, 8):
        config = SamplerConfig(num_steps=3, middle_tokens=middle)
        images = [
            sample_latents(v, tree, 0, torch.arange(3), LABELS, 10, 32, 8, config)
            for v in (net, replayed)
        ]
        assert torch.equal(*images)
    assert made == [32, 32]


@torch.no_grad()
def test_a_weak_branch_with_all_tokens_is_plain_guidance(net, tree):
    """With its middle at K a branch is the plain one, whichever way it is asked for."""

    def latents(**settings):
        config = SamplerConfig(num_steps=5, cfg_scale=2.0, **settings)
        return sample_latents(net, tree, 0, torch.arange(3), LABELS, 10, 32, 8, config)

    plain = latents()
    assert torch.equal(latents(middle_tokens=32, uncond_middle_tokens=32), plain)
    assert (latents(uncond_middle_tokens=8) - plain).abs().max() > 1e-3


def test_cells_without_it_keep_their_names(net):
    plain = SamplerConfig(num_steps=6)
    assert not any("middle" in key for key in plain.settings())
    cells = [{"num_tokens": 32, "middle_tokens": [8, 16]}, {"num_tokens": 32}]
    cells.append({"num_tokens": 32, "middle_schedule": [[0.0, 8], [0.3, 32]]})
    values = {"bundle": "b", "out": "o", "cells": cells}
    found = expand(load_config(with_lists(values), SweepConfig))
    labels = [cell.label for cell in found]
    assert [label.split("points")[1] for label in labels] == [
        ", middle at 8", ", middle at 16", "", ", middle at 0:8 0.3:32",
    ]  # fmt: skip
    assert found[0].values()["middle_tokens"] == 8
    again = SamplerConfig(**found[3].sampler.settings())
    assert again == found[3].sampler
    assert Cell(32, again) == found[3]


def test_settings_that_a_generator_lacks_are_refused(net, tree):
    with pytest.raises(ConfigError, match="middle_tokens: 64 where the branch has 32 tokens"):
        rows_of(net, tree, SamplerConfig(middle_tokens=64))
    family = families()["generator"]
    model = {"num_blocks": 4, "routing": {"first": 1, "last": 1}}
    info = {"models": {"generator": model}}

    def problems(info, **settings):
        return " ".join(family.setting_problems(info, 32, SamplerConfig(**settings)))  # type: ignore[attr-defined]

    assert not problems(info, middle_tokens=8, uncond_middle_tokens=4)
    assert "middle_tokens: 64 where the branch has 32 tokens" in problems(info, middle_tokens=64)
    low = problems(info, middle_schedule=((0, 2),))
    assert "middle_schedule: 2 where" in low
    assert "run at 4 (blocks of the tree that never merge) to 32" in low
    weak = problems(info, uncond_num_tokens=8, uncond_middle_tokens=16)
    assert "uncond_middle_tokens: 16 where the branch has 8 tokens" in weak
    plain = {"models": {"generator": {}}}
    for other in (families()["spatial_generator"], family):
        found = other.setting_problems(plain, 32, SamplerConfig(middle_tokens=8))  # type: ignore[attr-defined]
        assert "this generator has no model.routing; leave the" in next(iter(found))
    for settings, text in (
        ({"middle_tokens": 0}, "middle_tokens: 0 must be 1 or more"),
        ({"middle_tokens": 8, "middle_schedule": ((0, 8),)}, "leave one of them out"),
        ({"middle_schedule": ((0.1, 8),)}, "must start at t = 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            replace(SamplerConfig(), **settings)
