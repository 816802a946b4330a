"""MeanFlow and muP by ranks: under FSDP the steps of one process, and taken up to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_processes import run_strategies
from small_pipeline import SmallPipeline, assert_same_run

STEPS, STATE = 4, 2


@pytest.fixture(scope="module")
def runs(small_pipeline: SmallPipeline) -> dict[str, Path]:
    folder = small_pipeline.root / "mean_flow"
    folder.mkdir()
    sizes = {"size": "tiny", "latent_dim": 8, "num_base_tokens": 16, "num_classes": 17}

    def config(out: Path) -> Path:
        return small_pipeline.generator_config(
            out,
            run_name="mean-flow",
            model=sizes | {"end_time": True},
            objective={"mean_flow": {"share": 0.5, "guidance": 2.0}},
            train={"max_duration": f"{STEPS}ba", "global_batch_size": 8, "precision": "fp32"},
            optimizer={"lr": 1e-3, "clip_norm": 0.5, "mup_base": "s"},  # hidden layers at 4e-3
            checkpoint={"interval": f"{STATE}ba", "keep": 10},
        )

    keys = ["parallel.strategy=fsdp", "parallel.activation_checkpointing=0.5"]
    return run_strategies(config, folder, {"fsdp": keys}, again=STATE)


@pytest.mark.parametrize(("name", "tolerance"), [("fsdp", 1e-6), ("again", 0)])
def test_the_run_is_the_same(runs, name, tolerance):
    assert_same_run(runs[name], runs["one"], STEPS, tolerance)
