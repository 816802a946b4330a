"""What ranks tell each other: a mean with a gradient, a decision, an error.

Networks and losses take `mean_over_ranks` as an argument and know nothing of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lgm_scale.errors import LGMError

Result = TypeVar("Result")


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over all ranks; `x` itself where there is one process only.

    Ranks hold equal shares of the global batch, so the mean of their means is the mean of the
    batch. The gradient is averaged over ranks as well. That is the right adjoint when, as under DDP
    and FSDP, parameter gradients are averaged afterwards: the objective is the mean over ranks.

    Shapes: any, equal on all ranks. Every rank must call it, in the same order.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    return _MeanOverRanks.apply(x)  # type: ignore[return-value]  # Function.apply is untyped


def _all_reduce_mean(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)  # a sum: gloo has no mean
    return total / dist.get_world_size()


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduce_mean(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _all_reduce_mean(gradients[0])


def on_rank_zero(decide: Callable[[], Result]) -> Result:
    """What `decide` returns on rank 0, on every rank; a user error is raised on every rank.

    One rank looks at a disk or a bucket, for two could see different things there. And an error
    that one rank alone raised would leave the others waiting for it in the next collective.

    Every rank must call it. The result must be plain data.
    """
    from composer.utils import dist as composer_dist  # late: dry runs need `mean_over_ranks` alone

    outcome: list = [None, None]
    if composer_dist.get_global_rank() == 0:
        try:
            outcome[0] = decide()
        except LGMError as error:
            outcome[1] = error
    composer_dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def raise_everywhere(error: LGMError | None) -> None:
    """Raise the error of the first rank that has one, on all ranks. Every rank must call it."""
    from composer.utils import dist as composer_dist  # late, as above

    for found in composer_dist.all_gather_object(error):
        if found is not None:
            raise found
