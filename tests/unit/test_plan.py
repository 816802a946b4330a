"""What --dry-run says of the published tokenizer recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from lgm_scale.config.rules import load_training_run
from lgm_scale.families.tokenizer.config import TOKENIZER_SIZES
from lgm_scale.planning.options import PlanOptions
from lgm_scale.planning.plan import cost_line, describe, networks

YAMLS = Path(__file__).resolve().parents[2] / "yamls"
RECIPE = YAMLS / "tokenizer_b.yaml"
DIT_XL = YAMLS / "dit_xl.yaml"


def plan_of(*overrides: str) -> str:
    return describe(load_training_run(str(RECIPE), list(overrides), 8, None), 8)


def row(text: str, strategy: str) -> list[str]:
    """Numbers of a strategy's row of the memory table."""
    (line,) = (line for line in text.splitlines() if line.startswith(strategy))
    return line.removeprefix(strategy).split()


def test_the_recipe_is_the_published_one():
    objective = load_training_run(str(RECIPE), [], 8, None).objective
    assert vars(objective) == {
        "pixel": 1.0,
        "perceptual": 1.0,
        "perceptual_warmup": 10_000,
        "adversarial": 0.4,
        "adversarial_start": 20_000,
        "lecam": 0.001,
        "consistency": 4.0,
        "entropy": 0.01,
        "representation": 1.0,
        "alignment": 0.25,
        "exploration_noise": 0.1,
    }


@pytest.mark.slow
def test_memory_counts_both_players_and_the_frozen_networks():
    text = plan_of()
    assert "auxiliary decoder 1.6 M" in text
    assert "critic's heads 7.4 M" in text
    network, auxiliary, critic, frozen = 173_612_064, 1_622_464, 7_398_725, 339.8e6
    total = (16 * (network + auxiliary + critic) + 4 * network + 4 * frozen) / 2**30
    assert row(text, "> ddp")[0] == f"{total:.2f}"
    less = plan_of("objective.adversarial=0", "objective.representation=0")
    assert "critic" not in less.split("parameters")[1]
    assert "frozen networks 14.7 M" in less  # VGG16's convolutions


@pytest.mark.parametrize("size", ["s", *(pytest.param(x, marks=pytest.mark.slow) for x in "bl")])
def test_every_size_can_be_planned(size):
    assert size in TOKENIZER_SIZES
    assert "parameters" in plan_of(f"model.size={size}")


def test_a_generator_has_no_parts_for_training_only():
    text = describe(load_training_run(str(DIT_XL), [], 64, None), 64)
    assert "for training only" not in text
    assert "trained:" not in text


def test_memory_shrinks_with_ranks_where_a_strategy_shards():
    text = describe(load_training_run(str(DIT_XL), [], 64, None), 64)
    whole = float(row(text, "> ddp")[0])
    assert whole == pytest.approx(20 * 675_261_216 / 2**30, abs=0.01)
    assert float(row(text, "  fsdp2 full")[0]) == pytest.approx(whole / 64, rel=0.02)
    assert float(row(text, "  fsdp2 hybrid")[0]) == pytest.approx(whole / 8, rel=0.01)
    weights, gradients, optimizer, ema = map(float, row(text, "  zero-2")[1:5])
    assert weights == pytest.approx(whole / 5 * (1 + 1 / 64), rel=0.01)
    assert [gradients, optimizer, ema] == pytest.approx(
        [whole / 5 / 64, 2 * whole / 5 / 64, whole / 5 / 64], abs=0.01
    )


RECIPES = sorted(path for path in YAMLS.glob("*.yaml") if path.name != "eval_sweep.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_headers_say_what_the_dry_run_says(path):
    """Parameters, and the line of hours, energy and bytes on disk."""
    run = load_training_run(str(path), [], 8, None)
    nets = networks(run)
    header = path.read_text().split("task:")[0]
    assert f"({nets.num_parameters / 1e6:.1f} M parameters)" in header
    line = cost_line(run, nets, 8, PlanOptions()).removeprefix("computed   ")
    assert f"# Computed   {line}\n" in header


def test_cost_grows_with_what_is_stated():
    run = load_training_run(str(DIT_XL), [], 8, None)
    nets = networks(run)
    half = PlanOptions(utilisation=0.15, price=2.0)
    line = cost_line(run, nets, 8, half)
    assert "at 15% of the peak: 31.5 hours, 252 kWh at 1000 W per GPU, 503 at 2 per GPU" in line
    assert "42 GB of data, 2 states of 10.8 GB" in line  # 1,281,167 x 2 flips x 256 x 32 x 2 bytes
    unknown = load_training_run(str(DIT_XL), ["data.num_samples=null"], 8, None)
    assert "hours unknown (set data.num_samples); data of" in cost_line(unknown, nets, 8, half)


def test_the_configured_strategy_is_marked():
    overrides = ["parallel.strategy=fsdp", "parallel.fsdp.cpu_offload=true"]
    text = describe(load_training_run(str(DIT_XL), overrides, 64, None), 64)
    assert row(text, "> fsdp2 full offload")[0] == "0.00"
    assert "on the host" in text
