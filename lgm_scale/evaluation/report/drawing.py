"""What all pictures share: colours for light and dark surroundings, axes, names beside points."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

SIZE = 10
LETTER, LINE = 0.62, 1.25
"""Mean width and height of the type, as a share of its size."""
ASIDE, NEAR, STEP, TRIES = 4, 7, 13, 6
"""Points of type: beside a mark, above it, between two places; and how many there are."""


@dataclass(frozen=True)
class Theme:
    """Colours of one surrounding, as #rrggbb; the page has the same."""

    name: str
    page: str
    paper: str
    ink: str
    muted: str
    rule: str
    accent: str
    second: str
    lightness: float
    """Lightness (of hue, lightness, saturation) of the colours that tell clusters apart."""


LIGHT = Theme(
    "light", "#f6f5f2", "#ffffff", "#1c1f26", "#626a76", "#dcdbd6", "#2867a8", "#c0531b", 0.56
)
DARK = Theme(
    "dark", "#14161a", "#1c1f25", "#e9e8e4", "#a0a7b2", "#3a3f48", "#7fb5ea", "#f09a5f", 0.62
)


def to_png(figure: Figure, theme: Theme) -> bytes:
    """Render a figure at its own resolution on the theme's paper."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=figure.dpi, facecolor=theme.paper)
    return buffer.getvalue()


def dress(axes: Axes, theme: Theme) -> None:
    """Give axes their common looks: horizontal rules behind the data, and two spines."""
    axes.grid(axis="y", color=theme.rule, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.rule)


# --- names beside points ----------------------------------------------------------------------


class NamedPoint(NamedTuple):
    """A point in the data's coordinates, and what it is called."""

    x: float
    y: float
    name: str


def name_points(axes: Axes, points: Sequence[NamedPoint], theme: Theme) -> None:
    """Write the names. The axes' limits must be final; what is far off gets a thin line.

    Earlier points get the nearer places. No name stands on a mark, on another name or on a line
    that is drawn in the axes, as long as there is a place that is free of them.
    """
    scale = axes.get_figure(root=True).dpi / 72  # type: ignore[union-attr]  # it is on a figure
    taken = [_mark_box(*_place(axes, point), 4 * scale) for point in points]
    lines = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]

    def free(box: Bbox) -> bool:
        crossed = any(line.intersects_bbox(box, filled=False) for line in lines)
        return not crossed and not any(box.overlaps(other) for other in taken)

    for point in points:
        across, up = _place(axes, point)
        x, y, name = point
        places = [(_text_box(across, up, *where, name, scale), *where) for where in _offsets()]
        inside = [place for place in places if _is_within(place[0], axes)] or places
        box, side, offset = next((place for place in inside if free(place[0])), inside[0])
        taken.append(box)
        line: dict[str, Any] = {"arrowstyle": "-", "color": theme.muted, "linewidth": 0.7}
        axes.annotate(
            name, (x, y), xytext=(side * ASIDE, offset), textcoords="offset points",
            color=theme.ink, size=SIZE, ha="left" if side > 0 else "right",
            arrowprops=line if abs(offset) > NEAR + SIZE else None,
        )  # fmt: skip


def _offsets() -> list[tuple[int, float]]:
    """Side of a text (1 right, -1 left), and distance of its base line from its mark in points.

    Above, below, further above, ...; on the right, and where all of those are taken on the left.
    """
    above = [float(NEAR + i * STEP) for i in range(TRIES)]
    below = [-NEAR - SIZE + 1 - i * STEP for i in range(TRIES)]
    heights = [offset for pair in zip(above, below, strict=True) for offset in pair]
    near, far = heights[:2], heights[2:]
    return [(side, height) for part in (near, far) for side in (1, -1) for height in part]


def _text_box(x: float, y: float, side: int, offset: float, name: str, scale: float) -> Bbox:
    """Where a name would stand, in pixels."""
    width = len(name) * LETTER * SIZE * scale
    left = x + side * ASIDE * scale - (width if side < 0 else 0)
    return Bbox.from_bounds(left, y + (offset - 0.2 * SIZE) * scale, width, LINE * SIZE * scale)


def _is_within(box: Bbox, axes: Axes) -> bool:
    """Whether a name stands right of and above the axes' own labels, and inside the picture."""
    inner, outer = axes.bbox, axes.get_figure(root=True).bbox  # type: ignore[union-attr]
    return inner.x0 <= box.x0 and inner.y0 <= box.y0 and box.x1 <= outer.x1


def _place(axes: Axes, point: NamedPoint) -> tuple[float, float]:
    """Where a mark is, in pixels."""
    across, up = axes.transData.transform((point.x, point.y))
    return float(across), float(up)


def _mark_box(x: float, y: float, radius: float) -> Bbox:
    return Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius)
