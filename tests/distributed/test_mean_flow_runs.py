"""MeanFlow and muP by ranks: under FSDP the steps of one process, and taken up to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_processes import run_strategies
from small_pipeline import SmallPipeline, assert_same_run, losses

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
            optimizer={"lr": 1e-3, "clip_norm": 0.5, "mup_base": "s"},
            checkpoint={"interval": f"{STATE}ba", "keep": 10},
        )

    keys = ["parallel.strategy=fsdp", "parallel.activation_checkpointing=0.5"]
    return run_strategies(config, folder, {"fsdp": keys}, again=STATE)


def test_two_ranks_make_the_steps_of_one(runs):
    """Losses to 1e-6. Hidden weights, of 0.04 to 0.09 at first, learn at 4e-3, and Adam's first
    steps are as long where a gradient is of the size of rounding: some differ by 3e-5.
    """
    torch.testing.assert_close(
        *(losses(runs[name], STEPS) for name in ("fsdp", "one")), rtol=0, atol=1e-6
    )
    assert_same_run(runs["fsdp"], runs["one"], STEPS, 1e-4)


def test_a_run_that_is_taken_up_is_the_same_to_the_bit(runs):
    assert_same_run(runs["again"], runs["one"], STEPS, 0)
