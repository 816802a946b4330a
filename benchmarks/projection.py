"""How long a step would take on many GPUs, by a model simple enough to check by hand.

compute = 3 x forward FLOPs of the rank's samples / (peak x utilization)
communication = sum over collectives of (n - 1) / n x bytes / bandwidth; between nodes, bandwidth is
    that of all ports of a node together, for as many rings run at once
step: between max(compute, communication), all hidden, and compute + communication, none hidden

Weights travel in bfloat16 (2 bytes), gradients in float32 (4 bytes), as the strategies do it:
ddp sends gradients in one all-reduce (twice their bytes); fsdp gathers weights for the forward and
the backward pass and scatters gradients; hybrid does so inside a node, and all-reduces the node's
shards across nodes; ZeRO-2 scatters gradients and gathers weights, both in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.generator import build_network
from benchmarks.harness import print_table
from lgm_scale.config.schema import FSDPConfig, ParallelConfig
from lgm_scale.parallel.memory import parameter_infos, planned_bytes

__all__ = ["Cluster", "communication_seconds", "print_projection"]

HALF, FLOAT = 2, 4
STRATEGIES = ("ddp", "fsdp full", "fsdp hybrid", "zero-2")


@dataclass(frozen=True)
class Cluster:
    """GPUs per node; FLOP/s of one and the used share; bytes/s per GPU inside and between nodes."""

    gpus_per_node: int
    peak_flops: float
    utilization: float
    node_bandwidth: float
    network_bandwidth: float

    def ring_seconds(self, size: float, gpus: int) -> float:
        """One gather or scatter of `size` bytes among `gpus`."""
        bandwidth = self.node_bandwidth
        if gpus > self.gpus_per_node:  # several rings, each through another GPU's network port
            bandwidth = min(bandwidth, self.gpus_per_node * self.network_bandwidth)
        return (gpus - 1) / gpus * size / bandwidth


def communication_seconds(strategy: str, parameters: int, gpus: int, cluster: Cluster) -> float:
    """Seconds that one step spends on communication that nothing hides."""
    if strategy == "ddp":
        return 2 * cluster.ring_seconds(FLOAT * parameters, gpus)
    if strategy == "zero-2":
        return cluster.ring_seconds((FLOAT + FLOAT) * parameters, gpus)
    group = gpus if strategy == "fsdp full" else min(gpus, cluster.gpus_per_node)
    seconds = cluster.ring_seconds((2 * HALF + FLOAT) * parameters, group)
    nodes = gpus // group
    if nodes > 1:
        own = FLOAT * parameters / group
        seconds += 2 * (nodes - 1) / nodes * own / cluster.network_bandwidth
    return seconds


def _state(strategy: str, net: torch.nn.Module, gpus: int, cluster: Cluster) -> int:
    configs = {
        "ddp": ParallelConfig(),
        "fsdp full": ParallelConfig(strategy="fsdp"),
        "fsdp hybrid": ParallelConfig(
            strategy="fsdp",
            fsdp=FSDPConfig(shard="hybrid", group_size=min(gpus, cluster.gpus_per_node)),
        ),
        "zero-2": ParallelConfig(strategy="deepspeed"),
    }
    return planned_bytes(parameter_infos(net, True), configs[strategy], gpus).total


def print_projection(
    size: str, num_tokens: int, batch_size: int, gpu_counts: list[int], cluster: Cluster
) -> None:
    """The model in words, and its table."""
    with torch.device("meta"):
        net = build_network(size)
    parameters = sum(p.numel() for p in net.parameters())
    flops = 3 * net.flops(num_tokens)
    print(
        f"\nprojected, not measured: size {size}, K = {num_tokens}, global batch {batch_size}, "
        f"{cluster.peak_flops / 1e12:.0f} TFLOP/s x {cluster.utilization:.0%}, "
        f"{cluster.node_bandwidth / 1e9:.0f} GB/s in a node, "
        f"{cluster.network_bandwidth / 1e9:.0f} GB/s outside, per GPU"
    )
    print("step in ms, communication hidden ... not hidden; state without activations\n")
    rows = []
    for gpus in gpu_counts:
        compute = flops * batch_size / gpus / (cluster.peak_flops * cluster.utilization)
        for strategy in STRATEGIES:
            talk = communication_seconds(strategy, parameters, gpus, cluster)
            best, worst = max(compute, talk), compute + talk
            times = [f"{best * 1e3:.1f} ... {worst * 1e3:.1f}"]
            times += [f"{batch_size / worst:,.0f} ... {batch_size / best:,.0f}"]
            state = _state(strategy, net, gpus, cluster) / 2**30
            rows.append((gpus, strategy, compute * 1e3, talk * 1e3, *times, state))
    heads = {"GPUs": "", "strategy": "", "compute": ".1f", "talk": ".1f", "step": ""}
    print_table(heads | {"images/s": "", "state, GiB": ".2f"}, rows)
