"""Bytes of state that one rank keeps: planned from shapes, and measured.

State is what grows with the number of parameters. Under DDP with AdamW in float32 it is 16 bytes
for each: 4 for the weight, 4 for its gradient and 2 x 4 for the moments; the moving average adds
4. Each strategy divides some of these by the number of ranks. Activations, buffers of
communication and gathered blocks come on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lgm_scale.config.schema import DeepSpeedConfig, FSDPConfig, ParallelConfig
from lgm_scale.parallel.deepspeed_internals import partition_of
from lgm_scale.parallel.shards import ParameterShard, local_part

FLOAT = 4
"""Bytes of a number: all state is float32, whatever the precision of the computation."""
MOMENTS = 2
"""Numbers that AdamW keeps for each weight."""
PERSISTENT = 100_000
"""ZeRO-3 keeps parameters of up to so many elements whole beside their part (its default)."""
GPUS_PER_NODE = 8
"""Assumed for `hybrid` without a group size; a plan knows no nodes."""


@dataclass(frozen=True)
class ParameterInfo:
    """What a plan needs to know of a parameter."""

    shape: tuple[int, ...]
    trainable: bool
    averaged: bool


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank. `on_host` is the part of it that lies in the host's memory."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    on_host: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.ema


def parameter_infos(module: nn.Module, averaged: bool) -> list[ParameterInfo]:
    """What a plan needs of all parameters of a network, which may be on the meta device."""
    return [
        ParameterInfo(tuple(p.shape), p.requires_grad, averaged and p.requires_grad)
        for p in module.parameters()
    ]


def planned_bytes(
    infos: Sequence[ParameterInfo], parallel: ParallelConfig, world_size: int
) -> StateBytes:
    """Bytes of state on the rank that keeps most."""
    if parallel.strategy == "fsdp":
        return _fsdp(infos, parallel.fsdp or FSDPConfig(), world_size)
    if parallel.strategy == "deepspeed":
        return _zero(infos, parallel.deepspeed or DeepSpeedConfig(), world_size)
    return _state(*_elements(infos, lambda info: math.prod(info.shape)))


def _elements(
    infos: Sequence[ParameterInfo], count: Callable[[ParameterInfo], int]
) -> tuple[int, int, int]:
    """Elements of all parameters, of those that are trained and of those that are averaged."""
    return (
        sum(map(count, infos)),
        sum(count(info) for info in infos if info.trainable),
        sum(count(info) for info in infos if info.averaged),
    )


def _state(every: int, trained: int, averaged: int) -> StateBytes:
    """Bytes where one rank keeps so many elements, each with everything that belongs to it."""
    return StateBytes(every * FLOAT, trained * FLOAT, trained * MOMENTS * FLOAT, averaged * FLOAT)


def _fsdp(infos: Sequence[ParameterInfo], fsdp: FSDPConfig, world_size: int) -> StateBytes:
    ranks = world_size
    if fsdp.shard == "hybrid":
        ranks = fsdp.group_size or min(GPUS_PER_NODE, world_size)

    def part(info: ParameterInfo) -> int:
        """Elements on the first rank, which has most: ranks need not divide them."""
        return math.ceil(math.prod(info.shape) / ranks)

    planned = _state(*_elements(infos, part))
    return replace(planned, on_host=planned.total) if fsdp.cpu_offload else planned


def _zero(infos: Sequence[ParameterInfo], zero: DeepSpeedConfig, world_size: int) -> StateBytes:
    """ZeRO's optimizer steps a copy of the weights of its own, so that there are two of them.

    For mixed precision, where the model's copy is bfloat16, there must be. In float32 DeepSpeed
    makes it all the same: 20 bytes per parameter, of which a rank keeps 1/n of 12, 16 or 20.
    """
    every, trained, averaged = _elements(infos, lambda info: math.prod(info.shape))
    part = math.ceil(trained / world_size)
    model = every
    if zero.stage == 3:
        whole = (math.prod(info.shape) for info in infos)
        model = math.ceil(every / world_size) + sum(n for n in whole if n <= PERSISTENT)
    planned = StateBytes(
        weights=(model + part) * FLOAT,
        gradients=(trained if zero.stage == 1 else part) * FLOAT,
        optimizer=part * MOMENTS * FLOAT,
        ema=math.ceil(averaged / world_size) * FLOAT,
    )
    if zero.offload == "none":
        return planned
    host = part * FLOAT + planned.optimizer + planned.ema + (part * FLOAT if zero.stage > 1 else 0)
    return replace(planned, on_host=host + (model * FLOAT if zero.offload == "all" else 0))


def measured_bytes(
    model: nn.Module,
    shards: Sequence[ParameterShard],
    average: Iterable[Tensor],
    gradients: Iterable[Tensor] = (),
) -> StateBytes:
    """Bytes that lie in memory now, on this rank; between the backward pass and the step.

    Storages are counted, once each and whole: a view into a larger tensor counts as that.

    Args:
        model: The model in training.
        shards: This rank's shards.
        average: This rank's part of the moving average.
        gradients: Gradients that are no parameter's: under ZeRO, those of
            `deepspeed_internals.live_gradients`.
    """
    parts = [part for p in model.parameters() if (part := partition_of(p)) is not None]
    weights = [*model.parameters(), *parts, *(shard.weight() for shard in shards)]
    gradients = [*gradients, *(p.grad for p in model.parameters() if p.grad is not None)]
    moments = [value for s in shards for key, value in s.optimizer_state().items() if key != "step"]
    return StateBytes(*map(_storage_bytes, (weights, gradients, moments, average)))


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    sizes: dict[int, int] = {}
    for tensor in tensors:
        local = local_part(tensor)
        storage = local.untyped_storage()
        if storage.nbytes() and local.device != torch.device("meta"):
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
