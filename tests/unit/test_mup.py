"""muP: which layers' rates are divided by the width, and what steps then change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lgm_scale.build import build_optimizer, fan_in_growth
from lgm_scale.config.rules import load_training_run
from lgm_scale.config.schema import OptimizerConfig
from lgm_scale.errors import ConfigError
from lgm_scale.families.base import family_of
from lgm_scale.families.lgm.config import DIT_SIZES, DiTSize
from lgm_scale.merging.tree import MergeTree

YAMLS = Path(__file__).resolve().parents[2] / "yamls"
LGM, ELIT, SIT = "quickstart/dit.yaml", "quickstart/elit.yaml", "experiments/elastic/sit.yaml"


def load(recipe: str, *overrides: str):
    return load_training_run(str(YAMLS / recipe), list(overrides), 1, None)


# --- which layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [LGM, ELIT, SIT])
def test_layers_whose_input_is_as_wide_as_the_network_grow_with_it(recipe):
    run = load(recipe, "model.size=s", "optimizer.mup_base=tiny")
    with torch.device("meta"):
        net = family_of(run).network(run)
    growth = fan_in_growth(run, net)
    by_name = {name: growth[p] for name, p in net.named_parameters() if p in growth}
    times = net.blocks[0].attn.qkv.in_features / 128  # the width of tiny
    assert times >= 3
    assert by_name.pop("t_embed.mlp.0.weight") == 1  # of 256 frequencies, whatever the width
    by_name.pop("x_embed.weight", None)  # of a token's numbers; a convolution, in a grid's network
    assert set(by_name.values()) <= {times, 1365 / 341}  # SwiGLU's hidden width is rounded
    assert {"final.linear.weight", "t_embed.mlp.2.weight"} <= set(by_name)
    blocks = len(net.blocks)  # of another depth than that of tiny
    for layer in ("attn.qkv", "attn.proj", "modulation.1"):
        assert all(by_name[f"blocks.{i}.{layer}.weight"] == times for i in range(blocks))
    tables = [name for name, p in net.named_parameters() if p not in growth and p.ndim > 1]
    assert not any("mlp" in name or "attn" in name for name in tables), tables


def test_rates_are_divided_by_the_growth_and_nothing_else_changes():
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 8))
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1)
    plain = build_optimizer(config, {"generator": [net]}).param_groups
    assert [(group["lr"], len(group["params"])) for group in plain] == [(1e-2, 2), (1e-2, 2)]
    growth = {net[0].weight: 1.0, net[1].weight: 4.0}
    groups = build_optimizer(config, {"generator": [net]}, growth).param_groups
    assert [group["lr"] for group in groups] == [1e-2, 2.5e-3, 1e-2]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert groups[1]["params"] == [net[1].weight]


# --- coordinate check -----------------------------------------------------------------------------


def change_of_blocks(run, steps: int = 3) -> float:
    """How far steps move the last block's output on one batch, root mean square."""
    torch.manual_seed(0)
    net = family_of(run).network(run)
    optimizer = build_optimizer(run.optimizer, {"generator": [net]}, fan_in_growth(run, net))
    tree = MergeTree.from_embeddings(torch.randn(16, 8, generator=torch.manual_seed(3)), 2)
    cut, gen = tree.assignment(8), torch.Generator().manual_seed(1)
    z, t = torch.randn(16, 8, 8, generator=gen), torch.rand(16, generator=gen)
    labels, target = torch.arange(16) % 10, torch.randn(16, 8, 8, generator=gen)
    seen = []
    net.blocks[-1].register_forward_hook(lambda _m, _i, output: seen.append(output.detach()))
    for _ in range(steps):
        loss = (net(z, t, labels, cut) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net(z, t, labels, cut)
    return (seen[-1] - seen[0]).square().mean().sqrt().item()


def test_steps_change_as_much_at_every_width(monkeypatch):
    """muP's own test: without it the change grows with the width."""
    monkeypatch.setitem(DIT_SIZES, "tiny", DiTSize(32, 2, 1, 0.1))
    monkeypatch.setitem(DIT_SIZES, "s", DiTSize(256, 2, 8, 3.0))
    keys = ["optimizer.lr=4e-3", "model.num_base_tokens=16", "model.latent_dim=8"]
    narrow, wide, scaled = (
        change_of_blocks(load(LGM, *keys, "lengths.choices=[16,8]", *more))
        for more in (
            ("model.size=tiny",),
            ("model.size=s",),
            ("model.size=s", "optimizer.mup_base=tiny"),
        )
    )
    assert wide > 2 * narrow
    assert 0.5 * narrow < scaled < 1.5 * narrow


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (LGM, ["optimizer.mup_base=small"], "mup_base: small is no size of a generator; it has ti"),
        (
            "quickstart/tokenizer.yaml",
            ["optimizer.mup_base=tiny"],
            "tiny is no size of a generator",
        ),
        (LGM, ["optimizer.mup_base=tiny", "lora.base=x", "lengths.choices=[8]"], "an adapter"),
        (
            "elit_xl.yaml",
            ["optimizer.mup_base=tiny", "model.interface.split=paper"],
            "mup_base: tiny cannot be compared with; .*paper knows no size tiny",
        ),
    ],
)
def test_runs_that_are_refused(recipe, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(recipe, *overrides)
