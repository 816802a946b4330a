"""How much a run computes, reads and keeps, and its hours at a stated utilisation.

What is computed of the network alone; a network that only the losses look through costs besides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lgm_scale.config.schema import DeepSpeedConfig, FSDPConfig, ParallelConfig, TrainingRun
from lgm_scale.families.base import family_of
from lgm_scale.planning.hardware import GPU
from lgm_scale.storage.clients import is_remote
from lgm_scale.training.length_schedule import (
    LengthSchedule,
    loader_batches,
    spread_lengths,
    steps_per_epoch,
)


def micro_batch_lengths(
    config: TrainingRun, num_samples: int, num_tokens: int
) -> int | tuple[int, ...]:
    """K of a micro-batch: `num_tokens`, or where steps hold all lengths that of each sample.

    Of ranks and micro-batches that differ by a sample, the one with the most tokens.
    """
    if not family_of(config).spreads_lengths(config):
        return num_tokens
    return tuple(spread_lengths(config.lengths.choices, num_samples))


def flops_per_sample(flops: Callable[[int], float], num_tokens: int | Sequence[int]) -> float:
    """Operations of a forward pass of one sample at K tokens, or the mean of several."""
    if isinstance(num_tokens, int):
        return flops(num_tokens)
    return sum(map(flops, num_tokens)) / len(num_tokens)


def length_shares(config: TrainingRun) -> dict[int, float]:
    """Share of the steps at each K, rising; of the samples, where every step holds all lengths."""
    lengths = config.lengths
    if family_of(config).spreads_lengths(config):
        spread = spread_lengths(lengths.choices, config.train.global_batch_size)
        return {k: spread.count(k) / len(spread) for k in sorted(set(spread))}
    schedule = LengthSchedule(lengths.choices, lengths.weights, config.seed)
    if schedule.probabilities is None:
        count = len(lengths.choices)
        return {k: lengths.choices.count(k) / count for k in sorted(set(lengths.choices))}
    shares = dict.fromkeys(sorted(set(lengths.choices)), 0.0)
    for k, share in zip(lengths.choices, schedule.probabilities, strict=True):
        shares[k] += float(share)
    return shares


def samples_of_step(config: TrainingRun, num_tokens: int) -> int:
    """Samples of a step at K, on all ranks together."""
    schedule = LengthSchedule(config.lengths.choices, config.lengths.weights, config.seed)
    scaled = config.train.batch_scaling == "constant_tokens"
    times = loader_batches(schedule, num_tokens) if scaled else 1
    return config.train.global_batch_size * times


def steps_of_epoch(config: TrainingRun) -> int | None:
    """Steps of an epoch, at most; None where `data.num_samples` is not given."""
    if config.data.num_samples is None:
        return None
    steps = config.data.num_samples // config.train.global_batch_size
    if config.train.batch_scaling == "constant_tokens":
        return steps_per_epoch(LengthSchedule(config.lengths.choices), steps)
    return steps


def steps_of_run(config: TrainingRun) -> int | None:
    """Steps of the whole run; None for a duration in epochs of unknown size."""
    match = re.fullmatch(r"(\d+)(ba|ep)", config.train.max_duration)
    if match is None:
        return None
    if match[2] == "ba":
        return int(match[1])
    steps = steps_of_epoch(config)
    return None if steps is None else int(match[1]) * steps


@dataclass(frozen=True)
class Cost:
    """What a whole run takes of `ranks` GPUs."""

    hours: float
    ranks: int
    watts: float

    def words(self, price: float | None = None) -> str:
        """`52 hours, 415 kWh`, and with a price per GPU and hour the money."""
        energy = self.hours * self.ranks * self.watts / 1000
        words = f"{_round(self.hours)} hours, {_round(energy)} kWh at {self.watts:.0f} W per GPU"
        if price is None:
            return words
        return f"{words}, {_round(price * self.hours * self.ranks)} at {price:g} per GPU and hour"


def cost_at(
    config: TrainingRun,
    flops: Callable[[int], float],
    ranks: int,
    gpu: GPU,
    utilisation: float,
) -> Cost | None:
    """Cost at a stated share of the peak; None if the number of steps is not known.

    Args:
        config: The run.
        flops: Operations of a forward pass of one sample at K.
        ranks: GPUs.
        gpu: Which.
        utilisation: Share of the peak at the run's precision.
    """
    steps = steps_of_run(config)
    if steps is None:
        return None
    passes = family_of(config).forward_passes(config)
    work = sum(
        share * passes * samples_of_step(config, k) * flops(k)
        for k, share in length_shares(config).items()
    )
    half = config.train.precision == "amp_bf16"
    peak = (gpu.half_tflops if half else gpu.float_tflops) * 1e12
    return Cost(steps * work / (ranks * peak * utilisation) / 3600, ranks, gpu.watts)


def storage_words(config: TrainingRun, state_bytes: int) -> str:
    """`42 GB of data, 2 states of 10.8 GB`, with the cache of data in object storage."""
    each, count = family_of(config).sample_bytes(config), config.data.num_samples
    data = "data of unknown size"
    if each is not None and count is not None:
        data = f"{_round(each * count / 1e9)} GB of data"
    kept = config.checkpoint.keep
    words = f"{data}, {kept} state{'s' if kept > 1 else ''} of {_round(state_bytes / 1e9)} GB"
    if any(is_remote(source.path) for source in config.data.sources):
        words += f", cache of {config.data.cache_limit or 'all data'} per node"
    return words


def _round(value: float) -> str:
    """Three digits of small numbers, whole large ones."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def strategy_label(parallel: ParallelConfig) -> str:
    """What a strategy is called in tables."""
    if parallel.strategy == "fsdp":
        fsdp = parallel.fsdp or FSDPConfig()
        return f"fsdp2 {fsdp.shard}{' offload' if fsdp.cpu_offload else ''}"
    if parallel.strategy == "deepspeed":
        zero = parallel.deepspeed or DeepSpeedConfig()
        return f"zero-{zero.stage}{'' if zero.offload == 'none' else ' offload'}"
    return "ddp"
