"""Steps that hold all lengths: two ranks make the steps of one, and a resumed run the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_processes import run_strategies
from small_pipeline import SmallPipeline, assert_same_run, metrics

STEPS, STATE = 4, 2
CHOICES = [16, 16, 16, 8, 8, 8, 8, 4]
"""As many as samples: the last is on the second of two ranks alone."""
STRATEGIES = {
    "fsdp": [
        "parallel.strategy=fsdp",
        "parallel.activation_checkpointing=0.5",
        "train.device_microbatch_size=2",
    ],
}


@pytest.fixture(scope="module")
def runs(small_pipeline: SmallPipeline) -> dict[str, Path]:
    folder = small_pipeline.root / "packed"
    folder.mkdir()

    def config(out: Path) -> Path:
        return small_pipeline.generator_config(
            out,
            run_name="packed",
            lengths={"choices": CHOICES, "per_sample": True},
            train={"max_duration": f"{STEPS}ba", "global_batch_size": 8, "precision": "fp32"},
            optimizer={"lr": 1e-3, "clip_norm": 0.5},
            checkpoint={"interval": f"{STATE}ba", "keep": 10},
        )

    return run_strategies(config, folder, STRATEGIES, again=STATE)


@pytest.mark.parametrize(("name", "tolerance"), [("fsdp", 1e-6), ("again", 0)])
def test_the_run_is_the_same(runs, name, tolerance):
    assert_same_run(runs[name], runs["one"], STEPS, tolerance)


@pytest.mark.parametrize("name", ["one", "fsdp"])
def test_every_step_tells_the_loss_of_each_length(runs, name):
    for row in metrics(runs[name]):
        assert row["num_tokens"] == "mixed"
        parts = [row[f"loss/K={k}"] for k in CHOICES]
        assert row["loss"] == pytest.approx(sum(parts) / 8, rel=1e-5)
