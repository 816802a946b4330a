"""Metrics as curves: samples over work and speed, and reconstructions over the number of tokens."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lgm_scale.evaluation.metrics.catalogue import METRICS
from lgm_scale.evaluation.report.drawing import NamedPoint, Theme, dress, name_points

PUBLISHED_NAME = "gFID-50K"
"""Published points stand beside this metric and no other."""
MARKERS = "oDs^vP*X"
_WIDE = 4
"""Above this ratio of its ends, an axis has labels enough without those of every minor tick."""
DASHES = ("-", (0, (6, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""Two lines have colours of their own; the next pair is dashed."""
PANELS_PER_ROW = 2
WIDTH, HEIGHT, TOP = 5.4, 3.5, 0.55  # inches, of a panel and of the title


@dataclass(frozen=True)
class PublishedPoint:
    """One published generator: gFID-50K, work per image with decoder, speed if it was given."""

    label: str
    fid: float
    tflops: float
    images_per_second: float | None = None
    """On one RTX 3090 in float32."""
    above: bool = False
    left: bool = False
    """Where its name stands beside the marker of its operations, so that names do not overlap."""


# Published generators, for hollow markers beside measured ones; none of these numbers is ours.
# Source: LGM (Lee and Hong 2026, arXiv 2606.20076), its tables of ImageNet 256x256, 50 000 samples,
# ADM's reference; the other methods' numbers are those their own authors give. ELIT's are left out:
# those of its release are without guidance and by an evaluator of its own, and would be misread
# beside guided ones by ADM's.
POINTS = (
    PublishedPoint("LGM-XL, K = 32, 25 steps", 2.89, 1.08, 6.12),
    PublishedPoint("LGM-XL, K = 128, 25 steps", 2.03, 2.88, 1.95),
    PublishedPoint("LGM-XL, K = 32, 100 steps", 2.54, 4.33, 2.04),
    PublishedPoint("LGM-XL, K = 128, 100 steps", 1.86, 11.51, 0.36, left=True),
    PublishedPoint("SoftVQ-B-32", 2.51, 10.8),
    PublishedPoint("Semanticist-L-32", 2.57, 11.2, above=True),
    PublishedPoint("FlexTok d18-d18", 2.02, 7.45, above=True),
)


class _Line(NamedTuple):
    label: str
    rows: list[dict[str, Any]]


def main_metric(rows: Sequence[dict[str, Any]]) -> str | None:
    """The first distance that all rows have."""
    keys = [key for key, metric in METRICS.items() if metric.needs == "statistics"]
    return next((key for key in keys if all(key in row["metrics"] for row in rows)), None)


def _lines(rows: Sequence[dict[str, Any]]) -> list[_Line]:
    """Rows that differ in K and guidance scale alone are one line."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cell = row["cell"]
        parts = [str(row["run_name"])] if row.get("run_name") else []
        parts.append(f"{cell['num_steps']} points")
        if cell["solver"] != "euler":
            parts.append(cell["solver"])
        if cell["uncond_num_tokens"] is not None:
            weak = "autoguidance" if cell.get("guidance") == "autoguidance" else "uncond"
            parts.append(f"{weak} at {cell['uncond_num_tokens']}")
        if cell["length_schedule"]:
            parts.append("growing")
        groups.setdefault(", ".join(parts), []).append(row)
    return [
        _Line(label, sorted(group, key=lambda row: row["cell"]["num_tokens"]))
        for label, group in groups.items()
    ]


def tradeoff_figure(
    rows: Sequence[dict[str, Any]],
    reconstructions: Sequence[dict[str, Any]],
    theme: Theme,
    narrow: bool = False,
) -> Figure:
    """Two panels: the first distance of the rows against operations, and against images/s.

    The rows were measured alike; `reconstructions`, of the same tokenizer, are the floor. The
    panels stand side by side or, `narrow`, one above the other: for the width of a phone.
    """
    figure = Figure(figsize=(4.6, 8.8), dpi=150) if narrow else Figure(figsize=(12.4, 5.2), dpi=130)
    left = figure.add_axes((0.13, 0.565, 0.83, 0.33) if narrow else (0.065, 0.14, 0.52, 0.72))
    place = (0.13, 0.07, 0.83, 0.4) if narrow else (0.665, 0.14, 0.32, 0.72)
    right = figure.add_axes(place, sharey=left)
    key = main_metric(rows)
    if key is None:
        figure.text(0.5, 0.5, "no distance was measured", color=theme.muted, ha="center", size=12)
        for axes in (left, right):
            axes.set_axis_off()
        return figure
    name = rows[0]["names"][key]
    work = [row["work"]["tflops_per_image"] for row in rows]
    small = max(work) < 0.1
    unit, factor = ("GFLOPs", 1e3) if small else ("TFLOPs", 1.0)
    names: dict[Axes, list[NamedPoint]] = {left: [], right: []}
    for i, line in enumerate(_lines(rows)):
        y = [row["metrics"][key] for row in line.rows]
        style: dict[str, Any] = {
            "marker": MARKERS[i % len(MARKERS)], "markersize": 7, "linewidth": 1.7,
            "color": theme.accent if i % 2 == 0 else theme.second, "label": line.label,
            "linestyle": DASHES[i // 2 % len(DASHES)],
        }  # fmt: skip
        x = [row["work"]["tflops_per_image"] * factor for row in line.rows]
        left.plot(x, y, **style)
        speed = [row["run"]["images_per_second"] for row in line.rows]
        right.plot(speed, y, **style)
        for axes, across in ((left, x), (right, speed)):
            named = zip(across, y, (f"K = {row['cell']['num_tokens']}" for row in line.rows),
                        strict=True)  # fmt: skip
            names[axes] += (NamedPoint(*each) for each in named)
    floor = _floor(rows, reconstructions, key)
    if floor is not None:
        x, y = floor
        left.plot(
            [value * factor for value in x], y, marker="D", markersize=4, linewidth=1.2,
            linestyle=(0, (4, 2)), color=theme.muted, label="reconstructions at the same K",
        )  # fmt: skip
    devices = sorted({name for row in rows for name in row["run"]["devices"]})
    _cost_axis(left, f"{unit} per image (network and decoder)", theme)
    _cost_axis(right, f"images per second on one device ({', '.join(devices)})", theme)
    left.margins(x=0.1)
    right.margins(x=0.16)
    if name == PUBLISHED_NAME:
        _published(left, right, theme)
    left.set_ylim(0, left.get_ylim()[1] * 1.08)
    for axes, points in names.items():
        name_points(axes, points, theme)
    title = f"{name}; lower is better"
    lines, size = (textwrap.wrap(title, 52), 10) if narrow else ([title], 12)
    figure.text(left.get_position().x0, 0.935, "\n".join(lines), color=theme.ink, size=size)
    legend = left.legend(facecolor=theme.paper, edgecolor="none", fontsize=9.5, loc="best")
    for text in legend.get_texts():
        text.set_color(theme.ink)
    return figure


def _floor(
    rows: Sequence[dict[str, Any]], reconstructions: Sequence[dict[str, Any]], key: str
) -> tuple[list[float], list[float]] | None:
    """Work of the samples and distance of the reconstructions, at every K that has both.

    Only where both are compared with the validation images.
    """
    if rows[0]["protocol"]["reference"].get("name") != "validation images":
        return None
    own = {
        row["num_tokens"]: row["metrics"][f"r{key}_val"]
        for row in reconstructions
        if f"r{key}_val" in row["metrics"]
    }
    pairs = sorted(
        (row["work"]["tflops_per_image"], own[row["cell"]["num_tokens"]])
        for row in rows
        if row["cell"]["num_tokens"] in own
    )
    return ([x for x, _ in pairs], [y for _, y in pairs]) if pairs else None


def _published(left: Axes, right: Axes, theme: Theme) -> None:
    style: dict[str, Any] = {
        "s": 42, "facecolors": "none", "edgecolors": theme.muted, "linewidths": 1.3, "zorder": 1,
        "label": "published, not measured by us (speeds: RTX 3090)",
    }  # fmt: skip
    places = {
        left: [(point, point.tflops) for point in POINTS],
        right: [(p, p.images_per_second) for p in POINTS if p.images_per_second is not None],
    }
    for axes, points in places.items():
        axes.scatter([x for _, x in points], [point.fid for point, _ in points], **style)
        for point, x in points:
            to_left = point.left and axes is left
            place = (-7 if to_left else 7, 6 if point.above else -9)
            axes.annotate(
                point.label, (x, point.fid), xytext=place, textcoords="offset points",
                ha="right" if to_left else "left", color=theme.muted, size=8,
            )  # fmt: skip
        axes.set_xlim(right=axes.get_xlim()[1] * 1.5)  # room for the names


def _cost_axis(axes: Axes, label: str, theme: Theme) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.tick_params(which="both", colors=theme.muted, labelsize=9.5, length=3, pad=4)
    low, high = axes.get_xlim()
    axes.xaxis.set_minor_formatter(_sparse if high / low > _WIDE else "{x:.3g}")
    axes.set_xlabel(label, size=10.5, color=theme.ink)
    dress(axes, theme)


def _sparse(value: float, _: float) -> str:
    """Labels of minor ticks at 2 and 5 times a power of ten only."""
    return f"{value:.3g}" if f"{value:e}"[0] in "25" else ""


# --- reconstructions ------------------------------------------------------------------------


def metric_curves(
    rows: list[dict[str, Any]], labels: dict[str, str], title: str, theme: Theme
) -> Figure:
    """Draw each metric over K.

    `rows` are in the order of num_tokens; `labels` names each metric above its panel.
    """
    columns = min(PANELS_PER_ROW, len(labels))
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
    axes.tick_params(colors=theme.muted, labelsize=10)
    dress(axes, theme)
