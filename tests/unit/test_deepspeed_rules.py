"""What a configuration may not ask of DeepSpeed."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest

from lgm_scale.config.rules import broken_rules
from lgm_scale.config.schema import (
    DeepSpeedConfig,
    LengthsConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from lgm_scale.data.config import DataConfig
from lgm_scale.families.base import family_of
from lgm_scale.families.lgm.config import LGMModelConfig, LGMRun
from lgm_scale.families.tokenizer.config import (
    TokenizerModelConfig,
    TokenizerObjectiveConfig,
    TokenizerRun,
)
from lgm_scale.parallel import rules
from lgm_scale.parallel.rules import parallel_rules

COMMON = {
    "run_name": "run",
    "out": "runs/run",
    "data": DataConfig(path="data"),
    "lengths": LengthsConfig(choices=(8,)),
    "train": TrainConfig(max_duration="1ep", global_batch_size=8),
}
GENERATOR = LGMRun(**COMMON, task="generator", tokenizer="bundle", model=LGMModelConfig())
TOKENIZER = TokenizerRun(**COMMON, task="tokenizer", model=TokenizerModelConfig())


@pytest.fixture(autouse=True)
def installed(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def problems(config, **deepspeed) -> list[str]:
    section = DeepSpeedConfig(**deepspeed) if deepspeed else None
    parallel = ParallelConfig(strategy="deepspeed", deepspeed=section)
    config = dataclasses.replace(config, parallel=parallel)
    return [*parallel_rules(config, 2, None), *family_of(config).rules(config)]


@pytest.mark.parametrize("config", [GENERATOR, TOKENIZER], ids=["generator", "tokenizer"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_is_allowed(config, stage):
    assert problems(config, stage=stage) == []
    assert problems(config) == []


def test_it_must_be_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = problems(GENERATOR)
    assert problem.startswith("parallel.strategy: deepspeed, but it is not installed")


def test_compiled_blocks_need_whole_weights(monkeypatch):
    monkeypatch.setattr(rules, "version", lambda _: "2.7.0+cpu")
    compiled = dataclasses.replace(
        GENERATOR, train=dataclasses.replace(GENERATOR.train, compile=True)
    )
    assert problems(compiled, stage=1) == problems(compiled, stage=2) == problems(compiled) == []
    (problem,) = problems(compiled, stage=3)
    assert problem.startswith("train.compile: true has no use with parallel.deepspeed.stage: 3")
    monkeypatch.setattr(rules, "version", lambda _: "2.11.0")
    (problem,) = problems(compiled, stage=2)
    assert "gave wrong losses under parallel.strategy: deepspeed" in problem
    assert "torch 2.11.0 is here; set it to false, use parallel.strategy: fsdp" in problem


def clipping_problems(config, strategy="deepspeed") -> list[str]:
    config = dataclasses.replace(config, parallel=ParallelConfig(strategy=strategy))
    return [line for line in broken_rules(config, 2, None) if "clip_norm" in line]


def test_two_groups_cannot_be_clipped_apart():
    clipped = dataclasses.replace(TOKENIZER, optimizer=OptimizerConfig(clip_norm=1.0))
    assert clipping_problems(clipped) == []  # one group
    game = dataclasses.replace(clipped, objective=TokenizerObjectiveConfig(adversarial=0.4))
    (problem,) = clipping_problems(game)
    assert problem.startswith("optimizer.clip_norm: 1.0 is for each player's gradient on its own")
    assert clipping_problems(game, "fsdp") == []
    free = dataclasses.replace(game, optimizer=OptimizerConfig())
    assert clipping_problems(free) == []


def test_offloaded_weights_and_buckets():
    assert problems(GENERATOR, stage=3, offload="all") == []
    (problem,) = problems(GENERATOR, stage=2, offload="all")
    assert problem.startswith("parallel.deepspeed.offload: all needs stage: 3, not 2")
    (problem,) = problems(GENERATOR, bucket_mib=0)
    assert problem.startswith("parallel.deepspeed.bucket_mib: 0 must be 1 or more")
