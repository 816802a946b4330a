"""What a comparison is: its runs, how each is measured, and where the numbers go. Free of torch.

Commands, paths and captions may hold `{path}`: the value at that dotted path of a run's record
(see `lookup`), formatted as in `{path:.1f}`.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lgm_scale.config.loading import check_config, read_yaml
from lgm_scale.config.schema import STRICT
from lgm_scale.errors import ConfigError, DataError

HOME = Path("yamls/experiments")
_FIELD = re.compile(r"\{([\w.*-]+)(?::([^{}]*))?\}")
RUN_FIELDS = ("name", "label", "seed", "folder", "steps", "cells")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training configuration; it is trained once per seed, in `<out>/<name>-seed<seed>`."""

    __pydantic_config__ = STRICT
    name: str
    config: str | None = None
    """YAML file of the training run; null: nothing is trained, and the resumable measurements name
    what they measure."""
    changes: tuple[str, ...] = ()
    """`key=value` that make this run of the file."""
    label: str = ""
    """Name in tables and plots; empty: `name`."""
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of a result's row -> the cell of a sweep that makes it; `{run.cells}` in a command."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A command that measures a finished run, and the JSON file that it writes."""

    __pydantic_config__ = STRICT
    name: str
    """Key of its results in the run's record. Entries for different runs may share it."""
    command: str
    result: str
    """Path of the JSON file."""
    runs: tuple[str, ...] = ()
    """The runs that are measured so; empty: all."""
    resumable: bool = False
    """Whether the command itself keeps what is finished; it is then called every time."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table: mean and sample standard deviation over seeds, or one value."""

    __pydantic_config__ = STRICT
    head: str
    value: str
    """Dotted path in the record of a line; it may hold `{path}`."""
    digits: int = 2
    factor: float = 1.0
    spread: bool = True
    """False: the first seed's value alone, for what is the same at every seed."""
    minus: str | None = None
    """A run of which the value in the same line is taken off, seed by seed; a dash in its own."""
    without: tuple[str, ...] = ()
    """The runs that have no such value: a dash in their lines."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One line per run, or with `rows` of the experiment one per row of each run's results."""

    __pydantic_config__ = STRICT
    columns: tuple[Column, ...]
    runs: tuple[str, ...] = ()
    """The runs that have lines; empty: all."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A curve per run with error bars. Without `rows`, x and y are paths of equally long lists."""

    __pydantic_config__ = STRICT
    x: str
    y: str
    x_label: str
    y_label: str
    x_factor: float = 1.0
    x_ticks: tuple[int, ...] = ()
    """The only marks of the axis; empty: matplotlib's."""
    drop_last: bool = False
    """Leave out the last entries of the lists, where y is what it is by definition."""
    from_zero: bool = False
    """Whether the vertical axis begins at 0."""
    minus: str | None = None
    """A run whose y at the same row is taken off, seed by seed: the line at 0. Needs `rows`."""
    point_label: str = ""
    """Text at each point; it may hold `{path}`."""
    runs: tuple[str, ...] = ()
    """The runs that have curves; empty: all."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A comparison of training runs that are measured alike."""

    __pydantic_config__ = STRICT
    out: str
    """Folder of the runs."""
    page: str
    """Markdown file whose measured part is rewritten."""
    runs: tuple[Run, ...]
    measure: tuple[Measurement, ...]
    caption: str
    """Text above the tables; `{seeds}` and `{work}` (TFLOPs of training) besides `{path}`."""
    tables: tuple[Table, ...]
    section: str = ""
    """Name of the measured part, where a page has those of several experiments."""
    needs: dict[str, str] = field(default_factory=dict)
    """Files and folders that the runs read -> the command that leaves them."""
    prepare: tuple[str, ...] = ()
    """Commands that come before every run; each keeps what is finished."""
    seeds: tuple[int, ...] = (0, 1, 2)
    equal_work: str | None = None
    """A run whose duration sets the operations of training of all. Null: each has its own file's
    duration."""
    rows: str = ""
    """Path of the list in a run's record of which each entry is a line; empty: the run is one."""
    panels: tuple[Panel, ...] = ()
    """Panels of a picture beside the page, named after page and section; empty: there is none."""
    title: str = ""
    """Above the panels."""


def lookup(values: Any, path: str) -> Any:
    """The value at a dotted path: keys of mappings, indices of lists, `*` for each of a list.

    Raises: DataError if there is none.
    """
    node, keys = values, path.split(".")
    for i, key in enumerate(keys):
        if key == "*":
            rest = ".".join(keys[i + 1 :])
            return [lookup(each, rest) for each in node] if rest else list(node)
        try:
            node = node[key] if isinstance(node, Mapping) else node[int(key)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            known = f"; known: {', '.join(map(str, node))}" if isinstance(node, Mapping) else ""
            raise DataError(f"{path}: no {key!r} here{known}") from error
    return node


def fill(template: str, record: Mapping[str, Any]) -> str:
    """The template with every `{path}` replaced by its value. Raises: DataError."""
    return _FIELD.sub(lambda part: format(lookup(record, part[1]), part[2] or ""), template)


def load_experiment(name: str) -> Experiment:
    """Read and validate an experiment: a YAML file, or the name of one in yamls/experiments.

    Raises: ConfigError with every problem.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else HOME / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in HOME.glob("*.yaml")))
        raise ConfigError(f"experiment: {name!r} is neither a YAML file nor one of {known}")
    return check_config(read_yaml(path), Experiment, _rules, str(path))


def _rules(experiment: Experiment) -> Iterator[str]:
    """One line for each rule between keys that is broken."""
    names = [run.name for run in experiment.runs]
    known = ", ".join(names)
    for key in ("runs", "measure", "tables", "seeds"):
        if not getattr(experiment, key):
            yield f"{key}: empty; name at least one"
    yield from _run_rules(experiment)
    yield from _measurement_rules(experiment.measure, names)
    named = {
        f"{key}.{i}.runs": entry.runs
        for key in ("measure", "tables", "panels")
        for i, entry in enumerate(getattr(experiment, key))
    } | {
        f"tables.{i}.columns.{j}.without": column.without
        for i, table in enumerate(experiment.tables)
        for j, column in enumerate(table.columns)
    }
    for key, given in named.items():
        if strange := [name for name in given if name not in names]:
            yield f"{key}: {', '.join(strange)}: no run; choose from {known}"
    yield from _difference_rules(experiment)
    for i, command in enumerate(experiment.prepare):
        yield from _broken_template(f"prepare.{i}", command, {"out": ""})


def _difference_rules(experiment: Experiment) -> Iterator[str]:
    every = tuple(run.name for run in experiment.runs)
    for i, table in enumerate(experiment.tables):
        for j, column in enumerate(table.columns):
            names = [name for name in table.runs or every if name not in column.without]
            key, advice = f"tables.{i}.columns.{j}.minus", "add {} to `without`"
            yield from _broken_difference(experiment, key, column.minus, names, advice)
    for i, panel in enumerate(experiment.panels):
        key, names = f"panels.{i}.minus", [*(panel.runs or every)]
        if panel.minus is not None and not experiment.rows:
            yield f"{key}: it needs `rows`, by which points of two runs belong together"
        advice = "leave {} out of the panel's `runs`"
        yield from _broken_difference(experiment, key, panel.minus, names, advice)


def _broken_difference(
    experiment: Experiment, key: str, minus: str | None, names: list[str], advice: str
) -> Iterator[str]:
    """What keeps `minus` from being taken off the runs of these names."""
    runs = {run.name: run for run in experiment.runs}
    if minus is None:
        return
    if minus not in runs:
        yield f"{key}: {minus!r} is no run; choose from {', '.join(runs)}"
        return
    for name in (name for name in names if name in runs):
        if alone := [cell for cell in runs[name].cells if cell not in runs[minus].cells]:
            yield (
                f"{key}: {minus} has no cells {', '.join(alone)}, which {name} has; give it them, "
                f"or {advice.format(name)}"
            )


def _run_rules(experiment: Experiment) -> Iterator[str]:
    names = [run.name for run in experiment.runs]
    yield from _repeated("runs", names)
    for i, run in enumerate(experiment.runs):
        if run.config is None:
            named = [entry for entry in experiment.measure if run.name in (entry.runs or names)]
            if not all(entry.resumable for entry in named) or experiment.equal_work is not None:
                yield (
                    f"runs.{i}.config: missing; name a training run's YAML. Without one, a run has "
                    "resumable measurements alone, and no part in `equal_work`"
                )
        elif not Path(run.config).is_file():
            yield f"runs.{i}.config: {run.config} is not a file; give a training run's YAML"
        if experiment.rows and not run.cells:
            yield f"runs.{i}.cells: empty, and `rows` needs a name for each row; name them"
    if experiment.equal_work not in (None, *names):
        known = ", ".join(names)
        yield f"equal_work: {experiment.equal_work!r} is no run; choose from {known}"


def _measurement_rules(entries: tuple[Measurement, ...], runs: list[str]) -> Iterator[str]:
    for run in dict.fromkeys(runs):
        yield from _repeated(
            f"measure of {run}", [each.name for each in entries if run in (each.runs or runs)]
        )
    sample = {"out": "", "run": dict.fromkeys(RUN_FIELDS, "")}
    for i, entry in enumerate(entries):
        if entry.name in ("row", *sample):
            yield f"measure.{i}.name: {entry.name!r} is taken; choose another"
        for key in ("command", "result"):
            yield from _broken_template(f"measure.{i}.{key}", getattr(entry, key), sample)


def _repeated(key: str, names: list[str]) -> Iterator[str]:
    for name, count in Counter(names).items():
        if count > 1:
            yield f"{key}: {name!r} is the name of {count} entries; give each its own"


def _broken_template(key: str, template: str, sample: Mapping[str, Any]) -> Iterator[str]:
    try:
        fill(template, sample)
        shlex.split(template)
    except (DataError, ValueError) as error:
        yield f"{key}: {error}"
