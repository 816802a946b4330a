"""The comparison of length knobs: equal work, and what the table says. No run is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.elastic import (
    BUDGET_STEPS,
    LENGTHS,
    YAMLS,
    equal_steps,
    plot,
    render,
    training_work,
)
from lgm_scale.config.loading import read_yaml


def test_every_generator_gets_the_same_work():
    work = {name: training_work(name) for name in LENGTHS}
    budget = BUDGET_STEPS * work["sit"][0]
    for name, (per_step, cycle) in work.items():
        steps = equal_steps(per_step, cycle, budget)
        assert steps % cycle == 0  # every length equally often
        assert steps * per_step == pytest.approx(budget, rel=0.01), name
    assert work["lgm"][0] < work["elit"][0] < work["sit"][0]


def test_only_what_must_differ_does():
    runs = {name: read_yaml(YAMLS / f"{name}.yaml") for name in LENGTHS}
    for key in ("optimizer", "ema", "objective"):
        assert runs["sit"][key] == runs["elit"][key] == runs["lgm"][key]
    for name, lengths in LENGTHS.items():
        assert sorted(runs[name]["lengths"]["choices"]) == list(lengths)
        assert runs[name]["train"]["global_batch_size"] == 64
    assert runs["sit"]["space"] == runs["elit"]["space"]


def rows(lengths: tuple[int, ...], shift: float) -> list[dict]:
    return [
        {
            "cell": {"num_tokens": k},
            "num_images": 544,
            "metrics": {"pixel_frechet": 10.0 + shift + 1000 / k},
            "work": {"tflops_per_image": k / 1000, "tflops_per_row": {str(k): k / 25000}},
        }
        for k in lengths
    ]


def test_the_table_has_a_line_per_length_and_the_spread_over_seeds(tmp_path: Path):
    results = {name: [rows(lengths, s) for s in (0, 2)] for name, lengths in LENGTHS.items()}
    table = render(results, {"sit": 600, "elit": 687, "lgm": 1569}, 19.18e12)
    assert "19.2 TFLOPs of training each; 2 seeds; 544 samples" in table
    assert "| SiT | 64 | 600 | 2.560 | 64.00 | 26.6 ± 1.4 |" in table
    assert table.count("| ELIT |") == table.count("| LGM |") == 3
    plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
