"""Compiled blocks under each strategy: the numbers of uncompiled ones."""

from __future__ import annotations

import pytest
import torch
from rank_processes import run_ranks
from small_pipeline import metrics
from test_strategies import FSDP, ZERO

STRATEGIES = {"ddp": [], "fsdp": FSDP}
if torch.__version__.startswith("2.7."):  # refused with a newer one (parallel.rules)
    STRATEGIES["zero2"] = ZERO[2]
COMPILED = ["train.compile=true", "parallel.activation_checkpointing=0.5"]


@pytest.mark.slow
def test_compiled_blocks_change_no_loss(small_pipeline):
    folder = small_pipeline.root / "compiled"
    folder.mkdir()
    jobs = {}
    for name, keys in {"plain": [], **STRATEGIES}.items():
        path = small_pipeline.generator_config(
            folder / name,
            lengths={"choices": [8, 4]},
            train={"max_duration": "4ba", "global_batch_size": 4, "precision": "fp32"},
        )
        jobs[name] = (path, [*keys, *(COMPILED if name != "plain" else [])])
    run_ranks(2, list(jobs.values()), folder / "log", timeout=900)
    losses = {name: [row["loss"] for row in metrics(folder / name)] for name in jobs}
    for name in STRATEGIES:
        torch.testing.assert_close(losses[name], losses["plain"], rtol=0, atol=1e-6)
    told = (folder / "log-0.txt").read_text()
    assert "recompile_limit" not in told
