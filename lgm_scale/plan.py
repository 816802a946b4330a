"""What a training run would cost, without data and without a GPU: the text of `--dry-run`."""

from __future__ import annotations

import torch
import yaml

from lgm_scale.bundle import build_generator, build_tokenizer
from lgm_scale.config import GeneratorRun, TrainingRun, to_dict
from lgm_scale.flops import dit_flops, tokenizer_flops
from lgm_scale.training.length_schedule import LengthSchedule

__all__ = ["describe"]

_BYTES = {"weights": 4, "gradients": 4, "optimizer": 8, "EMA": 4}
"""Per parameter: float32 weights and gradients, two Adam moments, the average."""


def describe(config: TrainingRun, world_size: int) -> str:
    """Resolved configuration, sizes, work per step for each K, memory per GPU, steps per epoch."""
    with torch.device("meta"):
        if isinstance(config, GeneratorRun):
            generator = build_generator(config.model)
            network, forward = generator, lambda k: dit_flops(generator, k)
        else:
            tokenizer = build_tokenizer(config.model)
            cost = tokenizer_flops(tokenizer, config.model.size)
            network, forward = tokenizer, lambda k: cost
    count = sum(parameter.numel() for parameter in network.parameters())
    sections = [
        yaml.safe_dump(to_dict(config), sort_keys=False).rstrip(),
        f"parameters   {count / 1e6:.1f} M ({count:,})",
        _work(config, forward),
        _memory(count, world_size),
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
    lines = ["   K   share of steps   tokens per step   TFLOPs per step (forward and backward)"]
    lines += [
        f"{k:4d}   {share:14.1%}   {batch * k:15,}   {3 * batch * forward(k) / 1e12:.4g}"
        for k, share in sorted(shares.items())
    ]
    return "\n".join(lines)


def _memory(count: int, world_size: int) -> str:
    """State per GPU under DDP: every rank holds all of it. Activations come on top."""
    parts = ", ".join(f"{name} {count * size / 2**30:.2f}" for name, size in _BYTES.items())
    total = count * sum(_BYTES.values()) / 2**30
    return (
        f"memory per GPU, {world_size} ranks, strategy ddp (nothing sharded), without activations: "
        f"{total:.2f} GiB ({parts})"
    )


def _epoch(config: TrainingRun) -> str:
    samples = config.data.num_samples
    if samples is None:
        return "samples per epoch   unknown: set data.num_samples to have it checked"
    steps = samples // config.train.global_batch_size
    return f"samples per epoch   {samples:,} ({steps:,} steps)"
