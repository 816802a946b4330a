"""How long a planned step would take on a GPU: a prediction, to be scored on the first one.

time = matrix products by their size, or by the bytes that they read and write
     + everything else by its bytes: one kernel per operation, or compiled, one per stretch between
       two products; uncompiled, at least what the host takes to launch them
     + optimizer and average by their bytes
     + what of the collectives does not hide behind the passes (alpha-beta)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lgm_scale.parallel.memory import GPUS_PER_NODE
from lgm_scale.planning.hardware import GPU
from lgm_scale.planning.recorder import Work
from lgm_scale.planning.strategies import Moved, PlannedStep

BACKWARD = 2 / 3
"""Share of the passes behind which collectives hide: gradients come in the backward pass alone."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one rank, and what of the peak it uses.

    Args:
        products: Matrix products and attention.
        others: Everything else of the passes.
        update: Clipping, optimizer and average.
        exposed: Communication that nothing hides.
        utilisation: Share of the peak at the step's precision.
    """

    products: float
    others: float
    update: float
    exposed: float
    utilisation: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.products + self.others + self.update + self.exposed


def predict(
    step: PlannedStep, micro_batches: int, gpu: GPU, compiled: bool, flops: float
) -> StepTime:
    """Predict a step of `micro_batches` micro-batches, on whose utilisation `flops` count.

    Those are the model's own operations: what is computed again for the backward pass takes time,
    but is no use.
    """
    first, last = step.passes[0], step.passes[-1]
    passes = [first.work, *[last.work] * (micro_batches - 1)]
    products = sum(_products(work, gpu) for work in passes)
    others = sum(_others(work, gpu, compiled) for work in passes)
    if not compiled:  # the host launches while the GPU computes; the slower one counts
        launches = sum(work.kernels for work in passes) * gpu.launch_us * 1e-6
        others = max(others, launches - products)
    update = step.update.work.eager_bytes / (gpu.memory_gbs * 1e9)
    exposed = _exposed(step.moved, gpu, products + others)
    total = products + others + update + exposed
    half = Counter[bool]()
    for product, count in first.work.products.items():
        half[product.half] += product.flops * count
    peak = gpu.half_tflops if half[True] >= half[False] else gpu.float_tflops
    return StepTime(products, others, update, exposed, flops / total / (peak * 1e12))


def _products(work: Work, gpu: GPU) -> float:
    seconds = 0.0
    for product, count in work.products.items():
        peak = (gpu.half_tflops if product.half else gpu.float_tflops) * 1e12
        attention = product.kind == "attention"
        share = gpu.attention_efficiency if attention else gpu.share(product.flops)
        by_bytes = product.nbytes / (gpu.memory_gbs * 1e9)
        seconds += count * max(product.flops / (peak * share), by_bytes)
    return seconds


def _others(work: Work, gpu: GPU, compiled: bool) -> float:
    moved = work.fused_bytes if compiled else work.eager_bytes
    return moved / (gpu.memory_gbs * 1e9)


def collective_seconds(moved: Moved, gpu: GPU) -> float:
    """Alpha-beta time of one collective among n ranks, nodes of eight, in a ring.

    (n - 1) / n of the whole tensor passes each rank's link, twice where it is reduced and handed
    out again; each step of the ring has a latency.
    """
    if moved.ranks < 2:
        return 0.0
    nodes = -(-moved.ranks // GPUS_PER_NODE)
    rate = (gpu.node_gbs if nodes == 1 else min(gpu.node_gbs, gpu.network_gbs)) * 1e9
    hops = min(moved.ranks, GPUS_PER_NODE) - 1
    alpha = hops * gpu.node_hop_us * 1e-6 + (nodes - 1) * gpu.network_hop_us * 1e-6
    times = 2 if moved.transfer.operation == "all-reduce" else 1
    return times * (alpha + moved.transfer.nbytes * (moved.ranks - 1) / moved.ranks / rate)


def _exposed(moved: Sequence[Moved], gpu: GPU, computing: float) -> float:
    """What is left over when the backward passes have hidden what they can."""
    hidden = sum(collective_seconds(each, gpu) for each in moved if each.overlaps)
    open_ = sum(collective_seconds(each, gpu) for each in moved if not each.overlaps)
    return open_ + max(0.0, hidden - BACKWARD * computing)
