"""Steps that hold all lengths: two ranks make the steps of one, and a resumed run the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_processes import run_strategies
from small_pipeline import SmallPipeline, assert_same_run, metrics

STEPS, STATE = 4, 2
CHOICES = {
    "velocity": [16, 16, 16, 8, 8, 8, 8, 4],  # the last is on the second of two ranks alone
    "contrast": [16, 8],  # of each K a rank has two
    "mean_flow": [16, 16, 16, 8, 8, 8, 8, 4],
}
OBJECTIVES = {"contrast": {"contrastive": 0.05}, "mean_flow": {"mean_flow": {"guidance": 2.0}}}
STRATEGIES = {
    "fsdp": [
        "parallel.strategy=fsdp",
        "parallel.activation_checkpointing=0.5",
    ],
    "zero1": ["parallel.strategy=deepspeed", "parallel.deepspeed.stage=1"],
}


@pytest.fixture(scope="module", params=CHOICES)
def runs(small_pipeline: SmallPipeline, request: pytest.FixtureRequest) -> dict[str, Path]:
    loss = request.param
    folder = small_pipeline.root / f"packed-{loss}"
    folder.mkdir()
    sizes = {"size": "tiny", "latent_dim": 8, "num_base_tokens": 16, "num_classes": 17}

    def config(out: Path) -> Path:
        return small_pipeline.generator_config(
            out,
            run_name="packed",
            model=sizes | {"end_time": loss == "mean_flow"},
            objective=OBJECTIVES.get(loss, {}),
            lengths={"choices": CHOICES[loss], "per_sample": True},
            train={"max_duration": f"{STEPS}ba", "global_batch_size": 8, "precision": "fp32"},
            optimizer={"lr": 1e-3, "clip_norm": 0.5},
            checkpoint={"interval": f"{STATE}ba", "keep": 10},
        )

    strategies = {name: list(keys) for name, keys in STRATEGIES.items()}
    if loss != "contrast":  # which needs two of each K in a micro-batch
        strategies["fsdp"].append("train.device_microbatch_size=2")
    return run_strategies(config, folder, strategies, again=STATE)


@pytest.mark.parametrize(("name", "tolerance"), [("fsdp", 1e-6), ("zero1", 1e-6), ("again", 0)])
def test_the_run_is_the_same(runs, name, tolerance):
    assert_same_run(runs[name], runs["one"], STEPS, tolerance)


@pytest.mark.parametrize("name", ["one", "fsdp"])
def test_every_step_tells_the_loss_of_each_length(runs, name, request):
    choices = CHOICES[request.node.callspec.params["runs"]]
    for row in metrics(runs[name]):
        assert row["num_tokens"] == "mixed"
        parts = [row[f"loss/K={k}"] for k in choices]
        assert row["loss"] == pytest.approx(sum(parts) / len(parts), rel=1e-5)
