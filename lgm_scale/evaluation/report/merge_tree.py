"""The merge tree: its dendrogram, and the clusters at every K."""

from __future__ import annotations

import colorsys
import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lgm_scale.evaluation.report.drawing import Theme
from lgm_scale.merging.tree import MergeTree

PANELS_PER_ROW = 6


def _colour(hue: float, theme: Theme, saturation: float = 0.55) -> tuple[float, float, float]:
    return colorsys.hls_to_rgb(hue % 1.0, theme.lightness, saturation)


def _block_colours(count: int, theme: Theme) -> list[tuple[float, float, float]]:
    return [_colour(0.58 + i * 0.618, theme) for i in range(count)]


def merge_tree_figure(tree: MergeTree, lengths: list[int], theme: Theme) -> Figure:
    """Dendrogram over the base tokens with the cuts of each K, and below it the clusters.

    The clusters are shown on the token grid (row by row) where N is a square.
    """
    size = tree.num_base_tokens
    square = math.isqrt(size) ** 2 == size
    panel_rows = -(-len(lengths) // PANELS_PER_ROW) if square else 0
    columns = min(len(lengths), PANELS_PER_ROW)
    height = 4.4 + 2.9 * panel_rows
    figure = Figure(figsize=(11.0, height), dpi=160)
    top = figure.add_axes((0.075, 1 - 3.75 / height, 0.845, 3.35 / height))
    _dendrogram(top, tree, sorted(lengths), theme)
    pitch = 0.90 / max(columns, 3)
    for i, k in enumerate(sorted(lengths) if square else []):
        row, column = divmod(i, PANELS_PER_ROW)
        across = min(2.25 / 11.0, pitch * 0.9)
        left = 0.5 + (column - (columns - 1) / 2) * pitch - across / 2
        bottom = (0.25 + 2.9 * (panel_rows - 1 - row)) / height
        axes = figure.add_axes((left, bottom, across, across * 11.0 / height))
        _clusters(axes, tree, k, theme)
    return figure


def _dendrogram(axes: Axes, tree: MergeTree, lengths: list[int], theme: Theme) -> None:
    size, blocks = tree.num_base_tokens, tree.num_blocks
    merges = tree.merges.numpy()[: size - blocks]  # the rest join whole blocks
    heights = tree.heights.numpy()[: size - blocks].clip(min=0)
    colours = _block_colours(blocks, theme)
    x, y = _leaf_positions(tree), np.zeros(size)
    x, y = np.concatenate((x, np.zeros(len(merges)))), np.concatenate((y, heights))
    block = np.concatenate((np.arange(size) // (size // blocks), np.zeros(len(merges), int)))
    lines, line_colours = [], []
    for i, (a, b) in enumerate(merges):
        node = size + i
        x[node], block[node] = (x[a] + x[b]) / 2, block[a]
        lines.append([(x[a], y[a]), (x[a], y[node]), (x[b], y[node]), (x[b], y[b])])
        line_colours.append(colours[block[a]])
    axes.add_collection(LineCollection(lines, colors=line_colours, linewidths=1.3))
    ceiling = max(float(heights.max()), 1e-3) * 1.08
    _cuts(axes, heights, ceiling, size, lengths, theme)
    axes.set_xlim(x[:size].min() - 1.5, x[:size].max() + 1.5)
    axes.set_ylim(-0.04 * ceiling, ceiling)
    for i in range(blocks):
        centre = x[:size][block[:size] == i].mean()
        axes.text(
            centre, -0.065 * ceiling, f"block {i}", color=colours[i], size=11, ha="center", va="top"
        )
    axes.set_ylabel("merge height\n(1 - cosine similarity)", color=theme.ink, size=11)
    axes.tick_params(axis="y", colors=theme.muted, labelsize=10)
    axes.set_xticks([])
    axes.set_facecolor("none")
    for name, spine in axes.spines.items():
        spine.set_visible(name == "left")
        spine.set_color(theme.rule)
    axes.set_title(
        f"One tree over {size} tokens; every K is a cut of it",
        color=theme.ink, size=13, loc="left", pad=10,
    )  # fmt: skip


def _leaf_positions(tree: MergeTree) -> np.ndarray:
    """Horizontal place of each leaf: children with the smaller first member on the left."""
    size = tree.num_base_tokens
    merges = tree.merges.tolist()
    first = list(range(size))
    for a, b in merges:
        first.append(min(first[a], first[b]))
    order: list[int] = []
    waiting = [2 * size - 2]
    while waiting:
        node = waiting.pop()
        if node < size:
            order.append(node)
        else:
            waiting += sorted(merges[node - size], key=lambda child: -first[child])
    places = np.empty(size)
    gap = max(1.0, size / 40)
    places[order] = [i + gap * (leaf // (size // tree.num_blocks)) for i, leaf in enumerate(order)]
    return places


def _cuts(
    axes: Axes, heights: np.ndarray, ceiling: float, size: int, lengths: list[int], theme: Theme
) -> None:
    """A dashed line per K between the last merge made and the first one not made."""
    edges = np.concatenate(([0.0], heights, [ceiling]))
    levels = {k: (edges[size - k] + edges[size - k + 1]) / 2 for k in lengths}
    levels = {k: -0.02 * ceiling if k == size else level for k, level in levels.items()}
    place = -math.inf
    for k in sorted(lengths, reverse=True):
        axes.axhline(levels[k], color=theme.muted, linewidth=1.0, linestyle=(0, (5, 3)))
        place = max(levels[k], place + 0.075 * ceiling)  # labels never touch
        axes.annotate(
            f"K = {k}",
            xy=(1.0, levels[k]), xycoords=("axes fraction", "data"),
            xytext=(1.018, place), textcoords=("axes fraction", "data"),
            color=theme.ink, size=11, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": theme.muted, "linewidth": 0.8},
        )  # fmt: skip


def _clusters(axes: Axes, tree: MergeTree, num_tokens: int, theme: Theme) -> None:
    """Tokens of one cluster in one colour; a token that is alone is grey."""
    assignment = tree.assignment(num_tokens)
    labels, sizes = assignment.labels.numpy(), assignment.sizes.numpy()
    per_block = len(labels) // tree.num_blocks
    colours: dict[int, Any] = {}
    for start in range(0, len(labels), per_block):
        joined = [j for j in np.unique(labels[start : start + per_block]) if sizes[j] > 1]
        offset = 0.37 * (start // per_block)
        for i, j in enumerate(joined):
            colours[int(j)] = _colour(offset + i / len(joined), theme, 0.55 if i % 2 else 0.75)
    side = math.isqrt(len(labels))
    grid = labels.reshape(side, side)
    for r, c in np.ndindex(side, side):
        colour = colours.get(int(grid[r, c]), theme.rule)
        right = c + 1 < side and grid[r, c + 1] == grid[r, c]
        below = r + 1 < side and grid[r + 1, c] == grid[r, c]
        parts = [(1.0 if right else 0.9, 0.9), (0.9, 1.0 if below else 0.9)]
        if right and below and grid[r + 1, c + 1] == grid[r, c]:
            parts = [(1.0, 1.0)]
        for wide, high in parts:
            axes.add_patch(Rectangle((c, r), wide, high, facecolor=colour, linewidth=0))
    axes.set_xlim(0, side - 0.1)
    axes.set_ylim(side - 0.1, 0)
    axes.set_aspect("equal")
    axes.set_axis_off()
    alone = int((sizes == 1).sum())
    note = (
        "every token alone"
        if alone == len(labels)
        else f"largest {sizes.max()}, {alone or 'none'} alone"
    )
    axes.set_title(f"K = {num_tokens}", color=theme.ink, size=12, pad=20)
    axes.text(0.5, 1.03, note, transform=axes.transAxes, color=theme.muted, size=9.5, ha="center")
