"""What a training run would cost, without data and without a GPU: the text of `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import yaml
from torch import nn

from lgm_scale.build import build_auxiliary, build_critic
from lgm_scale.bundle import build_generator, build_tokenizer
from lgm_scale.config import GeneratorRun, TokenizerRun, TrainingRun, to_dict
from lgm_scale.flops import dit_flops, tokenizer_flops
from lgm_scale.models.assets import build_frozen
from lgm_scale.models.lora import add_adapter
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


def _count(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def _tokenizer_sizes(config: TokenizerRun, tokenizer: nn.Module) -> Sizes:
    nets = build_frozen(config, read=False)
    frozen = [net.module for net in (nets.perceptual, nets.teacher, nets.critic) if net is not None]
    return Sizes(
        network=_count(tokenizer),
        auxiliary=_count(build_auxiliary(config)),
        critic=_count(build_critic(config)),
        frozen=sum(_count(net) for net in frozen),
    )


def describe(config: TrainingRun, world_size: int) -> str:
    """Resolved configuration, sizes, work per step for each K, memory per GPU, steps per epoch."""
    with torch.device("meta"):
        if isinstance(config, GeneratorRun):
            generator = build_generator(config.model)
            forward = lambda k: dit_flops(generator, k)  # noqa: E731  as for tokenizers below
            if config.lora is not None:
                add_adapter(generator, config.lora.rank, config.lora.alpha)
            adapter = sum(p.numel() for p in generator.parameters() if p.requires_grad)
            sizes = Sizes(_count(generator), adapter if config.lora is not None else 0)
        else:
            tokenizer = build_tokenizer(config.model)
            cost = tokenizer_flops(tokenizer, config.model.size)
            sizes, forward = _tokenizer_sizes(config, tokenizer), lambda k: cost
    count = sizes.network
    sections = [
        yaml.safe_dump(to_dict(config), sort_keys=False).rstrip(),
        "\n".join([f"parameters   {count / 1e6:.1f} M ({count:,})", *sizes.lines()]),
        _work(config, forward),
        _memory(sizes, world_size),
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


def _memory(sizes: Sizes, world_size: int) -> str:
    """State per GPU under DDP: every rank holds all of it. Activations come on top."""
    averaged = sizes.adapter or sizes.network
    trained = averaged + sizes.auxiliary + sizes.critic
    held = {
        "weights": (sizes.network + sizes.auxiliary + sizes.critic) * 4,
        "gradients": trained * 4,
        "optimizer": trained * 8,
        "EMA": averaged * 4,
        "frozen networks": sizes.frozen * 4,
    }
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in held.items() if size)
    return (
        f"memory per GPU, {world_size} ranks, strategy ddp (nothing sharded), without activations: "
        f"{sum(held.values()) / 2**30:.2f} GiB ({parts})"
    )


def _epoch(config: TrainingRun) -> str:
    samples = config.data.num_samples
    if samples is None:
        return "samples per epoch   unknown: set data.num_samples to have it checked"
    steps, most = samples // config.train.global_batch_size, ""
    if config.train.batch_scaling == "constant_tokens":
        schedule = LengthSchedule(config.lengths.choices)
        steps, most = steps_per_epoch(schedule, steps), "at most "
    return f"samples per epoch   {samples:,} ({most}{steps:,} steps)"
