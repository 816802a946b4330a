"""One run under every strategy: the same numbers, a share of the bytes, and moves between them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from rank_processes import rewound, run_ranks, run_strategies
from small_pipeline import SmallPipeline, assert_same_run, losses, metrics

STEPS, LAST_STATE = 12, 4
TOLERANCE = 1e-6

FSDP = ["parallel.strategy=fsdp"]
ZERO = {n: ["parallel.strategy=deepspeed", f"parallel.deepspeed.stage={n}"] for n in (1, 2, 3)}
STRATEGIES = {
    "ddp": [],
    "ddp-recompute": ["parallel.activation_checkpointing=0.5"],
    "fsdp": FSDP,
    "fsdp-grad_op-recompute": [
        *FSDP,
        "parallel.fsdp.shard=grad_op",
        "parallel.activation_checkpointing=1.0",
    ],
    "fsdp-offload": [*FSDP, "parallel.fsdp.cpu_offload=true"],
    **{f"zero{stage}": keys for stage, keys in ZERO.items()},
}


def config(pipeline: SmallPipeline, out: Path) -> Path:
    """12 steps with clipping, a cosine, and the border of an epoch after the eighth."""
    return pipeline.generator_config(
        out,
        run_name="strategies",
        train={"max_duration": f"{STEPS}ba", "global_batch_size": 8, "precision": "fp32"},
        optimizer={"lr": 1e-3, "clip_norm": 0.5, "schedule": "cosine", "warmup": 3},
        checkpoint={"interval": "4ba", "keep": 10},
    )


def assert_same(out: Path, expected: Path, tolerance: float = TOLERANCE) -> None:
    """Losses, averaged weights and gradient norms."""
    assert_same_run(out, expected, STEPS, tolerance)
    if "gradient_norm_generator" in metrics(out)[-1]:  # DeepSpeed keeps it to itself
        norms = [
            [row.get("gradient_norm_generator", 0.0) for row in metrics(run)][LAST_STATE:]
            for run in (out, expected)
        ]
        torch.testing.assert_close(*norms, rtol=10 * tolerance, atol=0)


@pytest.fixture(scope="module")
def folder(small_pipeline):
    path = small_pipeline.root / "strategies"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def runs(small_pipeline, folder):
    """Every strategy on two ranks, and one process alone."""
    return run_strategies(partial(config, small_pipeline), folder, STRATEGIES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_strategy_does_not_change_the_run(runs, name):
    assert_same(runs[name], runs["one"])


def test_weights_do_move(runs):
    values = losses(runs["one"], STEPS)
    assert abs(values[0] - values[-1]) > 1e-3


# A state does not know who wrote it: each strategy is left once and entered once, each number of
# ranks too.
MOVES = {
    "1 to 2 ddp": ("one", 2, []),
    "1 to 2 zero2": ("one", 2, ZERO[2]),
    "2 fsdp to 1": ("fsdp", 1, []),
    "2 zero2 to 1 fsdp": ("zero2", 1, FSDP),
    "2 zero3 to 1 zero1": ("zero3", 1, ZERO[1]),
    "2 zero1 to 2 fsdp": ("zero1", 2, FSDP),
    "2 fsdp to 2 zero1": ("fsdp", 2, ZERO[1]),
    "2 ddp to 2 zero3": ("ddp", 2, ZERO[3]),
    "2 ddp to 4 fsdp": ("ddp", 4, FSDP),
    "2 zero2 to 4 zero2": ("zero2", 4, ZERO[2]),
}


@pytest.fixture(scope="module")
def moved(small_pipeline, folder, runs):
    """Each run, taken up after its second state on other ranks or under another strategy."""
    outs = {}
    for world_size in (1, 2, 4):
        jobs = []
        for move, (source, ranks, keys) in MOVES.items():
            if ranks == world_size:
                out = folder / move.replace(" ", "-")
                rewound(runs[source], out, LAST_STATE)
                jobs.append((config(small_pipeline, out), keys))
                outs[move] = out
        run_ranks(world_size, jobs, folder / f"moves-{world_size}-log")
    return outs


@pytest.mark.parametrize("move", MOVES)
def test_a_run_moves_to_other_ranks_and_strategies(runs, moved, move):
    assert_same(moved[move], runs["one"])
    attempts = sorted((moved[move] / "state" / "attempts").iterdir())
    assert json.loads(attempts[-1].read_text())["resumed_step"] == LAST_STATE


RESUMED = ("ddp", "fsdp", "zero2", "zero3")


@pytest.fixture(scope="module")
def continued(small_pipeline, folder, runs):
    """Runs taken up after their second state, on the same ranks."""
    outs = {name: rewound(runs[name], folder / f"again-{name}", LAST_STATE) for name in RESUMED}
    jobs = [(config(small_pipeline, out), STRATEGIES[name]) for name, out in outs.items()]
    run_ranks(2, jobs, folder / "again-log")
    return outs


@pytest.mark.parametrize("name", RESUMED)
def test_the_same_ranks_go_on_bit_by_bit(runs, continued, name):
    assert losses(continued[name], STEPS) == losses(runs[name], STEPS)
    assert_same(continued[name], runs[name], tolerance=0)
