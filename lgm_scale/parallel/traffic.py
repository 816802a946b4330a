"""Every collective of a piece of training, counted as it happens.

The same counter reads a real step over gloo or NCCL and a simulated one (`lgm_scale.planning`), so
that what a plan says can be held against what was moved.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor

from lgm_scale.parallel.torch_internals import TorchDispatchMode, schema_of, tree_leaves

_NAMES: dict[str, str] = {
    "allgather_base": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
}


class Transfer(NamedTuple):
    """A collective, by its whole tensor, padding included: all that is gathered, or reduced."""

    operation: str
    numel: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * self.itemsize


class Traffic(TorchDispatchMode):
    """A context that notes every collective of this rank in `transfers`.

    All-gather, reduce-scatter and all-reduce are called so, whatever door of torch they came
    through; others have torch's names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.transfers: list[Transfer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note, and go on."""
        if DTensor in types:
            return NotImplemented  # let it come apart: what it moves is seen then
        space, name = str(schema_of(func).name).split("::")
        name = name.strip("_")
        if space in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "barrier"):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            whole = max(tensors, key=Tensor.numel)
            result = func(*args, **(kwargs or {}))
            out = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
            numel = max(whole.numel(), *out, 0)
            self.transfers.append(Transfer(_NAMES.get(name, name), numel, whole.element_size()))
            return result
        return func(*args, **(kwargs or {}))


def moved_bytes(transfers: Iterable[Transfer]) -> dict[str, int]:
    """Bytes by operation."""
    found: dict[str, int] = {}
    for transfer in transfers:
        found[transfer.operation] = found.get(transfer.operation, 0) + transfer.nbytes
    return found
