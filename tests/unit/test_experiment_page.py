"""What the page of a comparison says: its table, its plot, its markers. Nothing is trained."""

from __future__ import annotations

import pytest
from test_experiments import measured

from experiments.config import Experiment, load_experiment
from experiments.page import draw, lines_of, mean_and_std, render, write_between_markers
from experiments.runs import (
    Record,
)
from lgm_scale.errors import DataError


def sweep_records(experiment: Experiment) -> dict[str, list[Record]]:
    """Two seeds of every run of `elastic`, with rows as a sweep gives them."""
    results: dict[str, list[Record]] = {}
    for run in experiment.runs:
        steps = {"sit": "600", "elit": "687", "lgm": "1569"}[run.name]
        values = {"name": run.name, "label": run.label, "steps": steps}
        results[run.name] = [
            {
                "run": values,
                "sweep": {
                    "rows": [
                        {
                            "cell": cell,
                            "num_images": 544,
                            "metrics": {"pixel_frechet": 10.0 + shift + 1000 / k},
                            "work": {
                                "tflops_per_image": k / 1000,
                                "tflops_per_row": {str(k): k / 25000},
                            },
                        }
                        for cell in run.cells.values()
                        for k in [cell["num_tokens"]]
                    ]
                },
            }
            for shift in (0, 2)
        ]
    return results


def test_the_table_has_a_line_per_length_and_the_spread_over_seeds(tmp_path):
    experiment = load_experiment("elastic")
    results = sweep_records(experiment)
    table = render(experiment, results, 19.18e12)
    assert "19.2 TFLOPs of training each; 2 seeds; 544 samples" in table
    assert "| SiT | 64 | 600 | 2.560 | 64.00 | 26.6 ± 1.4 |" in table
    assert table.count("| ELIT |") == table.count("| LGM |") == 3
    draw(experiment, results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_run_without_rows_is_one_line_and_its_lists_are_curves(tmp_path):
    experiment = load_experiment("length_control")
    lengths = [8, 16, 32, 48, 64]
    results = {
        run.name: [
            {
                "run": {"label": run.name, "steps": "400"},
                "psnr": {"num_images": 544, "lengths": lengths, "mean_psnr": [20 + s] * 5},
                "alignment": {
                    "lengths": lengths,
                    "cknna": [[1.0, 0.5]] * 5,
                    "cknna_mean": 0.5 + s,
                    "cosine_merged": dict.fromkeys(map(str, lengths), None),
                    "cosine_in_block": 0.25,
                    "cosine_all": 0.125,
                },
            }
            for s in (0.0, 0.02)
        ]
        for run in experiment.runs
    }
    table = render(experiment, results, None)
    same = "20.01 ± 0.01 | " * 5
    assert table.startswith(measured("length_control").split("\n")[0].replace("3 seeds", "2 seeds"))
    assert f"| tome | {same}0.510 ± 0.014 |" in table
    assert "| tome | - | - | - | - | 0.250 ± 0.000 | 0.125 ± 0.000 |" in table
    draw(experiment, results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_rows_that_do_not_fit_their_names_are_refused():
    experiment = load_experiment("elastic")
    results = sweep_records(experiment)
    results["lgm"][1]["sweep"]["rows"].pop()
    with pytest.raises(DataError, match=r"runs.lgm.cells: 3 names for 2 rows of sweep.rows"):
        lines_of(experiment, results)


def test_the_table_replaces_only_what_is_between_the_markers(tmp_path):
    doc = tmp_path / "docs" / "page.md"
    write_between_markers(doc, "first")
    doc.write_text("# Ours\n" + doc.read_text() + "Text after.\n")
    before = doc.read_text()
    write_between_markers(doc, "second")
    assert doc.read_text() == before.replace("first", "second")


def test_mean_and_sample_standard_deviation():
    assert mean_and_std([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert mean_and_std([1.25], 1) == "1.2"
    assert mean_and_std([None, None], 1) == "-"
