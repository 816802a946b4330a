"""8-bit floats: what is refused, which layers take them, and what torchao makes of a network."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lgm_scale.config import rules
from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import ConfigError
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.parallel import float8
from lgm_scale.parallel.float8 import float8_problem, takes_float8, use_float8

RECIPE = Path(__file__).resolve().parents[2] / "yamls" / "dit_xl.yaml"


@pytest.mark.parametrize(
    ("overrides", "installed", "has_gpu", "text"),
    [
        ((), False, None, "torchao is not installed; pip install torchao"),
        ((), True, False, "no GPU is here"),
        (("train.compile=false",), True, None, "the blocks are not compiled"),
        (("train.precision=fp32",), True, None, "fp32 rounds nothing"),
        (("parallel.strategy=fsdp",), True, None, "fsdp was not tried with it; use ddp"),
        ((), True, True, None),
    ],
)
def test_what_cannot_be_is_told_before_a_start(monkeypatch, overrides, installed, has_gpu, text):
    monkeypatch.setattr(rules, "find_spec", lambda name: installed or None)
    words = ["train.float8=true", *overrides]
    if text is None:
        assert load_training_run(str(RECIPE), words, 8, has_gpu).train.float8
        return
    with pytest.raises(ConfigError, match=f"train.float8: true, but .*{text}"):
        load_training_run(str(RECIPE), words, 8, has_gpu)


def test_a_device_without_them_is_told(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    assert float8_problem(cpu) == "torchao is not installed; pip install torchao"
    monkeypatch.setattr(float8, "find_spec", lambda name: True)
    assert "cpu does not compute them" in (float8_problem(cpu) or "")


@pytest.mark.parametrize(("size", "per_block"), [("b", 4), ("xl", 4), ("l", 2), ("h", 2)])
def test_layers_of_fitting_sizes_take_them(size, per_block):
    with torch.device("meta"):
        net = MergeDiT.from_size(size, 32, 256, 1000)
    names = [name for name, module in net.named_modules() if takes_float8(module, name)]
    assert len(names) == per_block * len(net.blocks)
    assert {name.split(".")[-1] for name in names} <= {"qkv", "proj", "w12", "w3"}


def test_parameters_stay_and_products_are_near():
    pytest.importorskip("torchao", reason="the only part that needs torchao")
    torch.manual_seed(0)
    exact = nn.Sequential()
    exact.add_module("qkv", nn.Linear(64, 128))
    exact.add_module("other", nn.Linear(128, 64))
    rough = copy.deepcopy(exact)
    use_float8([rough], emulate=True)
    kinds = [type(module) is nn.Linear for module in rough]
    assert kinds == [False, True]
    for (name, mine), (other, theirs) in zip(
        rough.named_parameters(), exact.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, theirs)
    x = torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        near, right = rough(x).float(), exact(x).float()
    assert 0 < ((near - right).norm() / right.norm()).item() < 0.1
