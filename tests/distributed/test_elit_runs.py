"""An ELIT run under every kind of strategy: one set of numbers, exact resume, equal budgets."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from rank_processes import rewound, run_ranks, run_strategies
from small_pipeline import SmallPipeline, assert_same_run, losses, metrics

from lgm_scale.training.length_schedule import LengthSchedule

STEPS, LAST_STATE = 10, 4
TOLERANCE = 1e-6
STRATEGIES = {
    "ddp": ["train.device_microbatch_size=2"],
    "fsdp": ["parallel.strategy=fsdp", "parallel.activation_checkpointing=0.5"],
    "zero3": ["parallel.strategy=deepspeed", "parallel.deepspeed.stage=3"],
}

RESUMED = ("fsdp", "zero3")


def config(pipeline: SmallPipeline, out: Path) -> Path:
    optimizer = {"lr": 1e-3, "clip_norm": 0.5, "warmup": 3}
    return pipeline.elit_config(
        out, run_name="spatial", optimizer=optimizer, checkpoint={"interval": "4ba", "keep": 5}
    )


@pytest.fixture(scope="module")
def folder(small_pipeline):
    path = small_pipeline.root / "spatial"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def runs(small_pipeline, folder):
    """Every strategy on two ranks, and one process alone."""
    return run_strategies(partial(config, small_pipeline), folder, STRATEGIES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_strategy_does_not_change_the_run(runs, name):
    assert_same_run(runs[name], runs["one"], STEPS, TOLERANCE)


def test_every_rank_runs_the_budget_that_seed_and_step_say(runs):
    """A rank with another K would have another loss: the mean over ranks equals one process."""
    schedule = LengthSchedule([64, 48, 32, 16], [1, 1, 1, 2], seed=0)
    expected = [schedule.num_tokens(step) for step in range(STEPS)]
    assert len(set(expected)) >= 3
    for out in runs.values():
        assert [row["num_tokens"] for row in metrics(out)] == expected


def test_weights_do_move(runs):
    values = losses(runs["one"], STEPS)
    assert abs(values[0] - values[-1]) > 1e-2


@pytest.fixture(scope="module")
def continued(small_pipeline, folder, runs):
    """Runs taken up after their first state: on the same ranks, and one on fewer."""
    outs = {name: rewound(runs[name], folder / f"again-{name}", LAST_STATE) for name in RESUMED}
    jobs = [(config(small_pipeline, out), STRATEGIES[name]) for name, out in outs.items()]
    run_ranks(2, jobs, folder / "again-log")
    outs["2 fsdp to 1"] = rewound(runs["fsdp"], folder / "fewer", LAST_STATE)
    run_ranks(1, [(config(small_pipeline, outs["2 fsdp to 1"]), [])], folder / "fewer-log")
    return outs


@pytest.mark.parametrize("name", RESUMED)
def test_the_same_ranks_go_on_bit_by_bit(runs, continued, name):
    assert_same_run(continued[name], runs[name], STEPS, tolerance=0)


def test_a_run_goes_on_with_fewer_ranks(runs, continued):
    assert_same_run(continued["2 fsdp to 1"], runs["one"], STEPS, TOLERANCE)
