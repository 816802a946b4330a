"""Alignment that ends within a run: two ranks make the steps of one, and a resumed run its bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_processes import rewound, run_ranks, run_strategies
from safetensors.torch import load_file
from small_pipeline import SmallPipeline, assert_same_run, metrics
from typed_commands import typed

from lgm_scale.data.preparation import encode

STEPS, STATE, ALIGNED = 6, 2, 4
STRATEGIES = {
    "ddp": ["train.device_microbatch_size=2"],
    "fsdp": ["parallel.strategy=fsdp", "parallel.activation_checkpointing=0.5"],
    "zero2": ["parallel.strategy=deepspeed", "parallel.deepspeed.stage=2"],
    "zero3": ["parallel.strategy=deepspeed", "parallel.deepspeed.stage=3"],
}


@pytest.fixture(scope="module")
def runs(small_pipeline: SmallPipeline) -> dict[str, Path]:
    folder = small_pipeline.root / "aligned"
    folder.mkdir()
    inputs = ("--images", small_pipeline.images, "--tokenizer", small_pipeline.tokenizer)
    said = typed(encode.main, *inputs, "--out", folder / "latents", "--features", "24")
    assert said.status == 0, said.err

    def config(out: Path) -> Path:
        return small_pipeline.generator_config(
            out,
            run_name="aligned",
            data={"path": str(folder / "latents"), "num_workers": 0},
            objective={"feature_alignment": {"steps": ALIGNED, "block": 2, "channels": 24}},
            train={"max_duration": f"{STEPS}ba", "global_batch_size": 8, "precision": "fp32"},
            checkpoint={"interval": f"{STATE}ba", "keep": 10},
        )

    found = run_strategies(config, folder, STRATEGIES, again=STATE)
    found["fewer"] = rewound(found["fsdp"], folder / "fewer", STATE)
    run_ranks(1, [(config(found["fewer"]), [])], folder / "fewer-log")
    return found


@pytest.mark.parametrize(
    ("name", "tolerance"),
    # Micro-batches add up gradients in another order, and Adam's first steps divide by them.
    [("ddp", 5e-6), *((name, 1e-6) for name in ("fsdp", "zero2", "zero3", "fewer")), ("again", 0)],
)
def test_the_run_is_the_same(runs, name, tolerance):
    assert_same_run(runs[name], runs["one"], STEPS, tolerance)
    rows, expected = (metrics(runs[each])[:ALIGNED] for each in (name, "one"))
    found = [row["feature_alignment"] for row in rows]
    wanted = [row["feature_alignment"] for row in expected]
    assert found == pytest.approx(wanted, abs=1e-5)
    assert not any("feature_alignment" in row for row in metrics(runs[name])[ALIGNED:])


@pytest.mark.parametrize("name", ["one", "fsdp", "zero3"])
def test_the_layer_is_in_no_bundle(runs, name):
    weights = load_file(runs[name] / "bundle" / "generator.safetensors")
    assert not any("feature" in key for key in weights)
