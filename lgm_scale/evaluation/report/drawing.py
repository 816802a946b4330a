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
"""Points of type: to the right of a mark, above it, between two places; and how many there are."""


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

    Earlier points get the nearer places.
    """
    scale = axes.get_figure(root=True).dpi / 72  # type: ignore[union-attr]  # it is on a figure
    taken = [_mark_box(*_place(axes, point), 4 * scale) for point in points]
    for point in points:
        across, up = _place(axes, point)
        x, y, name = point
        places = [(_text_box(across, up, offset, name, scale), offset) for offset in _offsets()]
        inside = [place for place in places if axes.bbox.y0 <= place[0].y0] or places
        free = (place for place in inside if not any(place[0].overlaps(box) for box in taken))
        box, offset = next(free, inside[0])
        taken.append(box)
        line: dict[str, Any] = {"arrowstyle": "-", "color": theme.muted, "linewidth": 0.7}
        axes.annotate(
            name, (x, y), xytext=(ASIDE, offset), textcoords="offset points", color=theme.ink,
            size=SIZE, arrowprops=line if abs(offset) > NEAR + SIZE else None,
        )  # fmt: skip


def _offsets() -> list[float]:
    """Distances of a text's base line from its mark, in points: above, below, further above, ..."""
    above = [float(NEAR + i * STEP) for i in range(TRIES)]
    below = [-NEAR - SIZE + 1 - i * STEP for i in range(TRIES)]
    return [offset for pair in zip(above, below, strict=True) for offset in pair]


def _text_box(x: float, y: float, offset: float, name: str, scale: float) -> Bbox:
    """Where a name would stand, in pixels."""
    left, bottom = x + ASIDE * scale, y + (offset - 0.2 * SIZE) * scale
    return Bbox.from_bounds(left, bottom, len(name) * LETTER * SIZE * scale, LINE * SIZE * scale)


def _place(axes: Axes, point: NamedPoint) -> tuple[float, float]:
    """Where a mark is, in pixels."""
    across, up = axes.transData.transform((point.x, point.y))
    return float(across), float(up)


def _mark_box(x: float, y: float, radius: float) -> Bbox:
    return Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius)
