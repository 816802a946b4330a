"""Runs of generators on a grid: what their recipes are, and what is told before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import ConfigError
from lgm_scale.families.elit.config import SIT_SIZES, ELITRun, token_lengths
from lgm_scale.families.elit.network import ELIT, build_elit

YAMLS = Path(__file__).resolve().parents[2] / "yamls"
QUICKSTART = str(YAMLS / "quickstart/elit.yaml")
RECIPES = sorted([*YAMLS.glob("elit_*.yaml"), *YAMLS.glob("sit_*.yaml"), Path(QUICKSTART)])


def load(path: str | Path, *overrides: str) -> ELITRun:
    config = load_training_run(str(path), list(overrides), 8, has_gpu=None)
    assert isinstance(config, ELITRun)
    return config


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_training_run(QUICKSTART, list(overrides), 1, has_gpu=None)
    return caught.value.problems


def test_there_is_a_recipe_of_every_kind():
    names = {path.stem for path in RECIPES}
    assert names >= {"sit_b", "sit_xl", "elit"}
    for name in ("elit_b", "elit_l", "elit_xl", "elit_xl_512"):
        assert {name, f"{name}_multi"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_build_the_network_that_their_rules_describe(path):
    config = load(path)
    with torch.device("meta"):
        net = build_elit(config.model, config.space)
    assert net.token_lengths == token_lengths(config.model, config.space)
    count = sum(parameter.numel() for parameter in net.parameters()) + net.pos_embed.numel()
    row = SIT_SIZES[config.model.size]
    if config.space.image_size == 256:
        published = row.elit_params_m if isinstance(net, ELIT) else row.params_m
        assert round(count / 1e6, 2) == published


@pytest.mark.parametrize(("size", "lowest", "count"), [("xl", 16, 16), ("xl_512", 64, 61)])
def test_multi_budget_recipes_draw_the_published_levels_evenly(size, lowest, count):
    config = load(YAMLS / f"elit_{size}_multi.yaml")
    choices, weights = config.lengths.choices, config.lengths.weights
    assert len(choices) == count
    assert min(choices) == lowest
    assert max(choices) == max(token_lengths(config.model, config.space))
    assert weights is not None
    assert set(weights) == {1}


def test_sit_and_elit_are_trained_with_the_same_times():
    sit, elit = load(YAMLS / "sit_xl.yaml"), load(YAMLS / "elit_xl.yaml")
    assert sit.objective == elit.objective
    assert (sit.optimizer, sit.train, sit.ema) == (elit.optimizer, elit.train, elit.ema)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["model.interface.group_size=3"],
            "windows of 3 x 3 tokens do not divide the grid of 8 x 8",
        ),
        (["model.interface.group_size=0"], "windows of 0 x 0"),
        (["lengths.choices=[64,20,128,0]"], "lengths.choices: [0, 20, 128] are no budgets; K is k"),
        (["lengths.choices=[-16,16,32,48]"], "[-16] are no budgets"),
        (["model.interface=null"], "[16, 32, 48]; without an interface the network runs at 64"),
        (["model.interface.position_rows=63"], "63 rows for 64 latents"),
        (["model.interface.split=paper"], "paper knows no size tiny; it has b, xl"),
        (["model.patch_size=5"], "model.patch_size: 5 does not divide the state's side 32"),
        (["model.patch_size=0"], "model.patch_size: 0 does not divide"),
        (["space.kind=sd_vae", "space.image_size=100"], "100 is not divisible by 8"),
        (["space.kind=sd_vae", "space.image_size=256"], "space.vae: missing; name the folder"),
        (["space.vae=somewhere"], "space.vae: has no effect with space.kind: pixels"),
        (["space.image_size=0"], "space.image_size: 0"),
        (["model.num_classes=0"], "model.num_classes: 0 must be 1 or more"),
        (["objective.label_dropout=1.0"], "objective.label_dropout: 1.0 must be in [0, 1)"),
        (["objective.noise_scale=legacy"], "objective.noise_scale: unknown key"),
        (["train.batch_scaling=constant_tokens"], "see all tokens at every length"),
        (["lengths.per_sample=true"], "lengths.per_sample: true needs"),
        (["lora.rank=4"], "lora: unknown key"),
    ],
)
def test_bad_input_is_told_with_key_value_and_rule(overrides, text):
    assert any(text in problem for problem in problems(*overrides)), problems(*overrides)


def test_every_problem_comes_at_once():
    found = problems("model.interface.group_size=3", "space.vae=x", "optimizer.warmup=-1")
    assert {problem.split(":")[0] for problem in found} == {
        "model.interface.group_size", "space.vae", "optimizer.warmup",
    }  # fmt: skip
