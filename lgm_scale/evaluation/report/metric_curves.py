"""Metrics of reconstructions over the number of tokens, one panel each."""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lgm_scale.evaluation.report.theme import Theme

__all__ = ["metric_curves"]

PER_ROW = 2
WIDTH, HEIGHT, TOP = 5.4, 3.5, 0.55  # inches, of a panel and of the title


def metric_curves(
    rows: list[dict[str, Any]], labels: dict[str, str], title: str, theme: Theme
) -> Figure:
    """Draw each metric over K.

    Args:
        rows: With num_tokens and every metric, in the order of num_tokens.
        labels: Metric -> its name above its panel.
        title: Above all.
        theme: Colours.
    """
    columns = min(PER_ROW, len(labels))
    panel_rows = -(-len(labels) // columns)
    width, height = WIDTH * columns, HEIGHT * panel_rows + TOP
    figure = Figure(figsize=(width, height), dpi=160)
    figure.text(0.03, 1 - 0.33 / height, title, color=theme.ink, size=14, va="center")
    for index, (name, label) in enumerate(labels.items()):
        row, column = divmod(index, columns)
        left = (column * WIDTH + 0.75) / width
        bottom = ((panel_rows - 1 - row) * HEIGHT + 0.65) / height
        axes = figure.add_axes((left, bottom, (WIDTH - 1.05) / width, (HEIGHT - 1.45) / height))
        _panel(axes, rows, name, label, theme)
    return figure


def _panel(axes: Axes, rows: list[dict[str, Any]], name: str, label: str, theme: Theme) -> None:
    lengths = [row["num_tokens"] for row in rows]
    axes.plot(
        lengths, [row[name] for row in rows], marker="o", markersize=6, linewidth=1.8,
        color=theme.accent,
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(k) for k in lengths])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.06, y=0.12)
    axes.set_xlabel("K, tokens per image", size=11, color=theme.ink)
    axes.set_title("\n".join(textwrap.wrap(label, 52)), color=theme.ink, size=11.5, loc="left")
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(axis="y", color=theme.rule, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.tick_params(colors=theme.muted, labelsize=10)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.rule)
