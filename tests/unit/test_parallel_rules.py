"""Bad `parallel:` sections: one clear line each, before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import ConfigError

DIT_B = Path(__file__).resolve().parents[2] / "yamls" / "dit_b.yaml"

FSDP = "parallel.strategy=fsdp"
ZERO = "parallel.strategy=deepspeed"


def problems(*overrides: str, world_size: int = 8, has_gpu: bool | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_training_run(str(DIT_B), list(overrides), world_size, has_gpu)
    return caught.value.problems


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["parallel.strategy=zero"], ["parallel.strategy:", "'ddp', 'fsdp' or 'deepspeed'"]),
        (
            [FSDP, "parallel.fsdp.shard=full", "parallel.deepspeed.stage=2"],
            ["one strategy at a time", "keep the section of parallel.strategy (fsdp)"],
        ),
        (["parallel.fsdp.shard=full"], ["parallel.fsdp: has no effect", "strategy: ddp"]),
        ([FSDP, "parallel.deepspeed.stage=2"], ["parallel.deepspeed: has no effect"]),
        ([FSDP, "parallel.fsdp.stage=2"], ["parallel.fsdp.stage: unknown key"]),
        ([FSDP, "parallel.fsdp.shrad=full"], ["did you mean 'shard'?"]),
        ([FSDP, "parallel.fsdp.version=1"], ["parallel.fsdp.version: "]),
        (
            [FSDP, "parallel.fsdp.shard=hybrid", "parallel.fsdp.group_size=16"],
            ["group_size: 16 of 8 ranks", "valid: 2, 4, 8"],
        ),
        (
            [FSDP, "parallel.fsdp.shard=hybrid", "parallel.fsdp.group_size=3"],
            ["group_size: 3 of 8 ranks", "valid: 2, 4, 8"],
        ),
        (
            [FSDP, "parallel.fsdp.shard=hybrid", "parallel.fsdp.group_size=1"],
            ["1 would be strategy: ddp"],
        ),
        ([FSDP, "parallel.fsdp.group_size=2"], ["no effect with shard: full"]),
        ([ZERO, "parallel.deepspeed.stage=4"], ["parallel.deepspeed.stage: 4 is wrong"]),
        ([ZERO, "parallel.deepspeed.offload=all"], ["offload: all needs stage: 3"]),
        (["parallel.activation_checkpointing=1.5"], ["must be in [0, 1]"]),
        (["parallel.timeout_seconds=0"], ["parallel.timeout_seconds: 0 must be 1 or more"]),
        (["ema.interval=0"], ["ema.interval: 0 must be 1 or more"]),
    ],
)
def test_what_is_wrong_is_named_with_its_fix(overrides, told):
    (problem,) = problems(*overrides)
    for text in told:
        assert text in problem


def test_a_batch_that_ranks_cannot_share_names_its_neighbours():
    (problem,) = problems("train.global_batch_size=1024", world_size=48)
    assert "nearest valid: 1008 or 1056" in problem


def test_hybrid_sharding_needs_a_gpu():
    (problem,) = problems(FSDP, "parallel.fsdp.shard=hybrid", "train.precision=fp32", has_gpu=False)
    assert "parallel.fsdp.shard: hybrid needs a GPU" in problem
    assert "use shard: full here" in problem


def test_deepspeed_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    (problem,) = problems(ZERO)
    assert "it is not installed" in problem
    assert "lgm-scale[deepspeed]" in problem
