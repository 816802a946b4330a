"""What GPUs can do: a table of ours, or a calibration file. Free of torch.

Peaks and bandwidths are the makers'. What share of them is reached is an estimate of ours, by
published figures for each kind of operation: nothing of this project has run on a GPU.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lgm_scale.errors import ConfigError

UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20, "TB": 10**12, "TIB": 2**40}


@dataclass(frozen=True)
class GPU:
    """A GPU, and how it talks to others. Bandwidths are reached, not the makers'.

    Args:
        name: What it is.
        memory_gib: Memory that programs see.
        half_tflops: Peak of dense bfloat16 products, the makers'.
        float_tflops: Peak of float32 products, without TF32.
        efficiency: Share of a product's peak by its size: pairs of operations and share, rising;
            between them by the logarithm of the operations.
        attention_efficiency: Share of `half_tflops` that attention reaches.
        memory_gbs: GB/s of memory, reached.
        launch_us: Microseconds of the host for each kernel of an uncompiled step.
        node_gbs: GB/s of a rank's collectives inside a node of eight.
        network_gbs: The same across nodes.
        node_hop_us: Microseconds of each step of a collective, inside a node.
        network_hop_us: The same across nodes.
        watts: Power of a GPU with its share of the node, under load.
        error: Share by which predictions may be off, either way.
    """

    name: str
    memory_gib: float
    half_tflops: float
    float_tflops: float
    efficiency: tuple[tuple[float, float], ...]
    attention_efficiency: float
    memory_gbs: float
    launch_us: float
    node_gbs: float
    network_gbs: float
    node_hop_us: float
    network_hop_us: float
    watts: float
    error: float

    def share(self, flops: float) -> float:
        """Share of the peak that a product of so many operations reaches."""
        points = self.efficiency
        if flops <= points[0][0]:
            return points[0][1] * max(flops, 1.0) / points[0][0]
        for (low, below), (high, above) in itertools.pairwise(points):
            if flops <= high:
                part = math.log(flops / low) / math.log(high / low)
                return below + part * (above - below)
        return points[-1][1]


_HOPPER = ((1e8, 0.04), (1e9, 0.22), (1e10, 0.52), (1e11, 0.66), (1e12, 0.70))
_AMPERE = ((1e8, 0.10), (1e9, 0.40), (1e10, 0.65), (1e11, 0.75), (1e12, 0.78))
_ERROR = 0.3

GPUS = {
    "h100": GPU(
        *("H100 SXM 80 GB", 79.6, 989.0, 67.0, _HOPPER, 0.35),
        *(0.85 * 3350, 5.0, 330.0, 40.0 * 8, 3.0, 10.0, 1000.0, _ERROR),
    ),
    "h200": GPU(
        *("H200 SXM 141 GB", 140.4, 989.0, 67.0, _HOPPER, 0.35),
        *(0.85 * 4800, 5.0, 330.0, 40.0 * 8, 3.0, 10.0, 1000.0, _ERROR),
    ),
    "a100": GPU(
        *("A100 SXM 80 GB", 79.3, 312.0, 19.5, _AMPERE, 0.50),
        *(0.85 * 2039, 5.0, 230.0, 20.0 * 8, 3.0, 10.0, 650.0, _ERROR),
    ),
}
"""Peak, memory and bandwidth: the makers' data sheets. Everything else: our estimates.

A collective across nodes of eight has the network of all eight GPUs, which is why `network_gbs` is
eight times that of one (40 of 50 GB/s of a 400 Gb/s port; 20 of 25 for A100)."""

FORMAT = 1


def read_calibration(path: str | Path) -> GPU:
    """A GPU from a calibration file: JSON, `{"format": 1, "gpu": {...}}` with the fields of `GPU`.

    Raises: ConfigError that names the file, the key and what it must be.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--calibration: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"--calibration: {path} is no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(
            f'--calibration: {path} is no calibration; it must hold {{"format": {FORMAT}, '
            f'"gpu": {{...}}}} (docs/planning.md)'
        )
    return _gpu(content.get("gpu"), str(path))


def _gpu(values: Any, path: str) -> GPU:
    values = values if isinstance(values, dict) else {}
    names = [field.name for field in fields(GPU)]
    problems = [f"--calibration: {path}: gpu.{n}: missing" for n in names if n not in values]
    problems += [
        f"--calibration: {path}: gpu.{n}: unknown key; known: {', '.join(names)}"
        for n in values
        if n not in names
    ]
    for name in (n for n in names if n in values):
        problem = _problem(name, values[name])
        if problem:
            problems.append(f"--calibration: {path}: gpu.{name}: {values[name]!r} {problem}")
    if problems:
        raise ConfigError(problems)
    points = tuple((float(size), float(share)) for size, share in values["efficiency"])
    return GPU(**{**values, "efficiency": points})


def _problem(name: str, value: Any) -> str:
    """What is wrong with a value; empty if nothing is."""
    if name == "name":
        return "" if isinstance(value, str) and value else "must be a name"
    if name == "efficiency":
        good = isinstance(value, list) and len(value) >= 1
        good = good and all(
            isinstance(p, list) and len(p) == 2 and _positive(p[0]) and _positive(p[1], 1)
            for p in value
        )
        good = good and all(a[0] < b[0] for a, b in itertools.pairwise(value))
        return "" if good else "must be a list of [operations, share of the peak], rising"
    if name in ("error", "attention_efficiency"):
        return "" if _positive(value, 1) else "must be above 0 and at most 1"
    return "" if _positive(value) else "must be a number above 0"


def _positive(value: Any, most: float = math.inf) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value <= most and math.isfinite(value)


def parse_memory(text: str) -> int:
    """Bytes of `40GB` (10^9) or `40GiB` (2^30). Raises: ValueError that says how to write it."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise ValueError(
            f"{text!r} is no size; write a number above 0 and a unit, as 40GB (10^9 bytes) or "
            "40GiB (2^30)"
        )
    return int(float(match[1]) * UNITS[match[2].upper()])
