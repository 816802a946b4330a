"""The fastest strategy, micro-batch and activation checkpointing that fit into a GPU.

Memory is that of simulated steps. A step's operations do not change with the size of a
micro-batch, and each storage grows with it along a straight line: two simulated sizes give the
peak of every other one, but for frees that change places (a test finds less than 0.5 %).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lgm_scale.config.rules import broken_rules, uncompiled_reason
from lgm_scale.config.schema import DeepSpeedConfig, FSDPConfig, ParallelConfig, TrainingRun
from lgm_scale.errors import ConfigError
from lgm_scale.families.base import family_of
from lgm_scale.parallel.memory import planned_bytes
from lgm_scale.planning.hardware import GPU
from lgm_scale.planning.options import PlanOptions
from lgm_scale.planning.plan import Networks
from lgm_scale.planning.prediction import StepTime, predict
from lgm_scale.planning.simulation import Simulated, simulate
from lgm_scale.planning.strategies import PlannedStep, StepShape, plan_step, shard_ranks
from lgm_scale.planning.workload import (
    flops_per_sample,
    micro_batch_lengths,
    samples_of_step,
    strategy_label,
)

RESERVE = 1.5 * 2**30
"""Bytes that the driver, NCCL and the libraries take, and a plan does not see: our estimate."""
FRAGMENTATION = 0.05
"""Share of the memory that an allocator cannot give out: our estimate."""
RATIOS = (0.0, 0.5, 1.0)
LOW, HIGH = 8, 16
"""Samples of the two micro-batches that are simulated."""
STRATEGIES = (
    ParallelConfig(),
    ParallelConfig(strategy="fsdp", fsdp=FSDPConfig()),
    ParallelConfig(strategy="fsdp", fsdp=FSDPConfig(shard="hybrid")),
    *(
        ParallelConfig(strategy="deepspeed", deepspeed=DeepSpeedConfig(stage=stage))
        for stage in (1, 2, 3)
    ),
)
GIB = 2**30


@dataclass(frozen=True)
class Choice:
    """A strategy with its numbers."""

    config: TrainingRun
    shape: StepShape
    step: PlannedStep
    time: StepTime | None = None

    @property
    def speed(self) -> float:
        """Images per second on one rank; 0 while not known."""
        images = self.shape.num_samples * self.shape.micro_batches
        return images / self.time.total if self.time else 0.0

    def words(self, world_size: int) -> str:
        """Strategy, micro-batch, checkpointing, memory and speed."""
        ratio = self.config.parallel.activation_checkpointing
        speed = f", {self.speed * world_size:,.0f} images/s" if self.time else ""
        return (
            f"{strategy_label(self.config.parallel):13s} micro-batch {self.shape.num_samples:4d}, "
            f"activation_checkpointing {ratio:g}: {self.step.peak / GIB:6.1f} GiB{speed}"
        )

    def overrides(self, given: ParallelConfig) -> str:
        """What makes the given configuration this one, as on a command line."""
        parallel, parts = self.config.parallel, []
        if given.fsdp is not None and parallel.strategy != "fsdp":
            parts.append("parallel.fsdp=null")
        if given.deepspeed is not None and parallel.strategy != "deepspeed":
            parts.append("parallel.deepspeed=null")
        parts.append(f"parallel.strategy={parallel.strategy}")
        if parallel.fsdp is not None:
            parts.append(f"parallel.fsdp.shard={parallel.fsdp.shard}")
        if parallel.deepspeed is not None:
            parts.append(f"parallel.deepspeed.stage={parallel.deepspeed.stage}")
        parts.append(f"parallel.activation_checkpointing={parallel.activation_checkpointing:g}")
        return " ".join([*parts, *self._micro_batch()])

    def _micro_batch(self) -> list[str]:
        """As tokens where the run has several lengths and its family takes it, so that all fill."""
        size, train = self.shape.num_samples, self.config.train
        own = {"device_microbatch_size": size, "device_microbatch_tokens": None}
        by_tokens = {
            "device_microbatch_size": None,
            "device_microbatch_tokens": size * max(self.config.lengths.choices),
        }
        run = replace(self.config, train=replace(train, **by_tokens))  # type: ignore[arg-type]
        several = len(set(self.config.lengths.choices)) > 1
        if several and not broken_rules(run, 1, None):
            own = by_tokens
        return [
            f"train.{name}={'null' if value is None else value}"
            for name, value in own.items()
            if value is not None or getattr(train, name) is not None
        ]


class Search:
    """All that fits of what may be configured, at the largest K."""

    def __init__(
        self, config: TrainingRun, nets: Networks, world_size: int, options: PlanOptions
    ) -> None:
        self.config, self.nets, self.world_size = config, nets, world_size
        self.infos = nets.infos()
        self.use(options.gpus[0], options.memory)
        self.num_tokens = max(config.lengths.choices)
        self.per_rank = samples_of_step(config, self.num_tokens) // world_size
        spread = family_of(config).spreads_lengths(config)
        whole = len(config.lengths.choices) if spread else 1  # all lengths have their exact shares
        self.low, self.high = LOW * whole, HIGH * whole
        self._lines: dict[tuple[bool, float], tuple[Simulated, Simulated]] = {}
        self._works: dict[tuple[float, int], PlannedStep] = {}

    def use(self, gpu: GPU, memory: int | None = None) -> None:
        """Look for what fits into this GPU from now on, or into a stated memory."""
        self.gpu = gpu
        self.memory = memory or int(gpu.memory_gib * GIB)

    @property
    def usable(self) -> int:
        """Bytes that a step may take."""
        return max(0, int(self.memory * (1 - FRAGMENTATION) - RESERVE))

    def choices(self) -> Iterator[Choice]:
        """For each strategy and ratio that the rules allow, the largest micro-batch that fits.

        The least is yielded where none does.
        """
        for parallel in STRATEGIES:
            for ratio in RATIOS:
                own = replace(parallel, activation_checkpointing=ratio)
                own = replace(own, timeout_seconds=self.config.parallel.timeout_seconds)
                config = replace(self.config, parallel=own)
                if _is_hybrid(own) and shard_ranks(own, self.world_size) == self.world_size:
                    continue  # one node: the same as full
                if self.world_size == 1 and own.strategy != "ddp":
                    continue
                if broken_rules(config, self.world_size, None):
                    continue
                fitting = self.largest(config)
                yield fitting
                if fitting.shape.num_samples == self.per_rank:
                    break  # computing again would only cost

    def largest(self, config: TrainingRun) -> Choice:
        """The configuration at the largest micro-batch that fits; at one sample if none does."""
        sizes = [n for n in range(self.per_rank, 0, -1) if self.per_rank % n == 0]
        choices = (self._choice(config, size) for size in sizes)
        last = None
        for last in choices:
            if last.step.peak <= self.usable:
                break
        assert last is not None
        return last

    def timed(self, choice: Choice) -> Choice:
        """The same with its predicted time."""
        parallel, size = choice.config.parallel, choice.shape.num_samples
        key = (parallel.activation_checkpointing, size)
        if key not in self._works:
            alone = replace(
                choice.config,
                parallel=ParallelConfig(activation_checkpointing=parallel.activation_checkpointing),
            )
            found = plan_step(alone, self.infos, 1, StepShape(size, self._lengths(size)))
            assert found is not None
            self._works[key] = found
        step = replace(choice.step, passes=self._works[key].passes)
        network: Any = self.nets.network
        each = flops_per_sample(network.flops, self._lengths(size))
        flops = self.nets.passes * self.per_rank * each
        times = choice.shape.micro_batches
        time = predict(step, times, self.gpu, uncompiled_reason(choice.config) is None, flops)
        return replace(choice, time=time)

    def _choice(self, config: TrainingRun, size: int) -> Choice:
        shape = StepShape(size, self._lengths(size), self.per_rank // size)
        simulated = self._simulated(config, size, shape.micro_batches)
        step = plan_step(config, self.infos, self.world_size, shape, simulated=simulated)
        assert step is not None
        if _is_hybrid(config.parallel):  # simulated under full: the state is another one
            full = replace(config.parallel, fsdp=FSDPConfig())
            more = (
                planned_bytes(self.infos, config.parallel, self.world_size).total
                - planned_bytes(self.infos, full, self.world_size).total
            )
            step = replace(step, state=step.state + more, peak=step.peak + more)
        return Choice(config, shape, step)

    def _simulated(self, config: TrainingRun, size: int, micro_batches: int) -> Simulated:
        parallel = config.parallel
        key = (parallel.strategy == "fsdp", parallel.activation_checkpointing)
        if key not in self._lines:
            self._lines[key] = (self._simulate(config, self.low), self._simulate(config, self.high))
        first, second = self._lines[key]
        if len(first.live) != len(second.live):  # other operations at another size
            first = second = self._simulate(config, size)
        part = (size - self.low) / (self.high - self.low)
        live = first.live + (second.live - first.live) * part
        activations = first.activations + (second.activations - first.activations) * part
        if micro_batches > 1:  # gradients of the first are there in the passes of the others
            sharded = parallel if parallel.strategy == "fsdp" else ParallelConfig()
            kept = planned_bytes(self.infos, sharded, self.world_size).gradients
            live = np.maximum(live, first.state + kept + activations.max())
        return replace(first, live=live, activations=activations)

    def _lengths(self, size: int) -> int | tuple[int, ...]:
        return micro_batch_lengths(self.config, size, self.num_tokens)

    def _simulate(self, config: TrainingRun, size: int) -> Simulated:
        """One micro-batch under FSDP2 over all ranks, or alone."""
        own = replace(config.parallel, fsdp=None, deepspeed=None)
        ranks = self.world_size if own.strategy == "fsdp" else 1
        found = simulate(replace(config, parallel=own), ranks, size, self._lengths(size))
        assert found is not None  # asked before
        return found


def _is_hybrid(parallel: ParallelConfig) -> bool:
    return parallel.fsdp is not None and parallel.fsdp.shard == "hybrid"


def advise(config: TrainingRun, nets: Networks, world_size: int, options: PlanOptions) -> str:
    """The fastest that fits, and the runners-up. Raises: ConfigError if nothing fits."""
    search = Search(config, nets, world_size, options)
    found = list(search.choices())
    fitting = [choice for choice in found if choice.step.peak <= search.usable]
    limit = f"{search.memory / GIB:.1f} GiB ({search.usable / GIB:.1f} of it for a step)"
    if not fitting:
        least = min(found, key=lambda choice: choice.step.peak)
        need = (least.step.peak + RESERVE) / (1 - FRAGMENTATION) / GIB
        words = " ".join(least.words(world_size).split())
        raise ConfigError(
            f"--gpu-memory: nothing fits into {limit}; the least is {words}: it needs a GPU with "
            f"{need:.1f} GiB; use more ranks, or a smaller model"
        )
    ranked = sorted(map(search.timed, fitting), key=lambda choice: -choice.speed)
    best = ranked[0]
    rows = [
        f"advice for {world_size} x {search.gpu.name}, {limit}, K = {found[0].shape.words}, "
        f"{search.per_rank} samples per rank; speeds are PREDICTED, see above",
        *(f"{'>' if c is best else ' '} {c.words(world_size)}" for c in ranked[:5]),
        f"paste    {best.overrides(config.parallel)}",
    ]
    return "\n".join(rows)
