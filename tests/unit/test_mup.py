"""muP: which layers' rates and initial weights the width divides, and what steps then change."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lgm_scale.build import build_optimizer, fan_in_growth, start_as_base
from lgm_scale.config.rules import load_training_run
from lgm_scale.config.schema import OptimizerConfig
from lgm_scale.errors import ConfigError
from lgm_scale.families.base import family_of
from lgm_scale.families.elit.config import SIT_SIZES, SPLITS, SiTSize
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


# --- initial weights ------------------------------------------------------------------------------


def fresh(run) -> tuple[Any, dict[str, torch.Tensor]]:
    """The network as a run starts it from nothing."""
    torch.manual_seed(run.seed)
    net = family_of(run).network(run)
    drawn = {name: value.clone() for name, value in net.state_dict().items()}
    start_as_base(run, net)
    return net, drawn


def sized(monkeypatch, width: int, base: int = 64):
    """Let size s be this wide and tiny the base, with heads of 32 channels and few blocks."""
    for name, own in (("tiny", base), ("s", width)):
        monkeypatch.setitem(DIT_SIZES, name, DiTSize(own, 2, own // 32, 0.1))
        monkeypatch.setitem(SIT_SIZES, name, SiTSize(own, 3, own // 32, 0.1, 0.1))
        monkeypatch.setitem(SPLITS["declared"], name, (1, 1, 1))


@pytest.mark.parametrize("recipe", [LGM, ELIT, SIT])
def test_weights_start_with_the_deviation_of_the_base_over_the_root_of_the_growth(
    recipe, monkeypatch
):
    sized(monkeypatch, 256)
    run = load(recipe, "model.size=s", "model.num_classes=999", "optimizer.mup_base=tiny")
    net, drawn = fresh(run)
    growth = fan_in_growth(run, net)
    small = load(recipe, "model.size=tiny", "model.num_classes=999")
    base = fresh(small)[0].state_dict()
    scaled = set()
    for name, parameter in net.named_parameters():
        there, here = base[name].std().item(), parameter.std().item()
        if parameter.ndim > 1:
            assert here * growth.get(parameter, 1.0) ** 0.5 == pytest.approx(there, rel=0.04), name
        if not parameter.equal(drawn[name]):
            scaled.add(name)
    assert {"x_embed.weight", "t_embed.mlp.2.weight"} <= scaled
    assert not any("bias" in name or "table" in name or "norm" in name for name in scaled)


@pytest.mark.parametrize("recipe", [LGM, ELIT, SIT])
def test_the_size_of_the_base_and_runs_without_one_start_as_drawn(recipe):
    for base in ("tiny", "null"):
        net, drawn = fresh(load(recipe, f"optimizer.mup_base={base}"))
        assert all(value.equal(drawn[name]) for name, value in net.state_dict().items())


# --- coordinate check -----------------------------------------------------------------------------


def change_of_blocks(run, steps: int = 3) -> float:
    """How far steps move the last block's output on one batch, root mean square."""
    net, _ = fresh(run)
    optimizer = build_optimizer(run.optimizer, {"generator": [net]}, fan_in_growth(run, net))
    gen = torch.Generator().manual_seed(1)
    t, labels = torch.rand(16, generator=gen), torch.arange(16) % 10
    shape, cut = (16, 3, 16, 16), 16
    if run.task == "generator":
        tree = MergeTree.from_embeddings(torch.randn(16, 8, generator=torch.manual_seed(3)), 2)
        shape, cut = (16, 8, 8), tree.assignment(8)
    z, target = torch.randn(shape, generator=gen), torch.randn(shape, generator=gen)
    seen = []
    net.blocks[-1].register_forward_hook(lambda _m, _i, output: seen.append(output.detach()))
    for _ in range(steps):
        loss = (net(z, t, labels, cut) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net(z, t, labels, cut)
    return (seen[-1] - seen[0]).square().mean().sqrt().item()


def changes(monkeypatch, recipe: str, widths: Iterable[int], *keys: str) -> list[float]:
    """`change_of_blocks` of networks of these widths."""
    merged = ("model.num_base_tokens=16", "model.latent_dim=8", "lengths.choices=[16,8]")
    grid = ("space.image_size=16", "lengths.choices=[16]")
    few = (*(merged if recipe == LGM else grid), "optimizer.lr=4e-3", "optimizer.min_lr=0")
    found = []
    for width in widths:
        sized(monkeypatch, width)
        found.append(change_of_blocks(load(recipe, "model.size=s", *few, *keys)))
    return found


def test_steps_change_as_much_at_every_width(monkeypatch):
    """muP's own test: without it the change grows with the width."""
    narrow, wide = changes(monkeypatch, LGM, (64, 256), "optimizer.mup_base=tiny")
    assert wide == pytest.approx(narrow, rel=0.15)
    assert changes(monkeypatch, LGM, (256,))[0] > 4 * narrow


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [LGM, ELIT, SIT])
def test_steps_change_as_much_at_every_width_of_every_family(monkeypatch, recipe):
    widths = (64, 128, 256, 512)
    narrow, *wider = changes(monkeypatch, recipe, widths, "optimizer.mup_base=tiny")
    assert wider == pytest.approx([narrow] * 3, rel=0.15)
    assert changes(monkeypatch, recipe, (512,))[0] > 10 * narrow


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
