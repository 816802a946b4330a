"""A start from a bundle under every kind of strategy, on two ranks: the numbers of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_processes import run_strategies
from small_pipeline import SmallPipeline, assert_same_run, random_generator

STEPS = 3
STRATEGIES = {
    "ddp": [],
    "fsdp": ["parallel.strategy=fsdp"],
    "zero3": ["parallel.strategy=deepspeed", "parallel.deepspeed.stage=3"],
}


@pytest.fixture(scope="module")
def runs(small_pipeline: SmallPipeline, tmp_path_factory) -> dict[str, Path]:
    bundle = random_generator(small_pipeline)

    def config(out: Path) -> Path:
        return small_pipeline.generator_config(
            out,
            run_name="tuned",
            init_from=str(bundle),
            optimizer={"lr": 1e-4},
            train={"max_duration": f"{STEPS}ba", "global_batch_size": 8, "precision": "fp32"},
        )

    return run_strategies(config, tmp_path_factory.mktemp("tuned"), STRATEGIES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_strategy_does_not_change_a_start_from_a_bundle(runs, name):
    assert_same_run(runs[name], runs["one"], STEPS, 1e-6)
    assert (runs[name] / "history.json").read_text().count('"init_from"') == 1
