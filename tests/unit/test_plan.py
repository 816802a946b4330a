"""What --dry-run says of the published tokenizer recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from lgm_scale.config_rules import load_training_run
from lgm_scale.models.tokenizer import TOKENIZER_SIZES
from lgm_scale.plan import Sizes, describe

RECIPE = Path(__file__).resolve().parents[2] / "yamls" / "tokenizer_b.yaml"


def plan_of(*overrides: str) -> str:
    return describe(load_training_run(str(RECIPE), list(overrides), 8, None), 8)


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


def test_memory_counts_both_players_and_the_frozen_networks():
    text = plan_of()
    assert "auxiliary decoder 1.6 M" in text
    assert "critic's heads 7.4 M" in text
    network, auxiliary, critic, frozen = 173_612_064, 1_622_464, 7_398_725, 339.8e6
    total = (16 * (network + auxiliary + critic) + 4 * network + 4 * frozen) / 2**30
    assert f"without activations: {total:.2f} GiB" in text
    less = plan_of("objective.adversarial=0", "objective.representation=0")
    assert "critic" not in less.split("parameters")[1]
    assert "frozen networks 14.7 M" in less  # VGG16's convolutions


@pytest.mark.parametrize("size", ["s", "b", "l"])
def test_every_size_can_be_planned(size):
    assert size in TOKENIZER_SIZES
    assert "parameters" in plan_of(f"model.size={size}")


def test_a_generator_has_no_parts_for_training_only():
    assert Sizes(5).lines() == []
