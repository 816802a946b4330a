"""Pictures, tables and page of a finished sweep, from what it stored; or of several, compared.

    python -m eval.report OUT
    python -m eval.report OUT_A OUT_B ... --to FOLDER

Reads OUT/results.json and OUT/rows, writes results.md, results.csv, tradeoff.png, samples.png (and
one per K), reconstructions.png, merge_tree.png and index.html. No network is run. Several sweeps
are compared in one table only if they were measured alike; else what differs is named.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.evaluation.engine.rows import RowStore
from lgm_scale.evaluation.report.diagrams import merge_tree_figure
from lgm_scale.evaluation.report.page import Pictures, render_page
from lgm_scale.evaluation.report.pictures import contact_sheet, image_grid
from lgm_scale.evaluation.report.theme import DARK, LIGHT, Theme, to_png
from lgm_scale.evaluation.report.tradeoff import main_metric, tradeoff_figure
from lgm_scale.evaluation.sweep.results import (
    comparable,
    differences,
    read_results,
    tables_of,
    to_csv,
    to_markdown,
)
from lgm_scale.families.lgm.data import TREE_NAME
from lgm_scale.merging.tree import MergeTree
from lgm_scale.storage.files import write_whole

__all__ = ["write_comparison", "write_report"]

Results = dict[str, Any]
ACROSS = 20
"""Columns of samples."""


def write_report(out: Path) -> Path:
    """Draw everything anew; return the page. Raises: DataError if `out` holds no sweep."""
    results = read_results(out)
    rows = RowStore(out / "rows")
    figures = {"tradeoff": _tradeoff(results), "samples": _samples(results, rows)}
    if results["reconstructions"]:
        figures["reconstructions"] = _reconstructions(results, rows)
    if results.get("merge_tree", True):
        figures["merge_tree"] = _merge_tree(results, rows)
    pictures: Pictures = {}
    for name, draw in figures.items():
        light, dark = (to_png(draw(theme), theme) for theme in (LIGHT, DARK))
        pictures[name] = (light, dark)
        write_whole(out / f"{name}.png", light)
    sheets = {}
    for num_tokens, row in _best_rows(results).items():
        sheets[num_tokens] = contact_sheet(rows.pictures(row["key"])["images"])
        write_whole(out / f"samples_k{num_tokens:04d}.png", sheets[num_tokens])
    return _write(out, results, pictures, sheets)


def _write(out: Path, results: Results, pictures: Pictures, sheets: dict[int, bytes]) -> Path:
    write_whole(out / "results.md", to_markdown(results).encode())
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


def _samples(results: Results, rows: RowStore) -> Any:
    def draw(theme: Theme) -> Figure:
        classes = results["classes"][:ACROSS]
        best = _best_rows(results)
        images = [rows.pictures(row["key"])["images"] for row in best.values()]
        across = min(len(classes), *(len(each) for each in images))
        return image_grid(
            [each[:across] for each in images],
            [f"K = {k}" for k in best],
            _readable(classes[:across]),
            theme,
        )

    return draw


def _reconstructions(results: Results, rows: RowStore) -> Any:
    def draw(theme: Theme) -> Figure:
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

    return draw


def _merge_tree(results: Results, rows: RowStore) -> Any:
    def draw(theme: Theme) -> Figure:
        tree = MergeTree.load(rows.folder / TREE_NAME)
        return merge_tree_figure(tree, list(_best_rows(results)), theme)

    return draw


def _tradeoff(results: Results) -> Any:
    return lambda theme: tradeoff_figure(results["rows"], results["reconstructions"], theme)


def _readable(classes: list[str]) -> list[str]:
    return [name.replace("_", " ") for name in classes]


# --- several sweeps ---------------------------------------------------------------------------


def write_comparison(outs: list[Path], to: Path) -> Path:
    """One table and one picture of several sweeps; return the page.

    Raises: ConfigError naming what differs, if they were not measured alike.
    """
    found = [read_results(out) for out in outs]
    first = comparable(found[0]["rows"][0])
    problems = []
    for out, results in zip(outs[1:], found[1:], strict=True):
        for row in results["rows"]:
            differing = differences(first, comparable(row))
            if differing:
                problems.append(
                    f"{out} was not measured like {outs[0]}, and their numbers do not compare: "
                    + "; ".join(differing)
                )
                break
        ours, theirs = len(found[0]["classes"]), len(results["classes"])
        if ours != theirs:
            problems.append(
                f"{out} was not measured like {outs[0]}, and their numbers do not compare: "
                f"number of classes: {ours} against {theirs}"
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
    pictures: Pictures = {}
    light, dark = (to_png(tradeoff_figure(rows, [], t), t) for t in (LIGHT, DARK))
    pictures["tradeoff"] = (light, dark)
    write_whole(to / "tradeoff.png", light)
    return _write(to, merged, pictures, {})


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


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report",
        description="Draw the report of a finished sweep again, or compare several.",
    )
    parser.add_argument("outs", nargs="+", metavar="OUT", help="`out` folder of a sweep")
    parser.add_argument("--to", metavar="FOLDER", help="for the comparison of several sweeps")
    args = parser.parse_args(sys.argv[1:])
    outs = [Path(out) for out in args.outs]
    if len(outs) == 1 and args.to is None:
        print(f"report: {write_report(outs[0])}")
        return 0
    if len(outs) == 1 or args.to is None:
        raise ConfigError("--to: goes with two or more sweeps, and they need it")
    print(f"comparison: {write_comparison(outs, Path(args.to))}")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
