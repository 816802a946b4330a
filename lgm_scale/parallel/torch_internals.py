"""Everything of torch that is private and that sharding, training and its simulation need.

Read from torch 2.7.0. `tests/unit/test_private_names_parallel.py` fails, and says why, when one
of these names is gone.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves


def allow_recompilations(count: int) -> None:
    """Let torch compile one function for at least `count` different inputs.

    `torch._dynamo.config.recompile_limit` is 8. After so many graphs torch runs the function
    uncompiled, with one warning that nobody sees among others, and a run with nine token lengths
    would be slow for no visible reason. The limit is one for the whole process; it is only raised.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, count)


def lerp_all_(tensors: list[Tensor], targets: list[Tensor], weight: float) -> None:
    """Move each tensor by `weight` of its way to its target, in place.

    `torch._foreach_lerp_` does it in a few kernels for all tensors together, where a loop would
    launch one for each. torch's own optimizers are built on these functions; public names for
    them do not exist.
    """
    torch._foreach_lerp_(tensors, targets, weight)


def schema_of(operation: Any) -> Any:
    """What torch declares of an operation that a `TorchDispatchMode` sees: name and arguments."""
    return operation._schema


def fake_tensors() -> Any:
    """A context whose tensors are fake; real ones may be mixed in, where their numbers count."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # late: it imports sympy

    return FakeTensorMode(allow_non_fake_inputs=True)


def join_fake_ranks(world_size: int) -> None:
    """Make this process rank 0 of ranks that are not there; their collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    importlib.import_module("torch.distributed._tools.fake_collectives")  # for fake tensors
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
