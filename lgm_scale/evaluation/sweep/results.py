"""results.json; which rows of sweeps may share a table; and the training's loss beside them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lgm_scale.errors import DataError
from lgm_scale.evaluation.metrics.catalogue import METRICS

Row = dict[str, Any]
OWN = ("cell", "weights", "noise_scale", "precision", "pixels_kept", "lgm_scale")
"""What may differ between rows of one table: what is measured, not how."""
WINDOW = 20


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


# --- console ----------------------------------------------------------------------------------


def headline(row: Row) -> str:
    """One line about a row, for the console."""
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


# --- loss of the training ------------------------------------------------------------------------


def loss_per_length(path: str | Path) -> dict[int, dict[str, Any]]:
    """Mean loss over the first and the last 20 steps at each K, their ratio and the step count.

    The loss grows with K by construction: a length is compared only with itself. Below 40 steps
    at a K the two windows overlap; `steps` tells.

    Raises: DataError naming the line that is not a step, or the step whose loss is not finite.
    """
    losses: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            step, num_tokens, loss = int(row["step"]), int(row["num_tokens"]), float(row["loss"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: not a step with step, num_tokens and loss ({error})"
            ) from error
        if not math.isfinite(loss):
            raise DataError(f"{path}: the loss of step {step} is {loss}; the run has diverged")
        losses[num_tokens].append((step, loss))
    return {k: _summary([loss for _, loss in sorted(rows)]) for k, rows in sorted(losses.items())}


def _summary(values: list[float]) -> dict[str, Any]:
    first = math.fsum(values[:WINDOW]) / len(values[:WINDOW])
    last = math.fsum(values[-WINDOW:]) / len(values[-WINDOW:])
    ratio = last / first if first else 1.0
    return {"steps": len(values), "first20": first, "last20": last, "ratio": ratio}
