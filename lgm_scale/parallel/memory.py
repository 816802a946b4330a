"""Bytes of state that one rank keeps: planned from shapes, and measured.

State is weights, gradients, moments of the optimizer and the moving average. Activations, buffers
of communication and gathered blocks come on top; the largest gathered block is told apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lgm_scale.config.schema import DeepSpeedConfig, FSDPConfig, ParallelConfig
from lgm_scale.parallel.pieces import Piece

__all__ = ["ParameterInfo", "StateBytes", "measured_bytes", "parameter_infos", "planned_bytes"]

FLOAT = 4
MOMENTS = 2
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
    """Of all parameters of a network, which may be on the meta device."""
    return [
        ParameterInfo(tuple(p.shape), p.requires_grad, averaged and p.requires_grad)
        for p in module.parameters()
    ]


def planned_bytes(
    infos: Sequence[ParameterInfo], parallel: ParallelConfig, world_size: int
) -> StateBytes:
    """On the rank that keeps most, in float32."""
    if parallel.strategy == "fsdp":
        return _fsdp(infos, parallel.fsdp or FSDPConfig(), world_size)
    if parallel.strategy == "deepspeed":
        return _zero(infos, parallel.deepspeed or DeepSpeedConfig(), world_size)
    every, trained, averaged = (
        sum(math.prod(info.shape) for info in chosen) for chosen in _kinds(infos)
    )
    return StateBytes(every * FLOAT, trained * FLOAT, trained * MOMENTS * FLOAT, averaged * FLOAT)


def _kinds(infos: Sequence[ParameterInfo]) -> tuple[list[ParameterInfo], ...]:
    return (
        list(infos),
        [info for info in infos if info.trainable],
        [info for info in infos if info.averaged],
    )


def _rows(info: ParameterInfo, ranks: int) -> int:
    """Elements of the first rank's rows."""
    if not info.shape:
        return 1
    return math.ceil(info.shape[0] / ranks) * math.prod(info.shape[1:])


def _fsdp(infos: Sequence[ParameterInfo], fsdp: FSDPConfig, world_size: int) -> StateBytes:
    ranks = world_size
    if fsdp.shard == "hybrid":
        ranks = fsdp.group_size or min(GPUS_PER_NODE, world_size)
    if fsdp.version == 2:
        every, trained, averaged = (
            sum(_rows(info, ranks) for info in chosen) for chosen in _kinds(infos)
        )
    else:  # flat, padded by less than one element per rank
        every, trained, averaged = (
            math.ceil(sum(math.prod(info.shape) for info in chosen) / ranks)
            for chosen in _kinds(infos)
        )
    planned = StateBytes(
        every * FLOAT, trained * FLOAT, trained * MOMENTS * FLOAT, averaged * FLOAT
    )
    return _on_host(planned, planned.total) if fsdp.cpu_offload else planned


def _zero(infos: Sequence[ParameterInfo], zero: DeepSpeedConfig, world_size: int) -> StateBytes:
    """ZeRO keeps the optimizer's copy of the weights beside the model's, in float32, too."""
    every, trained, averaged = (
        sum(math.prod(info.shape) for info in chosen) for chosen in _kinds(infos)
    )
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
    return _on_host(planned, host + (model * FLOAT if zero.offload == "all" else 0))


def _on_host(planned: StateBytes, host: int) -> StateBytes:
    return StateBytes(planned.weights, planned.gradients, planned.optimizer, planned.ema, host)


def measured_bytes(
    model: nn.Module,
    pieces: Sequence[Piece],
    average: Iterable[Tensor],
    gradients: Iterable[Tensor] = (),
) -> StateBytes:
    """What lies in memory now, on this rank; between the backward pass and the step.

    Storages are counted, once each and whole: a view into a larger tensor counts as that.

    Args:
        model: As trained.
        pieces: Of this rank.
        average: Of the moving average.
        gradients: Those that pieces do not know of: under ZeRO, `zero_pieces.live_gradients`.
    """
    parts = [vars(p)["ds_tensor"] for p in model.parameters() if hasattr(p, "ds_tensor")]  # ZeRO-3
    weights = [*model.parameters(), *parts, *(piece.weight() for piece in pieces)]
    known = [gradient for p in pieces if (gradient := p.gradient()) is not None]
    gradients = [*gradients, *known]
    moments = [value for p in pieces for key, value in p.optimizer_state().items() if key != "step"]
    return StateBytes(*map(_storage_bytes, (weights, gradients, moments, average)))


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    sizes: dict[int, int] = {}
    for tensor in tensors:
        local = getattr(tensor.detach(), "to_local", tensor.detach)()
        storage = local.untyped_storage()
        if storage.nbytes() and local.device != torch.device("meta"):
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
