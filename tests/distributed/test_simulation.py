"""What a plan simulates, against real runs on two ranks: bytes over gloo, and bytes in memory."""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_processes import run_ranks
from test_memory import CASES
from torch import nn
from torch.autograd.profiler import profile

from benchmarks.plan_xl import table
from lgm_scale.config.rules import load_training_run
from lgm_scale.config.schema import FSDPConfig
from lgm_scale.families.lgm.config import DIT_SIZES
from lgm_scale.families.lgm.network import MergeDiT, build_merge_dit
from lgm_scale.merging.tree import MergeTree
from lgm_scale.parallel.fsdp import shard_model
from lgm_scale.parallel.memory import parameter_infos, planned_bytes
from lgm_scale.parallel.torch_internals import fake_tensors
from lgm_scale.parallel.traffic import Traffic, Transfer, moved_bytes
from lgm_scale.planning.recorder import Recorder
from lgm_scale.planning.simulation import fake_ranks
from lgm_scale.planning.strategies import StepShape, plan_step
from lgm_scale.training.callbacks import StepKeys
from lgm_scale.training.ema import EMA

SAMPLES = 32
TOKENS = 16


def record_a_step() -> None:
    """Let callbacks record step 2 of a run: what moves, and what the allocator is asked for."""
    begin, end = StepKeys.batch_start, EMA.batch_end
    open_now: list = []

    def batch_start(self, state, logger) -> None:
        begin(self, state, logger)
        if state.timestamp.batch.value == 2:
            open_now.extend((Traffic(), profile(profile_memory=True, use_kineto=True)))
            for context in open_now:
                context.__enter__()

    def batch_end(self, state, logger) -> None:
        end(self, state, logger)
        if not open_now:
            return
        traffic, profiler = open_now
        for context in reversed(open_now):
            context.__exit__(None, None, None)
        open_now.clear()
        changes = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
        changes.sort(key=lambda event: event.start_ns())
        peak = int(np.cumsum([event.nbytes() for event in changes]).max())
        (saver,) = (c for c in state.callbacks if type(c).__name__ == "StateSaver")
        out = Path(saver.companions["metrics.jsonl"]).parent
        found = {"moved": [list(t) for t in traffic.transfers], "peak": peak}
        (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))

    StepKeys.batch_start = batch_start  # type: ignore[method-assign]
    EMA.batch_end = batch_end  # type: ignore[method-assign]


def config(pipeline, out: Path) -> Path:
    return pipeline.generator_config(
        out,
        train={"max_duration": "3ba", "global_batch_size": 2 * SAMPLES, "precision": "fp32"},
        model={"size": "tiny", "latent_dim": 8, "num_base_tokens": 16, "num_classes": 17},
        lengths={"choices": [TOKENS]},
        checkpoint={"interval": "100ba"},
    )


@pytest.fixture(scope="module")
def recorded(small_pipeline):
    folder = small_pipeline.root / "simulation"
    folder.mkdir()
    jobs = [(config(small_pipeline, folder / name), keys) for name, keys in CASES.items()]
    run_ranks(2, jobs, folder / "log", prepare=record_a_step)
    return {name: json.loads((folder / name / "rank-0.json").read_text()) for name in CASES}


def parameters(run):
    with torch.device("meta"):
        return parameter_infos(build_merge_dit(run.model), averaged=True)


@cache
def planned(pipeline, name):
    path = config(pipeline, pipeline.root / "simulation" / "plan")
    run = load_training_run(str(path), CASES[name], 2, has_gpu=False)
    step = plan_step(run, parameters(run), 2, StepShape(SAMPLES, TOKENS), as_gpu=False)
    assert step is not None
    return run, step


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_that_gloo_moved(small_pipeline, recorded, name):
    moved = [Transfer(*t) for t in recorded[name]["moved"]]
    # What the loop tells itself besides (sizes, signals, finiteness) are one or two numbers each.
    moved = [transfer for transfer in moved if transfer.numel > 2]
    _, step = planned(small_pipeline, name)
    expected = [m.transfer for m in step.moved]
    assert moved_bytes(moved) == moved_bytes(expected)
    if name == "fsdp":  # simulated, not derived: every collective is the same
        assert Counter(moved) == Counter(expected)


@pytest.mark.parametrize("name", CASES)
def test_memory_is_what_the_allocator_was_asked_for(small_pipeline, recorded, name):
    """Most that a step holds at once of what it has allocated: torch's profiler sees no other.

    That is activations, temporary tensors, gathered weights, and gradients where they are made
    anew; the kernels' own buffers, which no simulation sees, are in what was measured.
    """
    run, step = planned(small_pipeline, name)
    expected = step.peak - step.state
    if name.startswith("zero"):  # makes gradients once, and keeps their memory
        expected -= planned_bytes(parameters(run), run.parallel, 2).gradients
    assert expected == pytest.approx(recorded[name]["peak"], rel=0.1)


@pytest.mark.parametrize(
    ("num_tokens", "gib"),
    [
        pytest.param(32, 20.1, marks=pytest.mark.slow),
        pytest.param(128, 77.9, marks=pytest.mark.thorough),
    ],
)
def test_xl_on_1024_ranks_takes_what_another_tracker_found(num_tokens, gib):
    """Found by torch's own, when each rank still gathered 593 MiB for one padded table."""
    cut = MergeTree.from_embeddings(torch.randn(256, 8), 4).assignment(num_tokens)
    row = DIT_SIZES["xl"]
    with torch.device("meta"):
        net = MergeDiT(row.width, row.depth, row.num_heads, 32, 256, 1000)
    model = nn.ModuleDict({"net": net})
    with fake_ranks(1024):
        shard_model(model, FSDPConfig(), torch.bfloat16, gpu=True)
        with fake_tensors(), Recorder() as recorder:
            model.to_empty(device="cpu")
            optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
            z = torch.randn(256, num_tokens, 32, dtype=torch.bfloat16)
            t, labels = torch.rand(256), torch.zeros(256).long()
            net(z, t, labels, cut).float().square().mean().backward()
            optimizer.step()
    assert recorder.timeline().max() / 2**30 == pytest.approx(gib - 593 / 1024, rel=0.01)


@pytest.mark.slow
def test_the_page_has_the_table_that_the_command_gives():
    """Of the shortest length: a change that moves others moves its rows."""
    page = (Path(__file__).resolve().parents[2] / "docs/planning.md").read_text()
    rows = table((32,)).splitlines()
    assert len(rows) == 2 + 2
    assert [row for row in rows if row not in page] == []
