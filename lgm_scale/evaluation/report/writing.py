"""Write the report of a finished sweep, from what it stored; or of several, compared.

No network is run: numbers come from results.json, pictures and tree from the folder of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.engine.rows import RowStore, read_results
from lgm_scale.evaluation.report.curves import main_metric, tradeoff_figure
from lgm_scale.evaluation.report.drawing import DARK, LIGHT, Theme, to_png
from lgm_scale.evaluation.report.merge_tree import merge_tree_figure
from lgm_scale.evaluation.report.page import Picture, render_markdown, render_page
from lgm_scale.evaluation.report.pictures import ACROSS, contact_sheet, image_grid
from lgm_scale.evaluation.report.tables import to_csv
from lgm_scale.evaluation.sweep.results import comparable, differences, tables_of
from lgm_scale.merging.tree import TREE_NAME, MergeTree
from lgm_scale.storage.files import write_whole

Results = dict[str, Any]


def write_report(out: Path) -> Path:
    """Draw everything anew; return the page. Raises: DataError if `out` holds no sweep."""
    results, rows = read_results(out), RowStore(out / "rows")
    best = _best_rows(results)
    samples = {k: rows.pictures(row["key"])["images"] for k, row in best.items()}
    figures: dict[str, Callable[..., Figure]] = {
        "tradeoff": partial(tradeoff_figure, results["rows"], results["reconstructions"]),
        "samples": lambda theme: _samples(results["classes"], samples, theme),
    }
    if results["reconstructions"]:
        figures["reconstructions"] = lambda theme: _reconstructions(results, rows, theme)
    if results.get("merge_tree", True):
        tree = MergeTree.load(rows.folder / TREE_NAME)
        figures["merge_tree"] = lambda theme: merge_tree_figure(tree, list(best), theme)
    sheets = {k: contact_sheet(images) for k, images in samples.items()}
    for k, sheet in sheets.items():
        write_whole(out / f"samples_k{k:04d}.png", sheet)
    return _write(out, results, figures, sheets)


def _write(
    out: Path,
    results: Results,
    figures: dict[str, Callable[..., Figure]],
    sheets: dict[int, bytes],
) -> Path:
    pictures = {}
    for name, draw in figures.items():
        pictures[name] = Picture(*(to_png(draw(theme), theme) for theme in (LIGHT, DARK)))
        write_whole(out / f"{name}.png", pictures[name].light)
    tall = partial(figures["tradeoff"], narrow=True)
    pictures["tradeoff_narrow"] = Picture(*(to_png(tall(theme), theme) for theme in (LIGHT, DARK)))
    write_whole(out / "results.md", render_markdown(results).encode())
    write_whole(out / "results.csv", to_csv(results).encode())
    page = out / "index.html"
    write_whole(page, render_page(results, pictures, sheets).encode())
    return page


def _best_rows(results: Results) -> dict[int, dict[str, Any]]:
    """The row with the smallest distance at every K."""
    key, best = main_metric(results["rows"]), {}
    for row in results["rows"]:
        k = row["cell"]["num_tokens"]
        if k not in best or (key and row["metrics"][key] < best[k]["metrics"][key]):
            best[k] = row
    return dict(sorted(best.items()))


def _samples(classes: list[str], samples: dict[int, np.ndarray], theme: Theme) -> Figure:
    """One column per class and one row per K, whose images [M, 3, S, S] begin with one of each."""
    across = min(ACROSS, len(classes), *(len(images) for images in samples.values()))
    return image_grid(
        [images[:across] for images in samples.values()],
        [f"K = {k}" for k in samples],
        _readable(classes[:across]),
        theme,
    )


def _reconstructions(results: Results, rows: RowStore, theme: Theme) -> Figure:
    by_length = {row["num_tokens"]: row for row in results["reconstructions"]}
    found = {k: rows.pictures(row["key"]) for k, row in sorted(by_length.items())}
    first = next(iter(found.values()))
    labels = [f"K = {k}\n{by_length[k]['metrics']['psnr_db']:.1f} dB" for k in found]
    return image_grid(
        [first["originals"], *(images["images"] for images in found.values())],
        ["original", *labels],
        _readable([results["classes"][i] for i in first["labels"]]),
        theme,
    )


def _readable(classes: list[str]) -> list[str]:
    return [name.replace("_", " ") for name in classes]


# --- several sweeps ---------------------------------------------------------------------------


def write_comparison(outs: list[Path], to: Path) -> Path:
    """One table and one picture of several sweeps; return the page.

    Raises: ConfigError naming what differs, if they were not measured alike.
    """
    found = [read_results(out) for out in outs]
    problems = []
    for out, results in zip(outs[1:], found[1:], strict=True):
        for differing in _differences(found[0], results):
            problems.append(
                f"{out} was not measured like {outs[0]}, and their numbers do not compare: "
                f"{differing}"
            )
    for out, results in zip(outs, found, strict=True):
        if len(tables_of(results["rows"])) > 1:
            problems.append(f"{out} holds final rows of several protocols; run it again")
    if problems:
        raise ConfigError(problems)
    names = _short_names(outs)
    rows = []
    for name, results in zip(names, found, strict=True):
        for row in results["rows"]:
            rows.append(row | {"label": f"{name}: {row['label']}", "run_name": name})
    merged = found[0] | {
        "rows": rows,
        "searched": [],
        "reconstructions": [],
        "off": _off(names, found),
        "compared": {n: str(o) for n, o in zip(names, outs, strict=True)},
    }
    return _write(to, merged, {"tradeoff": partial(tradeoff_figure, rows, [])}, {})


def _differences(first: Results, other: Results) -> Iterator[str]:
    """How another sweep was measured otherwise: the first row that shows it, and the classes."""
    alike = comparable(first["rows"][0])
    rows = (differences(alike, comparable(row)) for row in other["rows"])
    if differing := next(filter(None, rows), None):
        yield "; ".join(differing)
    ours, theirs = len(first["classes"]), len(other["classes"])
    if ours != theirs:
        yield f"number of classes: {ours} against {theirs}"


def _off(names: list[str], found: list[Results]) -> dict[str, str]:
    """Lines about metrics that are off, of all sweeps; their reconstructions are not shown here."""
    lines = {}
    for name, results in zip(names, found, strict=True):
        for key, line in results["off"].items():
            if key != "reconstructions":
                lines[f"{name}: {key}"] = f"{name}: {line}"
    return lines


def _short_names(outs: list[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart."""
    parts = [out.resolve().parts for out in outs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"sweeps: {', '.join(map(str, outs))} name one folder twice; name each once")
