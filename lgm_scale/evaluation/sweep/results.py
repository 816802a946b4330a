"""results.json, results.csv and results.md; which rows of a sweep may share a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lgm_scale import __version__
from lgm_scale.config.loading import to_dict
from lgm_scale.errors import DataError
from lgm_scale.evaluation.metrics.catalogue import METRICS
from lgm_scale.evaluation.references.files import Reference
from lgm_scale.evaluation.sweep.config import SweepConfig
from lgm_scale.pipeline import Pipeline

__all__ = [
    "comparable",
    "differences",
    "gather_results",
    "headline",
    "read_results",
    "tables_of",
    "to_csv",
    "to_markdown",
]

FORMAT, VERSION = "lgm_scale.sweep", 2
Row = dict[str, Any]
OWN = ("cell", "weights", "noise_scale", "precision", "pixels_kept", "lgm_scale")
"""What may differ between rows of one table: what is measured, not how."""


def gather_results(
    *,
    config: SweepConfig,
    pipe: Pipeline,
    weights: dict[str, Any],
    reference: Reference,
    off: dict[str, str],
    rows: list[Row],
    searched: list[Row],
    reconstructions: list[Row],
    losses: dict[int, dict[str, Any]],
    run: dict[str, Any],
) -> dict[str, Any]:
    """Everything that a report needs besides pictures, as JSON values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "versions": {"lgm_scale": __version__, "torch": torch.__version__},
        "config": to_dict(config),
        "weights": weights,
        "reference": {"name": reference.name, **reference.description},
        "off": off,
        "kind": pipe.kind,
        "merge_tree": pipe.tree is not None,
        "classes": list(pipe.classes),
        "num_base_tokens": pipe.num_base_tokens,
        "parameters": pipe.parameters(),
        "training_steps": pipe.info["training"].get("steps"),
        "training_loss": {str(k): loss for k, loss in losses.items()},
        "rows": rows,
        "searched": searched,
        "reconstructions": reconstructions,
        "run": run,
    }


def read_results(out: Path) -> dict[str, Any]:
    """Results of a finished sweep. Raises: DataError if the folder holds none."""
    path = out / "results.json"
    if not path.is_file():
        raise DataError(f"{path} is missing: give the `out` folder of a finished eval/sweep.py")
    try:
        results = json.loads(path.read_text())
        found = results["format"], results["version"]
        if found != (FORMAT, VERSION):
            raise ValueError(f"it is {found[0]!r} version {found[1]!r}, not version {VERSION}")
        if not {"rows", "searched", "reconstructions"} <= results.keys():
            raise ValueError("its rows are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); run the sweep again") from error
    return results


# --- which rows may stand side by side --------------------------------------------------------


def comparable(row: Row) -> dict[str, Any]:
    """What must be equal in all rows of one table: how they were measured."""
    return {key: value for key, value in row["protocol"].items() if key not in OWN}


def differences(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> list[str]:
    """Where two protocols differ, as `key: value against value`."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        left, right = a.get(key), b.get(key)
        if left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{path}{key}.")
        else:
            found.append(f"{path}{key}: {_short(left)} against {_short(right)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def tables_of(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in tables: two rows share one only if they were measured alike."""
    tables: dict[str, list[Row]] = {}
    for row in rows:
        tables.setdefault(json.dumps(comparable(row), sort_keys=True), []).append(row)
    return list(tables.values())


# --- text -------------------------------------------------------------------------------------


def headline(row: Row) -> str:
    """A row for the console."""
    names = {"psnr_db": "PSNR", "ssim": "SSIM", "lpips": "LPIPS"}
    parts = []
    for key, value in row["metrics"].items():
        if not key.endswith("_std"):
            metric = METRICS.get(key)
            name = metric.name if metric is not None else names.get(key, key)
            parts.append(f"{name} {value:.5g}")
    if "work" in row:
        parts.append(f"{row['work']['tflops_per_image']:.3g} TFLOPs")
    return "   ".join(parts)


def columns(rows: Sequence[Row]) -> list[str]:
    """Metrics of a table, in the order of the first row that has them."""
    return list(dict.fromkeys(key for row in rows for key in row["metrics"]))


def flat(row: Row) -> dict[str, Any]:
    """A row of samples as one line of a table: settings, metrics, work, identity."""
    protocol = row["protocol"]
    return {
        **row["cell"],
        "num_images": row["num_images"],
        **row["metrics"],
        "tflops_per_image": row["work"]["tflops_per_image"],
        "rows_per_image": row["work"]["rows"],
        "images_per_second": row["run"]["images_per_second"],
        "seed": protocol["seed"],
        "noise_scale": protocol["noise_scale"],
        "reference_sha256": protocol["reference"].get(
            "sha256", protocol["reference"].get("images_sha256")
        ),
        "protocol": row["key"].rsplit("-", 1)[-1],
    }


def to_csv(results: Mapping[str, Any]) -> str:
    """All rows of samples, searched ones too; one column per setting and metric."""
    lines = [flat(row) for row in (*results["rows"], *results["searched"])]
    names = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def to_markdown(results: Mapping[str, Any]) -> str:
    """One table per protocol, and one of the reconstructions."""
    parts = ["# Sweep", "", f"Reference: {results['reference']['name']}. Lower is better unless a "
             "column says otherwise."]  # fmt: skip
    for rows in tables_of([*results["rows"], *results["searched"]]):
        keys = columns(rows)
        searched = rows[0] in results["searched"]
        parts += [
            "",
            f"## {'Search' if searched else 'Samples'}, {rows[0]['num_images']} images",
            "",
        ]
        parts.append(_line(["cell", *(rows[0]["names"].get(k, k) for k in keys),
                            "TFLOPs per image", "images/s per device"]))  # fmt: skip
        parts.append(_line(["---"] * (len(keys) + 3)))
        parts += [
            _line([
                row["label"],
                *(f"{row['metrics'][k]:.4g}" if k in row["metrics"] else "-" for k in keys),
                f"{row['work']['tflops_per_image']:.4g}",
                f"{row['run']['images_per_second']:.4g}",
            ])
            for row in rows
        ]  # fmt: skip
    if results["reconstructions"]:
        rows = results["reconstructions"]
        keys = columns(rows)
        parts += ["", f"## Reconstructions, {rows[0]['num_images']} images", ""]
        parts.append(_line(["K", *(rows[0]["names"].get(k, k) for k in keys)]))
        parts.append(_line(["---"] * (len(keys) + 1)))
        parts += [
            _line([str(row["num_tokens"]), *(f"{row['metrics'][k]:.4g}" for k in keys)])
            for row in rows
        ]
    if results["off"]:
        parts += ["", "Off:", "", *(f"- {line}" for line in results["off"].values())]
    return "\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
