"""Step time, communication and memory of each strategy on this machine.

    python -m benchmarks.scaling --world-sizes 1 2

One training step (forward, backward, AdamW) of a generator, strategies alternating; the bytes that
a rank hands to collectives in it; the bytes of state that it keeps.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.generator import NUM_BASE_TOKENS, build_network, random_batch
from benchmarks.harness import alternating_medians, command_line, on_ranks, print_table
from lgm_scale.config.schema import DeepSpeedConfig, FSDPConfig, ParallelConfig
from lgm_scale.errors import exit_on_user_error
from lgm_scale.families.lgm.config import DIT_SIZES
from lgm_scale.merging.tree import MergeTree
from lgm_scale.parallel.deepspeed_internals import live_gradients, zero_shards
from lgm_scale.parallel.fsdp import shard_model
from lgm_scale.parallel.memory import measured_bytes, parameter_infos, planned_bytes
from lgm_scale.parallel.shards import local_shards
from lgm_scale.parallel.traffic import Traffic, moved_bytes

STRATEGIES = {
    "ddp": ParallelConfig(),
    "fsdp2 full": ParallelConfig(strategy="fsdp", fsdp=FSDPConfig()),
    "fsdp2 grad_op": ParallelConfig(strategy="fsdp", fsdp=FSDPConfig(shard="grad_op")),
    **{
        f"zero-{stage}": ParallelConfig(
            strategy="deepspeed", deepspeed=DeepSpeedConfig(stage=stage)
        )
        for stage in (1, 2, 3)
    },
}


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = command_line("scaling", __doc__, repeats=10)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", "--measured-size", choices=list(DIT_SIZES), default="tiny")
    parser.add_argument("--batch-size", type=int, default=8, help="per rank")
    parser.add_argument("--num-tokens", type=int, default=64)
    return parser.parse_args()


class Step:
    """One training step under one strategy, on synthetic data."""

    def __init__(self, parallel: ParallelConfig, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        net = build_network(args.size)
        self.model = nn.ModuleDict({"net": net})
        self.infos = parameter_infos(self.model, averaged=False)
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.call: Callable[..., Tensor] = net
        self.engine: Any = None
        if parallel.strategy == "fsdp":
            shard_model(self.model, parallel.fsdp or FSDPConfig(), torch.float32)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        elif parallel.strategy == "deepspeed":
            self._start_zero(parallel.deepspeed or DeepSpeedConfig())
        elif dist.get_world_size() > 1:
            self.call = nn.parallel.DistributedDataParallel(net)
        tree = MergeTree.from_embeddings(torch.randn(NUM_BASE_TOKENS, 8), 4)
        self.batch = random_batch(tree, args.num_tokens, args.batch_size, torch.device("cpu"))

    def _start_zero(self, zero: DeepSpeedConfig) -> None:
        from lgm_scale.parallel.deepspeed import EngineOptimizer, settings, start_engine

        self.engine = start_engine(
            self.model["net"], self.optimizer, settings(zero, None, bf16=False)
        )
        self.optimizer = EngineOptimizer(self.engine, self.optimizer)
        self.call = self.engine

    def backward(self) -> None:
        """Forward and backward; the squared velocity stands for the loss."""
        self.call(*self.batch).square().mean().backward()

    def __call__(self) -> None:
        """A whole step."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Weights, gradients and moments on this rank, after a backward pass."""
        if self.engine is not None:
            shards = zero_shards(self.engine, self.model["net"])
            return measured_bytes(self.model, shards, (), live_gradients(self.engine)).total
        return measured_bytes(self.model, local_shards(self.model, self.optimizer), ()).total


def _measure(args: argparse.Namespace) -> list[tuple]:
    names = [
        name
        for name, parallel in STRATEGIES.items()
        if parallel.strategy != "deepspeed" or importlib.util.find_spec("deepspeed")
    ]
    steps = {name: Step(STRATEGIES[name], args) for name in names}
    seconds = alternating_medians(steps, args.repeats)
    first, rows = next(iter(seconds.values())), []
    for name, step in steps.items():
        with Traffic() as traffic:
            step()
        step.backward()
        planned = planned_bytes(step.infos, STRATEGIES[name], dist.get_world_size()).total
        sizes = (sum(moved_bytes(traffic.transfers).values()), step.state_bytes(), planned)
        rows.append((name, seconds[name] / first, *(size / 2**20 for size in sizes)))
    return rows


def print_measured(world_size: int, args: argparse.Namespace) -> None:
    """Measure at one world size, and print what rank 0 found."""
    rows = on_ranks(world_size, _measure, args)
    print(
        f"\nmeasured: size {args.size}, {world_size} ranks over gloo on CPU, "
        f"{args.batch_size} samples of {args.num_tokens} tokens per rank, float32\n"
    )
    heads = {"strategy": "", "step, ddp = 1": ".2f", "collectives, MiB": ".1f"}
    print_table(heads | {"state, MiB": ".1f", "planned, MiB": ".1f"}, rows)


def main() -> int:
    """Measure at every world size."""
    args = parse_args()
    for world_size in args.world_sizes:
        print_measured(world_size, args)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
