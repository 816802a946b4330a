"""What the page of a comparison says: its table, its plot, its markers. Nothing is trained."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from matplotlib.figure import Figure

from experiments.config import Column, Experiment, Panel, Table, load_experiment
from experiments.page import draw, lines_of, mean_and_std, render, write_between_markers
from experiments.runs import Record
from lgm_scale.config.loading import read_yaml
from lgm_scale.errors import ConfigError, DataError


def sweep_records(experiment: Experiment) -> dict[str, list[Record]]:
    """Two seeds of every run of `elastic`, with rows as a sweep gives them."""
    results: dict[str, list[Record]] = {}
    for run in experiment.runs:
        steps = {"sit": "250", "elit": "279", "lgm": "648"}[run.name]
        values = {"name": run.name, "label": run.label, "steps": steps}
        results[run.name] = [
            {
                "run": values,
                "sweep": {
                    "rows": [
                        {
                            "cell": cell,
                            "num_images": 500,
                            "metrics": {
                                "fashion_frechet": 10.0 + shift + 1000 / k,
                                "fashion_accuracy": 0.5,
                            },
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
    table = render(experiment, results, 1.99e12)
    assert "2.0 TFLOPs of training each; 2 seeds; 500 samples" in table
    assert "| SiT | 64 | 250 | 64.00 | 26.6 ± 1.4 | 50.0 ± 0.0 |" in table
    assert table.count("| ELIT |") == table.count("| LGM |") == 3
    draw(experiment, results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_run_without_rows_is_one_line_and_its_lists_are_curves(tmp_path):
    panel = Panel(x="score.k", y="score.db.*.-1", x_label="K", y_label="dB", drop_last=True)
    value = Column(head="dB", value="score.db.0.1", without=("none",))
    columns = (Column(head="run", value="run.label"), value)
    experiment = dataclasses.replace(
        load_experiment("tokenizers"),
        caption="{seeds} of {run.steps}",
        tables=(Table(columns=columns), Table(columns=columns, runs=("tome",))),
        panels=(panel, dataclasses.replace(panel, runs=("lgm", "tome"))),
    )
    results = {
        run.name: [
            {
                "run": {"name": run.name, "label": run.name, "steps": "400"},
                "score": {"k": [8, 16], "db": [[None, 20 + s], [1.0, 2.0]]},
            }
            for s in (0.0, 0.02)
        ]
        for run in experiment.runs
    }
    table = render(experiment, results, None)
    assert table.startswith("2 of 400\n\n| run | dB |\n| --- | --- |\n| lgm | 20.01 ± 0.01 |\n")
    assert table.count("| tome | 20.01 ± 0.01 |") == 2
    assert table.count("| lgm |") == 1
    assert "| none | - |" in table
    draw(experiment, results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_difference_is_taken_seed_by_seed_from_the_line_of_the_same_name():
    column = Column(head="difference", value="row.x", minus="plain")
    columns = (Column(head="run", value="run.label"), Column(head="K", value="row.name"), column)
    experiment = dataclasses.replace(
        load_experiment("faster"),
        caption="",
        rows="rows",
        tables=(Table(columns=columns, runs=("contrastive", "plain")),),
    )
    per_seed = {"plain": [[1, 2, 3, None], [5, 6, 7, 8]], "contrastive": [[2, 2, 1, 1]] * 2}
    results = {
        run.name: [
            {"run": {"name": run.name, "label": run.name}, "rows": [{"x": x} for x in values]}
            for values in per_seed.get(run.name, [[0.0] * 4] * 2)
        ]
        for run in experiment.runs
    }
    assert render(experiment, results, None).splitlines()[4:] == [
        "| contrastive | K = 8 | -1.00 ± 2.83 |",  # 2 - 1 and 2 - 5
        "| contrastive | K = 16 | -2.00 ± 2.83 |",
        "| contrastive | K = 32 | -4.00 ± 2.83 |",
        "| contrastive | K = 64 | -7.00 |",
        *(f"| plain | K = {k} | - |" for k in (8, 16, 32, 64)),
    ]


def test_a_panel_of_differences_has_the_other_run_as_its_zero(monkeypatch, tmp_path):
    experiment = load_experiment("faster")
    panels = tuple(dataclasses.replace(panel, x="row.k", y="row.x") for panel in experiment.panels)
    panels = (dataclasses.replace(panels[0], runs=("plain", "aligned")), panels[1])
    experiment = dataclasses.replace(experiment, rows="rows", panels=panels)
    per_seed = {"plain": [[1, 2, 3, 4], [3, 4, 5, 6]], "aligned": [[2, 2, 2, 2], [6, 6, 6, 6]]}
    results = {
        run.name: [
            {
                "run": {"name": run.name, "label": run.label or run.name},
                "rows": [{"x": x, "k": k} for x, k in zip(values, (8, 16, 32, 64), strict=True)],
            }
            for values in per_seed.get(run.name, [[0.0] * 4] * 2)
        ]
        for run in experiment.runs
    }
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw(experiment, results, tmp_path / "plot.png")
    left, right = drawn[0].axes
    assert [each.get_label() for each in left.containers] == ["aligned"]
    (curve,) = left.containers
    assert list(curve[0].get_xdata()) == [8, 16, 32, 64]
    assert list(curve[0].get_ydata()) == [2.0, 1.0, 0.0, -1.0]  # means of 1, 3; 0, 2; -1, 1; -2, 0
    half = [(upper - lower) / 2 for (_, lower), (_, upper) in curve[2][0].get_segments()]
    assert half == pytest.approx([2**0.5] * 4)
    assert left.lines[0].get_label() == "plain"
    assert list(left.lines[0].get_ydata()) == [0, 0]
    assert len(right.containers) == len(experiment.runs) - 1
    places = [each[0].get_xdata()[0] for each in right.containers]
    assert places == sorted(set(places))
    assert 7 < places[0] < 8 < places[-1] < 9


def test_a_panel_of_differences_needs_rows_and_a_run(tmp_path):
    values: dict[str, Any] = read_yaml("yamls/experiments/faster.yaml")
    panel = dict.fromkeys(("x", "y", "x_label", "y_label"), "x") | {"runs": ["plain"]}
    rows = values.pop("rows")
    panels = [panel | {"minus": minus} for minus in ("plain", "pain")]
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(values | {"panels": panels}))
    with pytest.raises(ConfigError) as caught:
        load_experiment(str(path))
    assert str(caught.value).count("it needs `rows`") == 2
    assert "  - panels.1.minus: 'pain' is no run; choose from plain, contrastive" in str(
        caught.value
    )
    values["runs"][0]["cells"] = {"K = 8": {"num_tokens": 8}}
    panels = [panel | {"minus": "plain", "runs": ["plain", "aligned"]}]
    table = {"columns": [{"head": "x", "value": "row.x"}]}
    path.write_text(json.dumps(values | {"panels": panels, "rows": rows, "tables": [table]}))
    with pytest.raises(
        ConfigError, match=r"which aligned has; .* or leave aligned out of the panel's"
    ):
        load_experiment(str(path))


def test_a_difference_needs_a_run_that_has_the_same_cells(tmp_path):
    values: dict[str, Any] = read_yaml("yamls/experiments/faster.yaml")
    plain, contrastive = values["runs"][:2]
    plain["cells"] = {name: plain["cells"][name] for name in ("K = 8", "K = 16")}
    columns = [{"head": "x", "value": "row.x", "minus": minus} for minus in ("plain", "pain")]
    table = {"columns": [*columns, columns[0] | {"without": ["contrastive"]}]}
    path = tmp_path / "x.yaml"
    changed = {"runs": [plain, contrastive], "tables": [table], "panels": []}
    path.write_text(json.dumps(values | changed))
    with pytest.raises(ConfigError) as caught:
        load_experiment(str(path))
    assert str(caught.value).splitlines()[1:] == [
        "  - tables.0.columns.0.minus: plain has no cells K = 32, K = 64, which contrastive has; "
        "give it them, or add contrastive to `without`",
        "  - tables.0.columns.1.minus: 'pain' is no run; choose from plain, contrastive",
    ]


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
    write_between_markers(doc, "of another", "more")
    before = doc.read_text()
    write_between_markers(doc, "second")
    assert doc.read_text() == before.replace("first", "second")
    assert "<!-- measured more: begin -->\nof another\n<!-- measured more: end -->" in before


def test_mean_and_sample_standard_deviation():
    assert mean_and_std([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert mean_and_std([1.25], 1) == "1.2"
    assert mean_and_std([None, None], 1) == "-"
