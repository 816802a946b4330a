"""The measured part of a page: caption, tables and picture, from the records of all runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.config import Column, Experiment, Panel, fill, lookup
from lgm_scale.errors import DataError


def markers(section: str) -> tuple[str, str]:
    """What encloses the measured part of this name in a page; "" is that of the only one."""
    name = f"measured {section}".rstrip()
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


Line = Sequence[Mapping[str, Any]]
"""Records of one line of a table, or one point of a curve, one per seed."""


def lines_of(experiment: Experiment, results: Mapping[str, Line]) -> dict[str, list[Line]]:
    """Lines of each run by its name; `row` of a record is the row of the results.

    Raises: DataError if the results have more or fewer rows than the run has cells.
    """
    if not experiment.rows:
        return {name: [records] for name, records in results.items()}
    lines = {}
    for run in experiment.runs:
        per_seed = []
        for record in results[run.name]:
            rows = lookup(record, experiment.rows)
            if len(rows) != len(run.cells):
                raise DataError(
                    f"runs.{run.name}.cells: {len(run.cells)} names for {len(rows)} rows of "
                    f"{experiment.rows}; let every cell make one row"
                )
            per_seed.append(
                [
                    {**record, "row": {**row, "name": name}}
                    for name, row in zip(run.cells, rows, strict=True)
                ]
            )
        lines[run.name] = list(zip(*per_seed, strict=True))
    return lines


def mean_and_std(values: Sequence[float | None], digits: int) -> str:
    """`22.17 ± 0.05`, the sample standard deviation over seeds; "-" where nothing is defined."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.mean(known):.{digits}f}"
    return f"{text} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else text


def _entry(column: Column, line: Line, lines: Mapping[str, list[Line]]) -> str:
    """What stands in a column of a line; `lines` are those of every run."""
    if line[0]["run"]["name"] in (*column.without, column.minus):
        return "-"
    values = _values(column.value, line)
    if isinstance(values[0], str):
        return values[0]
    if column.minus is not None:
        values = _less(values, column.value, line, lines[column.minus])
    scaled = [None if value is None else value * column.factor for value in values]
    return mean_and_std(scaled if column.spread else scaled[:1], column.digits)


def _values(path: str, line: Line) -> list[Any]:
    return [lookup(record, fill(path, record)) for record in line]


def _less(values: list[Any], path: str, line: Line, others: list[Line]) -> list[Any]:
    """The values of a line, seed by seed less those of the same row among another run's lines."""
    other = next(each for each in others if _row(each) == _row(line))
    pairs = zip(values, _values(path, other), strict=True)
    return [None if None in pair else pair[0] - pair[1] for pair in pairs]


def _row(line: Line) -> str | None:
    return line[0].get("row", {}).get("name")


def render(experiment: Experiment, results: Mapping[str, Line], budget: float | None) -> str:
    """Caption and tables as Markdown.

    `results` are the records of each run by its name, one per seed.
    """
    first = next(iter(results.values()))
    common = {"seeds": len(first), "work": None if budget is None else budget / 1e12}
    text = [fill(experiment.caption, {**first[0], **common})]
    lines_by_run = lines_of(experiment, results)
    for table in experiment.tables:
        heads = [column.head for column in table.columns]
        lines = [line for name in table.runs or lines_by_run for line in lines_by_run[name]]
        entries = [
            [_entry(column, line, lines_by_run) for column in table.columns] for line in lines
        ]
        text.append("")
        text += [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *entries)]
    return "\n".join(text)


def write_between_markers(path: Path, text: str, section: str = "") -> None:
    """Replace what stands between the markers of a Markdown file; without them, append both."""
    begin, end = markers(section)
    old = path.read_text(encoding="utf-8") if path.is_file() else f"# {path.stem}\n"
    if begin not in old or end not in old:
        old = f"{old.rstrip()}\n\n{begin}\n{end}\n"
    head, rest = old.split(begin, 1)
    tail = rest.split(end, 1)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")


def draw(experiment: Experiment, results: Mapping[str, Line], path: Path) -> None:
    """The experiment's plot: means over seeds, with their sample standard deviation as bars."""
    panels = experiment.panels
    width, height = (7.2, 4.2) if len(panels) == 1 else (4.5 * len(panels), 4.1)
    lines = lines_of(experiment, results)
    longest = max(len(line[0][0]["run"]["label"]) for line in lines.values())
    ncols = max(1, min(4, int(11 * width / (longest + 8))))  # some eleven letters to the inch
    rows = -(-len(lines) // ncols)
    figure = Figure(figsize=(width, height + 0.2 * max(0, rows - 2)), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, axes in zip(panels, row, strict=True):
        names = [name for name in panel.runs or lines if name != panel.minus]
        others = None if panel.minus is None else lines[panel.minus]
        if others is not None:
            axes.axhline(0, color="black", linewidth=1, label=others[0][0]["run"]["label"])
        for i, name in enumerate(names):
            # Differences lie close together: their bars stand beside each other.
            aside = 1.0 if others is None else 1.025 ** (i - (len(names) - 1) / 2)
            _curve(axes, panel, lines[name], others, aside)
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label, xscale="log")
        if panel.x_ticks:
            axes.set_xticks(panel.x_ticks, [str(place) for place in panel.x_ticks])
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_formatter("{x:.3g}")
            axes.xaxis.set_minor_formatter("{x:.3g}")
            axes.tick_params(which="minor", labelsize=8)
        if panel.from_zero:
            axes.set_ylim(bottom=0)
        axes.margins(x=0.1)
        axes.grid(alpha=0.3)
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols)
    figure.suptitle(experiment.title, fontsize=10)
    figure.savefig(path, dpi=120)


def _curve(
    axes: Axes, panel: Panel, points: list[Line], others: list[Line] | None, aside: float
) -> None:
    """One run's curve, from a point per line or, if x is the path of a list, from a single line.

    `others` are the lines of the run that is taken off; places are multiplied by `aside`.
    """
    if isinstance(lookup(points[0][0], panel.x), list):
        places = lookup(points[0][0], panel.x)
        per_seed = [lookup(record, panel.y) for record in points[0]]
        values = [list(point) for point in zip(*per_seed, strict=True)]
        if panel.drop_last:
            places, values = places[:-1], values[:-1]
    else:
        places = [lookup(line[0], panel.x) for line in points]
        values = [_values(panel.y, line) for line in points]
        if others is not None:
            values = [
                _less(each, panel.y, line, others)
                for each, line in zip(values, points, strict=True)
            ]
    places = [aside * panel.x_factor * place for place in places]
    means = [statistics.mean(each) for each in values]
    spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
    label = points[0][0]["run"]["label"]
    axes.errorbar(places, means, spread, marker="o", capsize=3, label=label)
    if panel.point_label:
        for line, x, y in zip(points, places, means, strict=True):
            text = fill(panel.point_label, line[0])
            axes.annotate(text, (x, y), xytext=(6, 6), textcoords="offset points", size=8)
