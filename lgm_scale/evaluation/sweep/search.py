"""The guidance scale searched as the field does: few images, rising scales, an early stop.

Cells that differ in nothing but the scale are a line. Its scales are tried from the smallest on,
until it is plain that guidance went too far. All lines advance at once. Then, for every token
count and solver, the best cell of all its lines is run on the full number of images.

What comes next depends on finished rows alone: a search goes on where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lgm_scale.evaluation.sweep.config import Cell, SearchConfig

Metrics = Mapping[str, Any]


def _lines(cells: Sequence[Cell]) -> list[list[Cell]]:
    lines: dict[Cell, list[Cell]] = {}
    for cell in cells:
        common = Cell(cell.num_tokens, replace(cell.sampler, cfg_scale=1.0))
        lines.setdefault(common, []).append(cell)
    return [sorted(line, key=lambda cell: cell.sampler.cfg_scale) for line in lines.values()]


def next_cells(
    cells: Sequence[Cell], known: Mapping[Cell, Metrics], search: SearchConfig
) -> list[Cell]:
    """Cells to be tried now: the next one of every line that goes on; none at the end.

    `known` holds the metrics of those that were tried.
    """
    found = [_next(line, known, search) for line in _lines(cells)]
    return [cell for cell in found if cell is not None]


def _next(line: list[Cell], known: Mapping[Cell, Metrics], search: SearchConfig) -> Cell | None:
    best, worse = float("inf"), 0
    for cell in line:
        if cell not in known:
            return cell
        metrics = known[cell]
        value = float(metrics[search.metric])
        worse = worse + 1 if value > best + search.margin else 0
        best = min(best, value)
        too_sharp = search.max_is is not None and metrics.get("is", 0.0) >= search.max_is
        if worse >= search.patience or too_sharp:
            return None
    return None


def winners(known: Mapping[Cell, Metrics], metric: str) -> list[Cell]:
    """The best tried cell of each token count, solver, number of steps and nested method.

    Scale, interval, rescale and shift are what is searched over.
    """
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in known:
        how = cell.sampler
        group = (
            cell.num_tokens, how.num_steps, how.solver, how.uncond_num_tokens,
            how.guidance, how.length_schedule,
        )  # fmt: skip
        groups.setdefault(group, []).append(cell)
    return [min(group, key=lambda cell: known[cell][metric]) for group in groups.values()]
