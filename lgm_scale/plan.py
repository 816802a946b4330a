"""What a training run would cost, without data and without a GPU: the text of `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import yaml
from torch import nn

from lgm_scale.build import build_auxiliary, build_critic
from lgm_scale.config.loading import to_dict
from lgm_scale.config.schema import (
    DeepSpeedConfig,
    FSDPConfig,
    GeneratorRun,
    ParallelConfig,
    SpatialRun,
    TokenizerRun,
    TrainingRun,
)
from lgm_scale.families.elit.bundle import build_spatial_generator
from lgm_scale.families.lgm.bundle import build_generator, build_tokenizer
from lgm_scale.families.lgm.lora import add_adapter
from lgm_scale.families.tokenizer.assets import build_frozen
from lgm_scale.flops import network_flops, tokenizer_flops
from lgm_scale.parallel.blocks import transformer_blocks
from lgm_scale.parallel.memory import ParameterInfo, parameter_infos, planned_bytes
from lgm_scale.training.batch_scaling import loader_batches, steps_per_epoch
from lgm_scale.training.length_schedule import LengthSchedule

__all__ = ["describe"]


@dataclass(frozen=True)
class Sizes:
    """Parameters: of the network that is the result, and of what only its training needs.

    All are float32; what is trained has a gradient and two moments, the network an average, too.
    Of a network with an adapter, only the adapter is trained.
    """

    network: int
    adapter: int = 0
    auxiliary: int = 0
    critic: int = 0
    frozen: int = 0

    def lines(self) -> list[str]:
        """One line per part that only the training has."""
        parts = {
            "auxiliary decoder": self.auxiliary,
            "critic's heads": self.critic,
            "frozen networks": self.frozen,
        }
        trained = f"  trained: the adapter's {self.adapter / 1e6:.2f} M, the rest is frozen"
        return [trained] * bool(self.adapter) + [
            f"  for training only: {name} {count / 1e6:.1f} M"
            for name, count in parts.items()
            if count
        ]


@dataclass(frozen=True)
class Networks:
    """What a run holds, on the meta device: the result, and what else is trained."""

    sizes: Sizes
    network: nn.Module
    others: tuple[nn.Module, ...] = ()

    def infos(self) -> list[ParameterInfo]:
        """Of all that is not a frozen network."""
        infos = parameter_infos(self.network, averaged=True)
        return infos + [i for other in self.others for i in parameter_infos(other, averaged=False)]

    @property
    def largest_block(self) -> int:
        """Parameters of the largest transformer block."""
        return max((_count(block) for block in transformer_blocks(self.network)), default=0)


def _count(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def _tokenizer_networks(config: TokenizerRun, tokenizer: nn.Module) -> Networks:
    nets = build_frozen(config, read=False)
    frozen = [net.module for net in (nets.perceptual, nets.teacher, nets.critic) if net is not None]
    auxiliary, critic = build_auxiliary(config), build_critic(config)
    sizes = Sizes(
        network=_count(tokenizer),
        auxiliary=_count(auxiliary),
        critic=_count(critic),
        frozen=sum(_count(net) for net in frozen),
    )
    return Networks(sizes, tokenizer, tuple(net for net in (auxiliary, critic) if net is not None))


def describe(config: TrainingRun, world_size: int) -> str:
    """Resolved configuration, sizes, work per step for each K, memory per rank, steps per epoch."""
    with torch.device("meta"):
        if isinstance(config, SpatialRun):
            net = build_spatial_generator(config.model, config.space)
            nets, forward = Networks(Sizes(_count(net)), net), partial(network_flops, net)
        elif isinstance(config, GeneratorRun):
            generator = build_generator(config.model)
            forward = partial(network_flops, generator)
            if config.lora is not None:
                add_adapter(generator, config.lora.rank, config.lora.alpha)
            adapter = sum(p.numel() for p in generator.parameters() if p.requires_grad)
            sizes = Sizes(_count(generator), adapter if config.lora is not None else 0)
            nets = Networks(sizes, generator)
        else:
            tokenizer = build_tokenizer(config.model)
            cost = tokenizer_flops(tokenizer, config.model.size)
            nets, forward = _tokenizer_networks(config, tokenizer), lambda k: cost
    count, sizes = nets.sizes.network, nets.sizes
    sections = [
        yaml.safe_dump(to_dict(config), sort_keys=False).rstrip(),
        "\n".join([f"parameters   {count / 1e6:.1f} M ({count:,})", *sizes.lines()]),
        _work(config, forward),
        _memory(config, nets, world_size),
        _epoch(config),
    ]
    return "\n\n".join(sections)


def _work(config: TrainingRun, forward) -> str:
    """One line per K: its share of the steps, tokens and FLOPs of a step."""
    batch = config.train.global_batch_size
    lengths = config.lengths
    schedule = LengthSchedule(lengths.choices, lengths.weights, config.seed)
    if schedule.probabilities is None:
        shares = {
            k: lengths.choices.count(k) / len(lengths.choices) for k in sorted(set(lengths.choices))
        }
    else:
        shares = dict(zip(lengths.choices, schedule.probabilities, strict=True))
    # Three forward passes' worth; a frozen network's weights need no gradient.
    passes = 2 if isinstance(config, GeneratorRun) and config.lora is not None else 3
    lines = [
        "   K   share of steps   tokens per step   TFLOPs per step (network, forward and backward)"
    ]
    scaled = config.train.batch_scaling == "constant_tokens"
    for k, share in sorted(shares.items()):
        samples = batch * (loader_batches(schedule, k) if scaled else 1)
        work = passes * samples * forward(k) / 1e12
        lines.append(f"{k:4d}   {share:14.1%}   {samples * k:15,}   {work:.4g}")
    return "\n".join(lines)


def _memory(config: TrainingRun, nets: Networks, world_size: int) -> str:
    """State per rank under every strategy, that of the configuration first. In GiB."""
    infos = nets.infos()
    frozen = nets.sizes.frozen * 4 / 2**30
    rows = [
        f"memory per rank in GiB, {world_size} ranks, without activations"
        + (f"; {frozen:.2f} of it are frozen networks" if frozen else ""),
        "  strategy          total   weights  gradients  optimizer    EMA   gathered at once",
    ]
    chosen = _label(config.parallel)
    strategies = {chosen: config.parallel} | {_label(other): other for other in _STRATEGIES}
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


def _label(parallel: ParallelConfig) -> str:
    if parallel.strategy == "fsdp":
        fsdp = parallel.fsdp or FSDPConfig()
        return f"fsdp2 {fsdp.shard}{' offload' if fsdp.cpu_offload else ''}"
    if parallel.strategy == "deepspeed":
        zero = parallel.deepspeed or DeepSpeedConfig()
        return f"zero-{zero.stage}{'' if zero.offload == 'none' else ' offload'}"
    return "ddp"


def _gathered(nets: Networks, parallel: ParallelConfig) -> int:
    """Bytes of whole weights and gradients of blocks in flight: this one and the next."""
    sharded = parallel.strategy == "fsdp" or (
        parallel.strategy == "deepspeed" and (parallel.deepspeed or DeepSpeedConfig()).stage == 3
    )
    if not sharded:
        return 0
    if parallel.fsdp is not None and parallel.fsdp.shard == "grad_op":
        return 4 * nets.sizes.network
    return 4 * (2 + 1) * nets.largest_block


def _epoch(config: TrainingRun) -> str:
    samples = config.data.num_samples
    if samples is None:
        return "samples per epoch   unknown: set data.num_samples to have it checked"
    steps, most = samples // config.train.global_batch_size, ""
    if config.train.batch_scaling == "constant_tokens":
        schedule = LengthSchedule(config.lengths.choices)
        steps, most = steps_per_epoch(schedule, steps), "at most "
    return f"samples per epoch   {samples:,} ({most}{steps:,} steps)"
