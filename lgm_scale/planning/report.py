"""What a simulated step says: memory, collectives, time, hours; and what fits. Text."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lgm_scale.config.rules import uncompiled_reason
from lgm_scale.config.schema import ParallelConfig, TrainingRun
from lgm_scale.families.base import family_of
from lgm_scale.parallel.memory import ParameterInfo
from lgm_scale.planning.advice import advise
from lgm_scale.planning.options import PlanOptions
from lgm_scale.planning.plan import Networks, networks
from lgm_scale.planning.prediction import StepTime, predict
from lgm_scale.planning.strategies import PlannedStep, StepShape, plan_step
from lgm_scale.planning.workload import (
    Cost,
    flops_per_sample,
    length_shares,
    micro_batch_lengths,
    samples_of_step,
    steps_of_run,
    strategy_label,
)

MOST_LENGTHS = 4
"""Token counts that are simulated; the time at others lies between those of their neighbours."""
GIB = 2**30


def print_simulation(config: TrainingRun, world_size: int, options: PlanOptions) -> int:
    """Print what `--simulate` and `--advise` ask for; the exit status.

    Raises: ConfigError if nothing fits.
    """
    nets = networks(config)
    infos = nets.infos()
    chosen = max(config.lengths.choices)
    why = "does not say what a step is without data (Family.rehearsal, docs/extending.md)"
    try:
        step = plan_step(config, infos, world_size, step_shape(config, world_size, chosen))
    except RuntimeError as error:  # a number was asked for, and fake tensors have none
        step, why = None, f"has a step that shapes alone do not run ({str(error).splitlines()[0]})"
    if step is None:
        print(f"\nnot simulated: task {config.task} {why}; what stands above is its plan")
        return 0
    if options.simulate:
        print("\n" + _memory(config, infos, world_size, step), flush=True)
        print("\n" + _collectives(config, step), flush=True)
        print("\n" + _times(config, nets, world_size, step, options), flush=True)
    if options.advise:
        print("\n" + advise(config, nets, world_size, options))
    sys.stdout.flush()
    return 0


def step_shape(config: TrainingRun, world_size: int, num_tokens: int) -> StepShape:
    """Micro-batches of a rank's step, as configured: at K, or where it holds all lengths, those."""
    samples = -(-samples_of_step(config, num_tokens) // world_size)
    size, tokens = config.train.device_microbatch_size, config.train.device_microbatch_tokens
    if tokens is not None:
        size = min(samples, tokens // num_tokens)
        return StepShape(size, num_tokens, -(-samples // size))
    times = samples_of_step(config, num_tokens) // config.train.global_batch_size
    size = samples if size is None else min(samples, size * times)
    lengths = micro_batch_lengths(config, size, num_tokens)
    return StepShape(size, lengths, -(-samples // size))


def _memory(
    config: TrainingRun, infos: Sequence[ParameterInfo], world_size: int, step: PlannedStep
) -> str:
    """The configured strategy, and others at the same micro-batch."""
    shape = step_shape(config, world_size, max(config.lengths.choices))
    ratio = config.parallel.activation_checkpointing
    rows = [
        f"simulated: one of {world_size} ranks, K = {shape.words}, {shape.micro_batches} "
        f"micro-batch(es) of {shape.num_samples} samples, {config.train.precision}, uncompiled, "
        f"{ratio:.0%} of the blocks computed again",
        "  peak of memory in GiB     total   of it state",
        _row(">", strategy_label(config.parallel), step),
    ]
    for name in ("ddp", "fsdp"):
        other = ParallelConfig(strategy=name, activation_checkpointing=ratio)  # type: ignore[arg-type]
        if name != config.parallel.strategy:
            found = plan_step(replace(config, parallel=other), infos, world_size, shape)
            assert found is not None
            rows.append(_row(" ", strategy_label(other), found))
    return "\n".join(rows)


def _row(mark: str, label: str, step: PlannedStep) -> str:
    note = f"   ({step.derived})" if step.derived else ""
    return f"{mark} {label:20s} {step.peak / GIB:10.2f} {step.state / GIB:13.2f}{note}"


def _collectives(config: TrainingRun, step: PlannedStep) -> str:
    """One line per kind, size of a number and number of ranks."""
    if not step.moved:
        return "collectives of a step: none, there is one rank"
    counts: Counter[tuple[str, int, int]] = Counter()
    sizes: Counter[tuple[str, int, int]] = Counter()
    for each in step.moved:
        key = (each.transfer.operation, each.transfer.itemsize, each.ranks)
        counts[key] += 1
        sizes[key] += each.transfer.nbytes
    rows = [
        f"collectives of a step under {strategy_label(config.parallel)}, whole tensors, padding "
        "included",
        "  operation        times            bytes   bytes of a number   ranks",
    ]
    for key in counts:
        name, itemsize, ranks = key
        rows.append(f"  {name:15s} {counts[key]:6d} {sizes[key]:16,} {itemsize:19d} {ranks:7d}")
    return "\n".join(rows)


def _times(
    config: TrainingRun, nets: Networks, world_size: int, longest: PlannedStep, options: PlanOptions
) -> str:
    lengths = sorted(set(config.lengths.choices))
    if family_of(config).spreads_lengths(config):
        lengths = lengths[-1:]  # all steps are equal
    places = np.linspace(0, len(lengths) - 1, min(MOST_LENGTHS, len(lengths)))
    steps: dict[int, PlannedStep] = {}
    for k in [lengths[round(place)] for place in places]:
        found = longest
        if k != lengths[-1]:
            shape = step_shape(config, world_size, k)
            found = plan_step(config, nets.infos(), world_size, shape) or longest
        steps[k] = found
    reason = uncompiled_reason(config)
    form = "compiled" if reason is None else f"uncompiled ({reason})"
    errors = sorted({gpu.error for gpu in options.gpus})
    rows = [
        f"PREDICTED time of a step, {form}; nothing has run on a GPU, expect "
        f"{' to '.join(f'{error:.0%}' for error in errors)} either way",
        "  GPU                  K   ms of a step   products   others   update   exposed   "
        "images/s   of the peak",
    ]
    totals = []
    for gpu in options.gpus:
        seconds = {}
        for k, step in steps.items():
            shape = step_shape(config, world_size, k)
            time = predict(step, shape.micro_batches, gpu, reason is None, model_flops(nets, shape))
            seconds[k] = time.total
            rows.append(_time_row(gpu.name, shape.words, time, samples_of_step(config, k)))
        totals.append((gpu, mean_seconds(config, seconds)))
    count = steps_of_run(config)
    if count is None:
        return "\n".join([*rows, "hours of the run: unknown; set data.num_samples"])
    for gpu, each in totals:
        cost = Cost(count * each / 3600, world_size, gpu.watts)
        rows.append(f"  {world_size} x {gpu.name}, {count:,} steps: {cost.words(options.price)}")
    return "\n".join(rows)


def model_flops(nets: Networks, shape: StepShape) -> float:
    """Operations of the network alone in a step of one rank, forward and backward."""
    network: Any = nets.network
    samples = shape.num_samples * shape.micro_batches
    return nets.passes * samples * flops_per_sample(network.flops, shape.num_tokens)


def mean_seconds(config: TrainingRun, seconds: dict[int, float]) -> float:
    """Mean over the run's token counts, between those that are known by straight lines."""
    known = sorted(seconds)
    times = [seconds[k] for k in known]
    return sum(
        share * float(np.interp(k, known, times)) for k, share in length_shares(config).items()
    )


def _time_row(name: str, k: str, time: StepTime, images: int) -> str:
    parts = (time.products, time.others, time.update, time.exposed)
    columns = zip(parts, (11, 9, 9, 10), strict=True)
    return (
        f"  {name:17s} {k:>4s} {time.total * 1e3:14.1f}"
        + "".join(f"{part * 1e3:{width}.1f}" for part, width in columns)
        + f"{images / time.total:11,.0f}{time.utilisation:14.1%}"
    )
