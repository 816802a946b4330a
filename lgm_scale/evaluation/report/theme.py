"""Colours and sizes that pictures and page share, for light and for dark surroundings."""

from __future__ import annotations

import io
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["DARK", "LIGHT", "Theme", "to_png"]


@dataclass(frozen=True)
class Theme:
    """Colours, as #rrggbb."""

    name: str
    page: str
    paper: str
    ink: str
    muted: str
    rule: str
    accent: str
    second: str
    lightness: float
    """Of the colours that tell clusters apart."""


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
