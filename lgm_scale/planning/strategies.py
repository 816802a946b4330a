"""A step under every strategy: simulated where that is possible, else derived by the rule.

FSDP2 is simulated as it is. `hybrid` is FSDP2 among the ranks of a group, and an average of each
unit's shard over the groups besides, which torch does not simulate on a CPU. DDP is one process
plus its buckets. ZeRO has the activations of one process; state and collectives follow from what
DeepSpeed 0.19.8 does, as read in its source and seen on two ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lgm_scale.config.schema import DeepSpeedConfig, FSDPConfig, ParallelConfig, TrainingRun
from lgm_scale.parallel.memory import (
    FLOAT,
    GPUS_PER_NODE,
    PERSISTENT,
    ParameterInfo,
    planned_bytes,
)
from lgm_scale.parallel.traffic import Transfer
from lgm_scale.planning.simulation import Part, Simulated, simulate

REUSE = 500_000_000
"""ZeRO-3 keeps gathered what is needed again within 1e9 elements, forward and backward: so many."""


@dataclass(frozen=True)
class StepShape:
    """How large a step is on one rank: micro-batches of `num_samples` samples at K tokens."""

    num_samples: int
    num_tokens: int | tuple[int, ...]
    """K, or that of each sample of a micro-batch."""
    micro_batches: int = 1

    @property
    def words(self) -> str:
        """K for a table."""
        return str(self.num_tokens) if isinstance(self.num_tokens, int) else "all"


@dataclass(frozen=True)
class Moved:
    """A collective of a step, among `ranks` ranks; `overlaps`: beside the passes, not after."""

    transfer: Transfer
    ranks: int
    overlaps: bool = True


@dataclass(frozen=True)
class PlannedStep:
    """What a step takes of one rank, in bytes.

    Args:
        state: Weights, moments, average and frozen networks, between two steps.
        peak: Most at once, everything included.
        moved: Collectives of the whole step.
        passes: What each micro-batch but the last computes, then the last.
        update: What clipping, optimizer and average compute.
        derived: How what was not simulated was found; empty where all was.
    """

    state: int
    peak: int
    moved: Sequence[Moved]
    passes: Sequence[Part]
    update: Part
    derived: str = ""


def shard_ranks(parallel: ParallelConfig, world_size: int) -> int:
    """Ranks that share one copy of the weights under FSDP2; else 1."""
    if parallel.strategy != "fsdp":
        return 1
    fsdp = parallel.fsdp or FSDPConfig()
    if fsdp.shard == "hybrid":
        return fsdp.group_size or min(GPUS_PER_NODE, world_size)
    return world_size


def _inside_a_group(parallel: ParallelConfig) -> ParallelConfig:
    """`hybrid` without its copies, whose average torch 2.7 cannot do on a CPU: `full`."""
    if parallel.fsdp is None or parallel.fsdp.shard != "hybrid":
        return parallel
    return replace(parallel, fsdp=replace(parallel.fsdp, shard="full", group_size=None))


def plan_step(
    config: TrainingRun,
    infos: Sequence[ParameterInfo],
    world_size: int,
    shape: StepShape,
    as_gpu: bool = True,
    simulated: Simulated | None = None,
) -> PlannedStep | None:
    """A step of the run under its strategy; None if its family cannot say what one is.

    Args:
        config: The run.
        infos: Its parameters.
        world_size: Ranks.
        shape: What a rank computes.
        as_gpu: Whether on a GPU.
        simulated: What `simulate` found, where that is known already.
    """
    ranks = shard_ranks(config.parallel, world_size)
    if simulated is None:
        inner = replace(config, parallel=_inside_a_group(config.parallel))
        simulated = simulate(
            *(inner, ranks, shape.num_samples, shape.num_tokens, shape.micro_batches, as_gpu)
        )
    if simulated is None:
        return None
    parts = (*_every_pass(simulated, shape.micro_batches), simulated.update)
    around = ranks if ranks > 1 else world_size
    own = [Moved(t, around) for part in parts for t in part.transfers] if world_size > 1 else []
    step = PlannedStep(
        simulated.state, simulated.peak, own, simulated.passes, simulated.update
    )  # fmt: skip
    if config.parallel.strategy == "fsdp":
        return _fsdp(config.parallel.fsdp or FSDPConfig(), step, ranks, world_size)
    if config.parallel.strategy == "deepspeed":
        zero = config.parallel.deepspeed or DeepSpeedConfig()
        return _zero(config.parallel, zero, step, simulated, infos, world_size, shape)
    return _ddp(step, simulated, infos, world_size)


def _every_pass(simulated: Simulated, micro_batches: int) -> list[Part]:
    first, last = simulated.passes[0], simulated.passes[-1]
    return [first, *[last] * (micro_batches - 1)]


def _fsdp(fsdp: FSDPConfig, step: PlannedStep, ranks: int, world_size: int) -> PlannedStep:
    derived = "offload was not simulated: this is without it" if fsdp.cpu_offload else ""
    if fsdp.shard != "hybrid" or ranks == world_size:
        return replace(step, derived=derived)
    reduced = [m.transfer for m in step.moved if m.transfer.operation == "reduce-scatter"]
    copies = [
        Moved(Transfer("all-reduce", t.numel // ranks, t.itemsize), world_size // ranks)
        for t in reduced
    ]
    found = f"sharding simulated among {ranks} ranks, the average over copies derived"
    return replace(step, moved=[*step.moved, *copies], derived=derived or found)


def _ddp(
    step: PlannedStep, simulated: Simulated, infos: Sequence[ParameterInfo], world_size: int
) -> PlannedStep:
    """Buckets hold a second copy of all gradients; the last micro-batch's pass averages them."""
    if world_size == 1:
        return step
    trained = _elements(infos, trained=True)
    every = [Transfer("all-reduce", trained, FLOAT)]
    every += [Transfer("broadcast", numel, size) for numel, size in simulated.buffers]
    moved = [*step.moved, *(Moved(t, world_size) for t in every)]
    buckets = trained * FLOAT
    return replace(
        *(step,), state=step.state + buckets, peak=step.peak + buckets, moved=moved,
        derived="buckets and their average derived; DDP itself cannot be simulated",
    )  # fmt: skip


def _zero(
    parallel: ParallelConfig,
    zero: DeepSpeedConfig,
    step: PlannedStep,
    simulated: Simulated,
    infos: Sequence[ParameterInfo],
    world_size: int,
    shape: StepShape,
) -> PlannedStep:
    planned = planned_bytes(infos, parallel, world_size)
    trained, every = _elements(infos, trained=True), _elements(infos)
    frozen = step.state - FLOAT * (every + 2 * trained + _averaged(infos))
    bucket = zero.bucket_mib * 2**20
    times, transfers = shape.micro_batches, list[Transfer]()
    gathered, standing = 0, 0  # stage 3 makes its bucket once, the others in every step
    if zero.stage < 3:
        times = 1 if zero.stage == 1 else times
        transfers += [Transfer("all-reduce", trained, FLOAT)] * times
        after = [Moved(Transfer("all-gather", trained, FLOAT), world_size, overlaps=False)]
    else:
        small = sum(n for n in map(_numel, infos) if n <= PERSISTENT)
        large = every - small
        gathered, standing, bucket = min(large, REUSE), bucket, 0
        transfers += [Transfer("reduce-scatter", trained, FLOAT)] * times
        transfers += [Transfer("all-gather", large + max(0, large - REUSE), FLOAT)] * times
        transfers += [Transfer("all-gather", small, FLOAT)]
        after = []
    moved = [*step.moved, *(Moved(t, world_size) for t in transfers if t.numel), *after]
    state = planned.total - planned.on_host - planned.gradients + frozen + standing
    working = int(simulated.activations.max()) + bucket + gathered * FLOAT
    stepping = math.ceil(trained / world_size) * FLOAT  # one more copy of a rank's gradients
    work = step.update.work
    work = replace(work, eager_bytes=work.eager_bytes // world_size)  # each steps its part
    return replace(
        *(step,), state=state, peak=state + planned.gradients + max(working, stepping), moved=moved,
        update=Part(work, step.update.transfers),
        derived="activations simulated, state and collectives by DeepSpeed's rule",
    )  # fmt: skip


def _numel(info: ParameterInfo) -> int:
    return math.prod(info.shape)


def _elements(infos: Sequence[ParameterInfo], trained: bool = False) -> int:
    return sum(_numel(info) for info in infos if info.trainable or not trained)


def _averaged(infos: Sequence[ParameterInfo]) -> int:
    return sum(_numel(info) for info in infos if info.averaged)
