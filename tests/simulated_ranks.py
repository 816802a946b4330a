"""One rank of any number of ranks, simulated in this process: what it moves, counted.

Tensors have shapes and no numbers, and collectives return at once; the network, its sharding and
autograd are real. Make and shard a model on the meta device (cutting a fake tensor into 1,024
parts takes seconds), then bring it into `fake_tensors` by `to_empty`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401  # makes them known to fake tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Let this process be rank 0 of `world_size`; an earlier process group ends."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        # Composer compares the group with the environment, where it may have left its own words.
        with patch.dict(os.environ, {"RANK": "0", "WORLD_SIZE": str(world_size)}):
            yield
    finally:
        dist.destroy_process_group()


def fake_tensors() -> FakeTensorMode:
    """A context whose tensors are fake; real ones may be mixed in, where their numbers count."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class Transfer(NamedTuple):
    """A collective, by its whole tensor: all that is gathered, or reduced."""

    operation: str
    numel: int
    itemsize: int


class Traffic(TorchDispatchMode):
    """A context that notes every collective in `transfers`."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: list[Transfer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            whole = max(tensors, key=Tensor.numel)
            name = func.name().removeprefix("c10d::").strip("_")
            self.transfers.append(Transfer(name, whole.numel(), whole.element_size()))
        return func(*args, **(kwargs or {}))
