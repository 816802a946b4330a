"""Pictures and page of a finished sweep, from what it stored.

    python -m eval.report OUT

Reads OUT/results.json and OUT/cells, writes samples.png, reconstructions.png, merge_tree.png,
tradeoff.png and index.html into OUT. No network is run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eval.cells import Cells
from eval.diagrams import merge_tree_figure, tradeoff_figure
from eval.page import render_page
from eval.pictures import image_grid
from eval.theme import DARK, LIGHT, Theme, to_png
from lgm_scale.data.latents import TREE_NAME
from lgm_scale.errors import DataError, exit_on_user_error
from lgm_scale.merging import MergeTree

__all__ = ["write_report"]


def write_report(out: Path) -> Path:
    """Draw everything anew; return the page. Raises: DataError if `out` holds no sweep."""
    results = _read_results(out)
    cells = Cells(out / "cells")
    pictures: dict[str, tuple[bytes, bytes]] = {}
    for name, draw in _FIGURES.items():
        light, dark = (to_png(draw(results, cells, theme), theme) for theme in (LIGHT, DARK))
        pictures[name] = (light, dark)
        _write(out / f"{name}.png", light)
    page = out / "index.html"
    _write(page, render_page(results, pictures).encode())
    return page


def _read_results(out: Path) -> dict[str, Any]:
    path = out / "results.json"
    if not path.is_file():
        raise DataError(f"{path} is missing: give the `out` folder of a finished eval/sweep.py")
    try:
        results = json.loads(path.read_text())
        if results["format"] != "lgm_scale.sweep":
            raise ValueError(f"format {results['format']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); run the sweep again") from error
    return results


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_bytes(data)
    aside.replace(path)


def _lengths(results: dict[str, Any]) -> list[int]:
    return sorted(row["num_tokens"] for row in results["rows"])


def _samples(results: dict[str, Any], cells: Cells, theme: Theme) -> Figure:
    lengths = _lengths(results)
    rows = [cells.images(f"samples_k{k:04d}")["images"] for k in lengths]
    classes = results["classes"][: len(rows[0])]
    return image_grid(rows, [f"K = {k}" for k in lengths], _readable(classes), theme)


def _reconstructions(results: dict[str, Any], cells: Cells, theme: Theme) -> Figure:
    by_length = {row["num_tokens"]: row["reconstructions"] for row in results["rows"]}
    found = {k: cells.images(f"reconstructions_k{k:04d}") for k in sorted(by_length)}
    first = next(iter(found.values()))
    labels = [f"K = {k}\n{by_length[k]['psnr_db']:.1f} dB" for k in found]
    return image_grid(
        [first["originals"], *(images["images"] for images in found.values())],
        ["original", *labels],
        _readable([results["classes"][i] for i in first["labels"]]),
        theme,
    )


def _merge_tree(results: dict[str, Any], cells: Cells, theme: Theme) -> Figure:
    tree = MergeTree.load(cells.folder / TREE_NAME)
    return merge_tree_figure(tree, _lengths(results), theme)


def _tradeoff(results: dict[str, Any], cells: Cells, theme: Theme) -> Figure:
    return tradeoff_figure(results["rows"], results["distance"]["label"], theme)


def _readable(classes: list[str]) -> list[str]:
    return [name.replace("_", " ") for name in classes]


_FIGURES = {
    "samples": _samples,
    "reconstructions": _reconstructions,
    "merge_tree": _merge_tree,
    "tradeoff": _tradeoff,
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report", description="Draw the report of a finished sweep again."
    )
    parser.add_argument("out", help="the sweep's `out` folder")
    print(f"report: {write_report(Path(parser.parse_args(sys.argv[1:]).out))}")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
