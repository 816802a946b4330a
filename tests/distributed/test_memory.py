"""Bytes per rank: what the dry run plans, what lies in memory, and how it shrinks with ranks."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rank_processes import run_ranks
from test_strategies import FSDP, ZERO

from lgm_scale.config.rules import load_training_run
from lgm_scale.families.lgm.config import DIT_SIZES, DiTSize
from lgm_scale.families.lgm.network import build_merge_dit
from lgm_scale.parallel.memory import measured_bytes, parameter_infos, planned_bytes
from lgm_scale.training.guard import FiniteGuard

CASES = {
    "ddp": [],
    "fsdp": FSDP,
    "zero1": ZERO[1],
    "zero2": ZERO[2],
    "zero3": ZERO[3],
}
# What each strategy shards; FSDP shards everything.
SHARDED = {
    "ddp": (),
    "fsdp": ("weights", "gradients", "optimizer", "ema"),
    "zero1": ("optimizer", "ema"),
    "zero2": ("gradients", "optimizer", "ema"),
    "zero3": ("gradients", "optimizer", "ema"),
}


WIDE = {"tiny": DiTSize(192, 16, 4, 7.0)}
"""So many blocks that what no rank can halve, and a block that is kept whole, weigh little."""


def measure_in_training() -> None:
    """Let a callback measure in its step 1, between backward pass and step."""
    DIT_SIZES.update(WIDE)
    check = FiniteGuard.after_train_batch

    def after_train_batch(self, state, logger) -> None:
        check(self, state, logger)
        if state.timestamp.batch.value != 1:
            return
        (saver,) = (c for c in state.callbacks if type(c).__name__ == "StateSaver")
        run = saver.checkpointer
        gradients = ()
        if hasattr(state.model, "engine"):
            from lgm_scale.parallel.deepspeed_internals import live_gradients

            gradients = live_gradients(state.model.engine)
        found = measured_bytes(run.model, run.shards, run.ema.average, gradients)
        path = Path(saver.companions["metrics.jsonl"]).parent / f"rank-{os.environ['RANK']}.json"
        path.write_text(json.dumps(asdict(found)))

    FiniteGuard.after_train_batch = after_train_batch  # type: ignore[method-assign]


def config(pipeline, out: Path) -> Path:
    return pipeline.generator_config(
        out,
        train={"max_duration": "2ba", "global_batch_size": 4, "precision": "fp32"},
        model={"size": "tiny", "latent_dim": 8, "num_base_tokens": 16, "num_classes": 17},
        checkpoint={"interval": "100ba"},
    )


@pytest.fixture(scope="module")
def measured(small_pipeline):
    """(strategy, ranks) -> bytes on each rank."""
    folder, found = small_pipeline.root / "memory", {}
    folder.mkdir()
    for ranks in (1, 2):
        cases = {name: keys for name, keys in CASES.items() if ranks == 2 or name == "ddp"}
        outs = {name: folder / f"{name}-{ranks}" for name in cases}
        jobs = [(config(small_pipeline, outs[name]), keys) for name, keys in cases.items()]
        run_ranks(ranks, jobs, folder / f"log-{ranks}", prepare=measure_in_training)
        for name, out in outs.items():
            found[name, ranks] = [
                json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(ranks)
            ]
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_lies_in_memory(small_pipeline, measured, name, monkeypatch):
    monkeypatch.setitem(DIT_SIZES, "tiny", WIDE["tiny"])
    path = config(small_pipeline, small_pipeline.root / "memory" / "plan")
    run = load_training_run(str(path), CASES[name], 2, has_gpu=False)
    with torch.device("meta"):
        infos = parameter_infos(build_merge_dit(run.model), averaged=True)
    planned = asdict(planned_bytes(infos, run.parallel, 2))
    for rank in measured[name, 2]:
        for part in ("weights", "gradients", "optimizer", "ema"):
            assert rank[part] == pytest.approx(planned[part], rel=0.1), part


@pytest.mark.parametrize("name", CASES)
def test_what_is_sharded_halves(measured, name):
    (alone,) = measured["ddp", 1]
    for rank in measured[name, 2]:
        for part in ("gradients", "optimizer", "ema"):
            share = 0.5 if part in SHARDED[name] else 1.0
            assert rank[part] == pytest.approx(share * alone[part], rel=0.05), part
    if "weights" in SHARDED[name]:
        assert measured[name, 2][0]["weights"] == pytest.approx(alone["weights"] / 2, rel=0.05)
