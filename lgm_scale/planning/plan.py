"""What a training run would cost, without data and without a GPU: the text of `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import yaml
from torch import nn

from lgm_scale.config.loading import to_dict
from lgm_scale.config.rules import uncompiled_reason
from lgm_scale.config.schema import (
    DeepSpeedConfig,
    FSDPConfig,
    ParallelConfig,
    TrainingRun,
)
from lgm_scale.families.base import Companions, family_of
from lgm_scale.initial_weights import planned_lines
from lgm_scale.parallel.blocks import transformer_blocks
from lgm_scale.parallel.memory import ParameterInfo, parameter_infos, planned_bytes
from lgm_scale.planning.options import PlanOptions
from lgm_scale.planning.workload import (
    cost_at,
    length_shares,
    samples_of_step,
    steps_of_epoch,
    storage_words,
    strategy_label,
)
from lgm_scale.weights import Unfilled


@dataclass(frozen=True)
class Networks:
    """What a run holds, on the meta device: the result, and what only its training needs.

    All parameters are float32; what is trained has a gradient and two moments, the network an
    average, too. Of a network with an adapter, only the adapter is trained.
    """

    network: nn.Module
    companions: Companions
    passes: int
    """What a training step costs, in forward passes."""

    def infos(self) -> list[ParameterInfo]:
        """Parameters of all that is not a frozen network."""
        infos = parameter_infos(self.network, averaged=True)
        for net in self.companions.trained.values():
            infos += parameter_infos(net, averaged=False)
        return infos

    @property
    def num_parameters(self) -> int:
        """Parameters of the network."""
        return _count(self.network)

    @property
    def num_frozen(self) -> int:
        """Parameters of the networks that losses look through."""
        return sum(_count(net) for net in self.companions.frozen)

    @property
    def largest_block(self) -> int:
        """Parameters of the largest transformer block."""
        return max((_count(block) for block in transformer_blocks(self.network)), default=0)

    def lines(self) -> list[str]:
        """One line for the network, and one per part that only the training has."""
        count = self.num_parameters
        lines = [f"parameters   {count / 1e6:.1f} M ({count:,})"]
        trained = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        if trained < count:
            lines.append(f"  trained: the adapter's {trained / 1e6:.2f} M, the rest is frozen")
        parts = {name: _count(net) for name, net in self.companions.trained.items()}
        parts["frozen networks"] = self.num_frozen
        lines += [
            f"  for training only: {name} {part / 1e6:.1f} M"
            for name, part in parts.items()
            if part
        ]
        return lines


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def networks(config: TrainingRun) -> Networks:
    """What a run holds, without a number in it."""
    family = family_of(config)
    for library in family.libraries(config):
        import_module(library)
    with torch.device("meta"), Unfilled():
        nets = family.network(config), family.companions(config)
    return Networks(*nets, family.forward_passes(config))


def describe(config: TrainingRun, world_size: int, options: PlanOptions | None = None) -> str:
    """Resolved configuration, sizes, work per step for each K, memory per rank, steps, cost."""
    nets = networks(config)
    sections = [
        yaml.safe_dump(to_dict(config), sort_keys=False).rstrip(),
        "\n".join([*nets.lines(), *planned_lines(config, nets.network)]),
        _work(config, nets),
        _memory(config, nets, world_size),
        _epoch(config),
        *_compiled(config),
        cost_line(config, nets, world_size, options or PlanOptions()),
    ]
    if options is None or not (options.simulate or options.advise):
        sections.append(
            "activations, collectives and time   --dry-run --simulate; a strategy that fits: "
            "--dry-run --advise --gpu-memory 80GB"
        )
    return "\n\n".join(sections)


def _work(config: TrainingRun, nets: Networks) -> str:
    """One line per K: its share of the steps or of their samples, tokens and FLOPs of a step."""
    network: Any = nets.network
    spread = family_of(config).spreads_lengths(config)  # then lines are parts of every step
    lines = [
        f"   K   share of {'batch' if spread else 'steps'}   tokens per step   "
        "TFLOPs per step (network, forward and backward)"
    ]
    for k, share in length_shares(config).items():
        samples = round(samples_of_step(config, k) * (share if spread else 1))
        work = nets.passes * samples * network.flops(k) / 1e12
        lines.append(f"{k:4d}   {share:14.1%}   {samples * k:15,}   {work:.4g}")
    return "\n".join(lines)


def cost_line(config: TrainingRun, nets: Networks, world_size: int, options: PlanOptions) -> str:
    """Hours, energy and price at a stated utilisation, and bytes on disk: one line."""
    gpu, utilisation = options.gpus[0], options.utilisation
    network: Any = nets.network
    cost = cost_at(config, network.flops, world_size, gpu, utilisation)
    words = "hours unknown (set data.num_samples)" if cost is None else cost.words(options.price)
    losses = ", without the losses' networks" if nets.num_frozen else ""
    whole = planned_bytes(nets.infos(), ParallelConfig(), 1)
    storage = storage_words(config, whole.total - whole.gradients)
    return (
        f"computed   {world_size} x {gpu.name} at {utilisation:.0%} of the peak{losses}: {words}; "
        f"{storage}"
    )


def _memory(config: TrainingRun, nets: Networks, world_size: int) -> str:
    """State per rank under every strategy, that of the configuration first. In GiB."""
    infos = nets.infos()
    frozen = nets.num_frozen * 4 / 2**30
    rows = [
        f"memory per rank in GiB, {world_size} ranks, without activations"
        + (f"; {frozen:.2f} of it are frozen networks" if frozen else ""),
        "  strategy          total   weights  gradients  optimizer    EMA   gathered at once",
    ]
    chosen = strategy_label(config.parallel)
    strategies = {chosen: config.parallel} | {strategy_label(other): other for other in _STRATEGIES}
    for label, parallel in strategies.items():
        planned = planned_bytes(infos, parallel, world_size)
        parts = (planned.weights, planned.gradients, planned.optimizer, planned.ema)
        gathered = _gathered(nets, parallel)
        total = (planned.total - planned.on_host) / 2**30 + frozen
        rows.append(
            f"{'>' if label == chosen else ' '} {label:15s} {total:8.2f}"
            + "".join(f" {part / 2**30:9.2f}" for part in parts)
            + f" {gathered / 2**30:9.2f}"
            + (f"   and {planned.on_host / 2**30:.2f} on the host" if planned.on_host else "")
        )
    return "\n".join(rows)


_STRATEGIES = (
    ParallelConfig(),
    *(ParallelConfig(strategy="fsdp", fsdp=FSDPConfig(shard=s)) for s in ("full", "hybrid")),
    *(
        ParallelConfig(strategy="deepspeed", deepspeed=DeepSpeedConfig(stage=stage))
        for stage in (1, 2, 3)
    ),
)


def _gathered(nets: Networks, parallel: ParallelConfig) -> int:
    """Bytes of whole weights and gradients of blocks in flight: this one and the next."""
    sharded = parallel.strategy == "fsdp" or (
        parallel.strategy == "deepspeed" and (parallel.deepspeed or DeepSpeedConfig()).stage == 3
    )
    if not sharded:
        return 0
    if parallel.fsdp is not None and parallel.fsdp.shard == "grad_op":
        return 4 * nets.num_parameters
    return 4 * (2 + 1) * nets.largest_block


def _compiled(config: TrainingRun) -> list[str]:
    """What `auto` means for this run."""
    if config.train.compile != "auto":
        return []
    on = "train.compile: auto is on, on GPUs; a CPU, or a GPU whose compiler fails, goes without"
    return [uncompiled_reason(config) or on]


def _epoch(config: TrainingRun) -> str:
    samples = config.data.num_samples
    if samples is None:
        return "samples per epoch   unknown: set data.num_samples to have it checked"
    most = "at most " if config.train.batch_scaling == "constant_tokens" else ""
    return f"samples per epoch   {samples:,} ({most}{steps_of_epoch(config):,} steps)"
