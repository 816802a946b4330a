"""The search over guidance scales: its rules, and its runs on a tiny generator."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from small_sweep import numbers_of, results_of, sweep_config

from lgm_scale.errors import DataError
from lgm_scale.evaluation.sweep import samples as generate
from lgm_scale.evaluation.sweep.config import Cell, SearchConfig
from lgm_scale.evaluation.sweep.measure import measure
from lgm_scale.evaluation.sweep.search import next_cells, winners
from lgm_scale.sampling.config import SamplerConfig

CELL = Cell(32, SamplerConfig())
SCALES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)


def run(cells: list[Cell], fid: dict[Cell, float], search: SearchConfig, **scores) -> list[Cell]:
    """Cells in the order in which a search tries them."""
    known, tried = {}, []
    while now := next_cells(cells, known, search):
        tried += now
        known |= {
            cell: {"fid": fid[cell]} | scores.get(f"w{cell.sampler.cfg_scale:g}", {})
            for cell in now
        }
    return tried


def line(cell: Cell = CELL) -> list[Cell]:
    return [Cell(cell.num_tokens, replace(cell.sampler, cfg_scale=w)) for w in SCALES]


def parabola(cells: list[Cell], best: float) -> dict[Cell, float]:
    return {cell: 3 + (cell.sampler.cfg_scale - best) ** 2 for cell in cells}


def test_a_line_stops_after_three_that_are_clearly_worse():
    cells = line()
    tried = run(cells[::-1], parabola(cells, 3.0), SearchConfig())
    assert [cell.sampler.cfg_scale for cell in tried] == [1, 2, 3, 4, 5, 6]
    known = {cell: {"fid": value} for cell, value in parabola(tried, 3.0).items()}
    assert [cell.sampler.cfg_scale for cell in winners(known, "fid")] == [3]


def test_what_is_within_the_margin_is_not_worse_and_a_better_one_starts_anew():
    cells = line()
    fid = dict(zip(cells, (3.0, 3.05, 3.2, 3.3, 2.9, 3.2, 3.2, 2.0), strict=True))
    assert len(run(cells, fid, SearchConfig(patience=3))) == 8
    assert len(run(cells, fid, SearchConfig(patience=2))) == 4
    assert len(run(cells, fid, SearchConfig(patience=2, margin=0.4))) == 8


def test_a_line_ends_where_images_become_too_sharp():
    cells = line()
    falling = {cell: 10 - cell.sampler.cfg_scale for cell in cells}
    assert len(run(cells, falling, SearchConfig(), w4={"is": 351.0})) == 4
    assert len(run(cells, falling, SearchConfig(max_is=None), w4={"is": 351.0})) == 8


def test_lines_advance_together_and_every_length_has_its_winner():
    lines = [
        line(Cell(k, SamplerConfig(cfg_interval=interval)))
        for k in (32, 64)
        for interval in ((0.0, 1.0), (0.15, 1.0))
    ]
    cells = [cell for each in lines for cell in each]
    best = dict(zip(range(4), (3.0, 5.0, 2.0, 2.5), strict=True))
    fid = {c: v for i, each in enumerate(lines) for c, v in parabola(each, best[i]).items()}
    fid[lines[0][2]] = 2.0  # the best of K = 32
    known: dict[Cell, dict[str, float]] = {}
    first = next_cells(cells, known, SearchConfig())
    assert [(c.num_tokens, c.sampler.cfg_interval[0], c.sampler.cfg_scale) for c in first] == [
        (32, 0.0, 1.0), (32, 0.15, 1.0), (64, 0.0, 1.0), (64, 0.15, 1.0),
    ]  # fmt: skip
    known = {cell: {"fid": fid[cell]} for cell in run(cells, fid, SearchConfig())}
    assert winners(known, "fid") == [lines[0][2], lines[2][1]]


# --- on a generator ---------------------------------------------------------------------------


def searching(made: Path, out: Path, **changes):
    return sweep_config(
        made, out, cells=[{"num_tokens": [4, 9], "cfg_scale": [1.0, 2.0, 40.0, 80.0, 160.0]}],
        search={"num_images": 6, "metric": "pixel_frechet", "patience": 1, "margin": 5.0,
                "max_is": None},
        **changes,
    )  # fmt: skip


def test_the_best_of_few_images_is_run_on_all_and_a_search_goes_on(made, tmp_path, monkeypatch):
    out = tmp_path / "report"
    results = measure(searching(made, out))
    assert results is not None
    assert [row["num_images"] for row in results["rows"]] == [11, 11]
    assert {row["num_images"] for row in results["searched"]} == {6}
    for row in results["rows"]:
        k = row["cell"]["num_tokens"]
        tried = [r for r in results["searched"] if r["cell"]["num_tokens"] == k]
        values = [r["metrics"]["pixel_frechet"] for r in tried]
        assert row["cell"] == tried[values.index(min(values))]["cell"]
        assert 1 < len(tried) <= 5
        assert all(math.isfinite(value) for value in values)
    calls = []
    monkeypatch.setattr(generate, "sample_images", lambda *args: calls.append(args))
    again = tmp_path / "again"
    measure(searching(made, out))
    assert calls == []
    monkeypatch.undo()
    assert numbers_of(in_parts(made, again)) == numbers_of(out)
    assert [r["key"] for r in results_of(again)["rows"]] == [r["key"] for r in results["rows"]]


def in_parts(made: Path, out: Path) -> Path:
    """Rounds of two parts and a reduction, until a reduction finds all it needs."""
    for _ in range(8):
        for index in range(2):
            measure(searching(made, out, part=f"{index}/2"))
        try:
            measure(searching(made, out), reduce_only=True)
        except DataError:
            continue
        return out
    raise AssertionError("the search does not end")
