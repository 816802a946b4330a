"""Contrastive flow matching: the loss, which sample is the other one, what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lgm_scale.config.rules import load_training_run
from lgm_scale.config.schema import FlowObjectiveConfig
from lgm_scale.errors import ConfigError
from lgm_scale.families.elit.network import SiT
from lgm_scale.families.elit.training import ELITTrainingModel
from lgm_scale.families.generator import GeneratorFamily
from lgm_scale.families.lgm.config import LGMObjectiveConfig
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.lgm.training import LGMTrainingModel
from lgm_scale.flow import NoiseScale, contrasted, flow_loss, unweighted_flow_loss
from lgm_scale.merging.tree import MergeTree
from lgm_scale.training.flow_model import FlowModel

YAMLS = Path(__file__).resolve().parents[2] / "yamls"
N, K, D = 16, 6, 3


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the loss -------------------------------------------------------------------------------------


def test_the_distance_to_the_sample_half_a_batch_away_is_taken_off():
    predicted, target = randn(5, 4, 2), randn(5, 4, 2, seed=1)
    error = partial(unweighted_flow_loss, predicted)
    expected = error(target) - 0.05 * error(target[[3, 4, 0, 1, 2]])
    torch.testing.assert_close(contrasted(error, target, 0.05), expected)
    assert torch.equal(contrasted(error, target, 0.0), error(target))


def test_one_that_is_alone_has_no_other():
    predicted, target = randn(1, 4), randn(1, 4, seed=1)
    error = partial(unweighted_flow_loss, predicted)
    assert torch.equal(contrasted(error, target, 0.05), error(target))


def test_it_is_least_beyond_the_target_and_away_from_the_other():
    target = randn(6, 4)
    best = ((target - 0.05 * target.roll(3, 0)) / 0.95).requires_grad_()
    loss = contrasted(partial(unweighted_flow_loss, best), target, 0.05).sum()
    (gradient,) = torch.autograd.grad(loss, best)
    torch.testing.assert_close(gradient, torch.zeros_like(target), atol=1e-6, rtol=0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_every_nth_sample_take_the_same_others(ranks):
    predicted, target = randn(8, 4), randn(8, 4, seed=1)

    def loss(share: slice) -> torch.Tensor:
        return contrasted(partial(unweighted_flow_loss, predicted[share]), target[share], 0.05)

    whole = loss(slice(None))
    for rank in range(ranks):
        share = slice(rank, None, ranks)
        torch.testing.assert_close(loss(share), whole[share])


# --- families -------------------------------------------------------------------------------------


def shuffled(net: torch.nn.Module) -> torch.nn.Module:
    """The network with weights of which none is zero."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.15 * randn(*parameter.shape, seed=parameter.numel()))
    return net


def lgm(weight: float, scale: str) -> LGMTrainingModel:
    tree = MergeTree.from_embeddings(randn(N, 8, seed=3), 2)
    objective = LGMObjectiveConfig(contrastive=weight, noise_scale=scale)  # type: ignore[arg-type]
    net, stats = shuffled(MergeDiT(32, 2, 2, D, N, 5)), LatentStats(torch.zeros(D), torch.ones(D))
    return LGMTrainingModel(net, tree, stats, objective, 0)  # type: ignore[arg-type]


def sit(weight: float, _: str) -> ELITTrainingModel:
    net = shuffled(SiT(32, 2, 2, 3, 16, 4, 5))
    return ELITTrainingModel(net, None, FlowObjectiveConfig(contrastive=weight), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["corrected", "legacy"])
@pytest.mark.parametrize("family", [lgm, sit])
def test_every_family_has_it_and_weighs_the_other_by_size_too(family, scale):
    ids, num_tokens = torch.arange(4), K if family is lgm else 16
    data = {"latents": randn(4, N, D), "images": (40 * randn(4, 3, 16, 16)).clamp(0, 255).byte()}
    batch = {**data, "labels": ids, "sample_ids": ids, "step": 0, "num_tokens": num_tokens}
    plain, model = family(0.0, scale), family(0.1, scale)
    with torch.no_grad():
        found, same = model(batch), plain(batch)
        if family is lgm:
            sizes = {"assignment": found.assignment, "scale": NoiseScale(scale)}
            error = partial(flow_loss, found.v_pred, **sizes)
            assert len(set(found.assignment.sizes.tolist())) > 1
        else:
            error = partial(unweighted_flow_loss, found.v_pred)
        assert torch.equal(found.v_pred, same.v_pred)
        loss, before = model.loss(found, batch), plain.loss(same, batch)
    assert torch.equal(before, error(found.v_target).mean())
    torch.testing.assert_close(loss, before - 0.1 * error(found.v_target[[2, 3, 0, 1]]).mean())


def test_a_loss_below_zero_is_explained_where_there_can_be_one():
    assert FlowModel.below_zero(lgm(0.0, "corrected")) == ""
    assert "objective.contrastive" in lgm(0.05, "corrected").below_zero()


# --- what is refused ------------------------------------------------------------------------------

FEW_STEPS, ELIT = "experiments/few_steps", "quickstart/elit.yaml"


@pytest.mark.parametrize(
    ("recipe", "overrides", "ranks", "message"),
    [
        (ELIT, ["objective.contrastive=1"], 1, "contrastive: 1.0 must be in \\[0, 1\\)"),
        (ELIT, ["objective.contrastive=-0.1"], 1, "contrastive: -0.1 must be in"),
        (f"{FEW_STEPS}/mean_flow.yaml", [], 1, "contrastive: 0.05 is for the velocity, and "),
        (ELIT, ["train.device_microbatch_size=1"], 1, "size: 1 is too small .* make it 2 or more"),
        (ELIT, ["train.global_batch_size=4"], 4, "size: 4 over 4 ranks is too small .* make it 8"),
        (
            f"{FEW_STEPS}/plain.yaml",
            ["train.device_microbatch_tokens=100"],
            1,
            "tokens: 100 holds too few samples of 64 tokens .* make it 128 or more",
        ),
    ],
)
def test_runs_that_are_refused(recipe, overrides, ranks, message):
    changes = ["objective.contrastive=0.05", *overrides]
    with pytest.raises(ConfigError, match=message):
        load_training_run(str(YAMLS / recipe), changes, ranks, None)
    with_others = [change for change in overrides if not change.startswith("objective")]
    load_training_run(str(YAMLS / recipe), with_others, ranks, None)  # the weight alone is at fault


def test_a_family_that_does_not_know_it_says_so():
    plain = load_training_run(str(YAMLS / ELIT), [], 1, None)
    asked = replace(plain, objective=FlowObjectiveConfig(contrastive=0.05), task="toy")
    foreign = SimpleNamespace(takes_mean_flow=False, takes_contrast=False)
    (line,) = GeneratorFamily.rules(foreign, asked)  # type: ignore[arg-type]
    assert line.startswith("objective.contrastive: 0.05 has no effect for task toy; set it to 0")
