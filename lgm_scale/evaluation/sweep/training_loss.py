"""How far the training loss fell at each K, from a run's metrics.jsonl. Free of torch."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from lgm_scale.errors import DataError

__all__ = ["loss_per_length"]

WINDOW = 20


def loss_per_length(path: str | Path) -> dict[int, dict[str, Any]]:
    """Mean loss over the first and the last 20 steps at each K, their ratio and the step count.

    The loss grows with K by construction: a length is compared only with itself. Below 40 steps
    at a K the two windows overlap; `steps` tells.

    Raises: DataError naming the line that is not a step, or the step whose loss is not finite.
    """
    losses: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
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
