"""Reductions over ranks that a gradient can pass through.

Ranks hold equal shares of the global batch, so the mean of their means is the mean of the batch.
Networks and losses take such a function as an argument and know nothing of processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["mean_over_ranks"]


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over all ranks; `x` itself where there is one process only.

    The gradient is averaged over ranks as well. That is the right adjoint when, as under DDP and
    FSDP, parameter gradients are averaged afterwards: the objective is the mean over ranks.

    Shapes: any, equal on all ranks. Every rank must call it, in the same order.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    return _MeanOverRanks.apply(x)  # type: ignore[return-value]  # Function.apply is untyped


def _all_reduce_mean(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduce_mean(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _all_reduce_mean(gradients[0])
