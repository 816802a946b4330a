"""Compiled blocks: the numbers of uncompiled ones, under each strategy."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path

import pytest
import torch
from rank_processes import run_ranks
from small_pipeline import SmallPipeline, metrics
from test_strategies import FSDP, ZERO
from torch import nn
from torch._inductor import config as inductor

STRATEGIES = {"ddp": [], "fsdp": FSDP}
if torch.__version__.startswith("2.7."):  # refused with a newer one (parallel.rules)
    STRATEGIES["zero2"] = ZERO[2]
COMPILED = ["train.compile=true"]
RECOMPUTED = [*COMPILED, "parallel.activation_checkpointing=0.5"]


def without_vectors() -> None:
    """Generate plain loops: they compile faster, and nothing is tried out first."""
    inductor.cpp.vec_isa_ok = False


def without_kernels() -> None:
    """Trace and differentiate every graph, and run it as it is: no strategy meets the kernels."""
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[assignment]


def config(pipeline: SmallPipeline, out: Path, *lengths: int) -> Path:
    return pipeline.generator_config(
        out,
        lengths={"choices": list(lengths)},
        train={"max_duration": "4ba", "global_batch_size": 4, "precision": "fp32"},
    )


def assert_same_losses(out: Path, plain: Path) -> None:
    found, expected = ([row["loss"] for row in metrics(run)] for run in (out, plain))
    assert len(expected) == 4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_compiled_blocks_change_no_loss(small_pipeline, tmp_path):
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    jobs = [(config(small_pipeline, plain, 8), []), (config(small_pipeline, compiled, 8), COMPILED)]
    run_ranks(1, jobs, tmp_path / "log", prepare=without_vectors)
    assert_same_losses(compiled, plain)


@pytest.mark.slow
def test_compiled_blocks_change_no_loss_under_a_strategy(small_pipeline, tmp_path):
    keys = {"plain": []} | {name: [*keys, *RECOMPUTED] for name, keys in STRATEGIES.items()}
    jobs = [(config(small_pipeline, tmp_path / name, 8, 4), keys[name]) for name in keys]
    run_ranks(2, jobs, tmp_path / "log", prepare=without_kernels)
    for name in STRATEGIES:
        assert_same_losses(tmp_path / name, tmp_path / "plain")
    assert "recompile_limit" not in (tmp_path / "log-0.txt").read_text()
