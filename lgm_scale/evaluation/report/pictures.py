"""Grids of images with labels, pixel for pixel: samples and reconstructions."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from lgm_scale.evaluation.report.drawing import Theme

ACROSS = 20
"""Columns of a grid of samples, at most."""
TILE = 128  # least side of an image in the picture, in pixels
GAP = 6
MARGIN = 24
DPI = 100
MIN_LETTER = 20  # height of the type, in pixels ...
LETTER_SHARE = 0.0118  # ... and as a share of the width: wide pictures are shown smaller


def image_grid(
    rows: list[np.ndarray], row_labels: list[str], column_labels: list[str], theme: Theme
) -> Figure:
    """Draw rows of images; small ones are enlarged by a whole factor, without smoothing.

    Shapes: rows uint8 [n, 3, S, S] each, for n column labels. Lines of a row label after the first
    are set smaller, column labels slanted where they would touch.
    """
    side = rows[0].shape[-1]
    factor = max(1, -(-TILE // side))
    tile = side * factor
    pitch = tile + GAP
    height_px = max(MIN_LETTER, LETTER_SHARE * (len(column_labels) + 1.5) * pitch)
    font = height_px * 72 / DPI
    letter = height_px * 0.6  # mean width
    longest = max(len(label) for label in column_labels) * letter
    slanted = longest > pitch
    left = int(MARGIN + 20 + max(len(line) for r in row_labels for line in r.split("\n")) * letter)
    top = int(MARGIN + 12 + (longest * 0.64 + 16 if slanted else 8 + height_px))
    width = left + len(column_labels) * pitch - GAP
    if slanted:
        starts = [left + j * pitch + tile * 0.35 for j in range(len(column_labels))]
        ends = [x + len(t) * letter * 0.77 for x, t in zip(starts, column_labels, strict=True)]
        width = max(width, int(max(ends)))
    width += MARGIN
    height = top + len(rows) * pitch - GAP + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    canvas = np.zeros((height, width, 4), dtype=np.uint8)
    for i, images in enumerate(rows):
        for j, image in enumerate(images):
            _paste(canvas, image, factor, top + i * pitch, left + j * pitch)
    axes.imshow(canvas, extent=(0, width, height, 0), interpolation="none", aspect="auto")
    for i, label in enumerate(row_labels):
        head, *rest = label.split("\n")
        y, x = top + i * pitch + tile / 2, left - 20
        up = height_px * 0.65 if rest else 0
        axes.text(x, y - up, head, color=theme.ink, size=font * 1.1, ha="right", va="center")
        for line in rest:
            axes.text(x, y + up, line, color=theme.muted, size=font, ha="right", va="center")
    for j, label in enumerate(column_labels):
        x = left + j * pitch + tile / 2
        text = axes.text(x, top - 10, label, color=theme.ink, size=font, va="bottom")
        if slanted:
            text.set(rotation=40, rotation_mode="anchor", ha="left", x=x - tile * 0.15)
        else:
            text.set(ha="center")
    return figure


def _paste(canvas: np.ndarray, image: np.ndarray, factor: int, y: int, x: int) -> None:
    """Put an image [3, S, S] onto an RGBA canvas, every pixel as a square of factor x factor."""
    big = image.transpose(1, 2, 0).repeat(factor, axis=0).repeat(factor, axis=1)
    place = canvas[y : y + len(big), x : x + len(big)]
    place[..., :3], place[..., 3] = big, 255


def contact_sheet(images: np.ndarray, across: int = 10) -> bytes:
    """Images row by row, transparent between them, pixel for pixel: a PNG.

    Shapes: uint8 [M, 3, S, S].
    """
    side = images.shape[-1]
    factor = max(1, -(-TILE // side))
    tile, across = side * factor, min(across, len(images))
    down = -(-len(images) // across)
    size = (down * (tile + GAP) - GAP, across * (tile + GAP) - GAP)
    canvas = np.zeros((*size, 4), dtype=np.uint8)
    for i, image in enumerate(images):
        _paste(canvas, image, factor, i // across * (tile + GAP), i % across * (tile + GAP))
    data = io.BytesIO()
    Image.fromarray(canvas, "RGBA").save(data, "png", optimize=True)
    return data.getvalue()
