"""Tables of a finished sweep: their columns and cells, for the page, and results.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lgm_scale.evaluation.metrics.catalogue import METRICS

Row = dict[str, Any]
_SETTINGS = (
    "cfg_interval", "cfg_rescale", "timestep_shift", "solver", "uncond_num_tokens", "guidance",
    "length_schedule",
)  # fmt: skip
"""Shown only where rows differ in them."""
_TITLES = {"num_tokens": "K", "cfg_scale": "guidance", "num_steps": "points",
           "guidance": "weak branch"}  # fmt: skip


class Cell(NamedTuple):
    """One cell: its text, what the column is sorted by (None: the text), and its emphasis."""

    text: str
    value: float | str | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Heads (lines are broken at newlines), rows of cells, and notes that go below."""

    heads: list[str]
    rows: list[list[Cell]]
    notes: tuple[str, ...] = ()


def columns(rows: Sequence[Row]) -> list[str]:
    """Metrics of a table, in the order of the first row that has them."""
    return list(dict.fromkeys(key for row in rows for key in row["metrics"]))


def is_long(name: str) -> bool:
    """Whether a metric's name says so much that a table's head has a short one with a star."""
    return len(name) > 20


def sample_table(rows: Sequence[Row], losses: Mapping[str, Any]) -> Table:
    """Settings, metrics and costs of samples, and the training's loss at K where it is known.

    `rows` were measured alike; `losses` are by K, as text, what `loss_per_length` found.
    """
    parts: list[tuple[str, Callable[[Row], Cell]]] = []
    if any(row.get("run_name") for row in rows):
        parts.append(("sweep", lambda row: _setting(row["run_name"])))
    differing = [n for n in _SETTINGS if len({str(row["cell"].get(n)) for row in rows}) > 1]
    for name in ("num_tokens", "cfg_scale", "num_steps", *differing):
        title = _TITLES.get(name, name.replace("_", " "))
        parts.append((title, lambda row, name=name: _setting(row["cell"].get(name))))
    for key in columns(rows):
        parts.append((_head(rows, key), _metric(rows, key)))
    parts += [
        ("GFLOPs\nper image", lambda row: _number(row["work"]["tflops_per_image"] * 1e3, "#.4g")),
        ("rows\nper image", lambda row: _number(row["work"]["rows"], "d")),
        ("images\nper second", lambda row: _number(row["run"]["images_per_second"], ".3g")),
        ("share in\nsampling", lambda row: _number(row["run"]["sampling_share"], ".1%")),
    ]
    if any(str(row["cell"]["num_tokens"]) in losses for row in rows):
        title = "training loss,\nlast / first 20"
        parts.append((title, lambda row: _loss(losses.get(str(row["cell"]["num_tokens"])))))
    return Table([head for head, _ in parts], [[cell(row) for _, cell in parts] for row in rows])


def _head(rows: Sequence[Row], key: str) -> str:
    """A metric's name in the head of a table; an unpublished one has a star for the note."""
    if key.endswith("_std"):
        return "\u00b1"
    name = next(row["names"].get(key, key) for row in rows if key in row["metrics"])
    return f"{METRICS[key].name}*" if key in METRICS and is_long(name) else name


def _metric(rows: Sequence[Row], key: str) -> Callable[[Row], Cell]:
    values = [row["metrics"][key] for row in rows if key in row["metrics"]]
    best = None
    if key in METRICS and len(values) > 1:
        best = min(values) if METRICS[key].better == "lower" else max(values)

    def cell(row: Row) -> Cell:
        value = row["metrics"].get(key)
        return _number(value, "#.4g", value == best)

    return cell


def reconstruction_table(rows: Sequence[Row]) -> Table:
    """Metrics of reconstructions at each K; long names are in the notes."""
    keys, names = columns(rows), rows[0]["names"]
    heads = []
    for key in keys:
        head = names.get(key, key).split(", against")[0]
        if key in METRICS:
            head = f"{METRICS[key].name}*"
        elif len(head) > 34:
            against = "validation" if key.endswith("_val") else "reference"
            head = f"{METRICS[key[1:].rsplit('_', 1)[0]].name}*,\nagainst {against}"
        heads.append(head)
    lines = [
        [_number(row["num_tokens"], "d"), *(_number(row["metrics"][key], "#.4g") for key in keys)]
        for row in rows
    ]
    notes = tuple(text for key, text in names.items() if key not in ("psnr_db", "ssim"))
    return Table(["K", *heads], lines, notes)


def _setting(value: Any) -> Cell:
    if isinstance(value, list):
        text = ", ".join(
            ":".join(f"{part:g}" for part in each) if isinstance(each, list) else f"{each:g}"
            for each in value
        )
        return Cell(text or "-")
    if value is None:
        return Cell("-")
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return Cell(text, text)


def _number(value: float | None, digits: str, best: bool = False) -> Cell:
    return Cell("-", "") if value is None else Cell(f"{value:{digits}}", value, best)


def _loss(loss: Mapping[str, Any] | None) -> Cell:
    if loss is None:
        return Cell("not trained", "")
    return Cell(f"{loss['last20']:.3f} / {loss['first20']:.3f}", loss["ratio"])


def to_csv(results: Mapping[str, Any]) -> str:
    """All rows of samples, searched ones too; one column per setting and metric."""
    lines = [_flat(row) for row in (*results["rows"], *results["searched"])]
    names = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    """A row of samples as one line: settings, metrics, work, identity."""
    protocol, reference = row["protocol"], row["protocol"]["reference"]
    return {
        **row["cell"],
        "num_images": row["num_images"],
        **row["metrics"],
        "tflops_per_image": row["work"]["tflops_per_image"],
        "rows_per_image": row["work"]["rows"],
        "images_per_second": row["run"]["images_per_second"],
        "seed": protocol["seed"],
        "noise_scale": protocol.get("noise_scale", ""),
        "reference_sha256": reference.get("sha256", reference.get("images_sha256")),
        "protocol": row["key"].rsplit("-", 1)[-1],
    }
