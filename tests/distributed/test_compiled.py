"""Compiled blocks under each strategy: the numbers of uncompiled ones."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from rank_processes import run_ranks
from small_pipeline import metrics
from test_strategies import FSDP, ZERO
from torch import nn
from torch._inductor import config as inductor

SHARDED = {"fsdp": FSDP}
if torch.__version__.startswith("2.7."):  # refused with a newer one (parallel.rules)
    SHARDED["zero2"] = ZERO[2]
COMPILED = ["train.compile=true", "parallel.activation_checkpointing=0.5"]


def without_vectors() -> None:
    """Generate plain loops: they compile faster, and nothing is tried out first."""
    inductor.cpp.vec_isa_ok = False


def without_kernels() -> None:
    """Trace and differentiate every graph, and run it as it is: no strategy meets the kernels."""
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[assignment]


@pytest.mark.slow
def test_compiled_blocks_change_no_loss(small_pipeline):
    folder = small_pipeline.root / "compiled"
    folder.mkdir()
    jobs = {}
    for name, keys in {"plain": [], "ddp": COMPILED, **SHARDED}.items():
        path = small_pipeline.generator_config(
            folder / name,
            lengths={"choices": [8, 4]},
            train={"max_duration": "4ba", "global_batch_size": 4, "precision": "fp32"},
        )
        keys = [*keys, *(COMPILED if name in SHARDED else []), "model.num_blocks=2"]
        jobs[name] = (path, keys)
    compiled = [jobs[name] for name in ("plain", "ddp")]
    run_ranks(2, compiled, folder / "log", timeout=900, prepare=without_vectors)
    traced = [jobs[name] for name in SHARDED]
    run_ranks(2, traced, folder / "traced-log", timeout=900, prepare=without_kernels)
    losses = {name: [row["loss"] for row in metrics(folder / name)] for name in jobs}
    assert len(losses["plain"]) == 4
    for name in losses:
        torch.testing.assert_close(losses[name], losses["plain"], rtol=0, atol=1e-6)
    for log in ("log-0.txt", "traced-log-0.txt"):
        assert "recompile_limit" not in (folder / log).read_text()
