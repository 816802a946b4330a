"""What a plan needs to know of a GPU, measured in some seconds.

Measured: memory, the share of the peak that products of five sizes and attention reach, memory
bandwidth, what a kernel costs the host. Not on one GPU: networks between GPUs, power and the
prediction's error; those are the table's (`lgm_scale.planning.hardware.GPUS`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.gpu_steps import seconds_of
from lgm_scale.errors import ConfigError
from lgm_scale.planning.hardware import GPU, GPUS, read_calibration

SIDES = (384, 800, 1728, 3712, 7936)
"""Of square products: some 1e8 to 1e12 operations."""
MEASURED = ("memory_gib", "efficiency", "attention_efficiency", "memory_gbs", "launch_us")


def table_entry(name: str) -> GPU | None:
    """The table's GPU of a device's name; None if it is not there, or only another form of it."""
    upper = name.upper()
    if "PCIE" in upper or "NVL" in upper:  # of another peak than the SXM form
        return None
    return next((gpu for key, gpu in GPUS.items() if key.upper() in upper), None)


def measure(device: torch.device, base: GPU, tiny: bool) -> GPU:
    """`base` with what is measured here in its place. Raises: ConfigError for a peak too low."""
    sides = (64, 128) if tiny else SIDES
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    else:
        memory = base.memory_gib
    peak = base.half_tflops * 1e12
    efficiency = tuple((2.0 * n**3, _share(_product(n, device), 2 * n**3, peak)) for n in sides)
    return replace(
        base,
        memory_gib=memory,
        efficiency=efficiency,
        attention_efficiency=_attention(device, peak, tiny),
        memory_gbs=_bandwidth(device, 2**16 if tiny else 2**28),
        launch_us=_launch(device, 50 if tiny else 500),
    )


def write(path: Path, gpu: GPU, base: GPU, made_by: dict[str, Any]) -> None:
    """Write the file that `--calibration` of a dry run reads, and read it once."""
    assumed = sorted(set(asdict(gpu)) - {"name", *MEASURED})
    content = {"format": 1, "gpu": asdict(gpu), "measured": MEASURED, "made_by": made_by}
    content["assumed"] = {"from": base.name, "fields": assumed}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    read_calibration(path)


def _median(step: Callable[[], Any], device: torch.device, count: int = 1) -> float:
    """Seconds of one call, of `count` in a row."""

    def several() -> None:
        for _ in range(count):
            step()

    return statistics.median(seconds_of(several, device, repeats=10, limit=1.0)) / count


def _share(seconds: float, flops: float, peak: float) -> float:
    share = flops / seconds / peak
    if share > 1:
        raise ConfigError(
            f"--peak-tflops: {peak / 1e12:g} TFLOP/s is below the {flops / seconds / 1e12:.4g} "
            "reached here; give the peak of dense bfloat16 of this GPU's data sheet"
        )
    return share


def _product(side: int, device: torch.device) -> float:
    """Seconds of a square bfloat16 product; small ones in rows, as a network queues them."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return _median(lambda: a @ b, device, count=20 if side < 2000 else 1)


def _attention(device: torch.device, peak: float, tiny: bool) -> float:
    """Share of the peak of XL's attention at K = 256, forward and backward.

    Heads of 72 are 80 wide with the channel of the log sizes; as many operations as a plan counts.
    """
    shape = (1, 2, 32, 80) if tiny else (64, 16, 256, 80)
    kind: Any = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    q, k, v = (torch.randn(shape, **kind) for _ in range(3))
    towards = torch.ones(shape, device=device, dtype=torch.bfloat16)

    def both() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), towards)

    flops = sdpa_flop_count(*[shape] * 3) + sdpa_backward_flop_count(*[shape] * 4)
    return _share(_median(both, device), flops, peak)


def _bandwidth(device: torch.device, numel: int) -> float:
    """GB/s of reading and writing float32, as everything does that is no product."""
    x, y = torch.zeros(numel, device=device), torch.empty(numel, device=device)
    return 2 * 4 * numel / _median(lambda: torch.add(x, 1.0, out=y), device) / 1e9


def _launch(device: torch.device, count: int) -> float:
    """Microseconds per kernel where the host is what takes them; half of them autograd's."""
    x = torch.ones(8, device=device, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(count):
            y = y * 1.0
        torch.autograd.grad(y, x, torch.ones_like(y))

    return _median(chain, device) / (2 * count) * 1e6
