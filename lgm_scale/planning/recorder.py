"""What a training step allocates and computes, read off its operations one by one.

Works on real and on fake tensors alike. Storages are counted, once each and whole, from the
operation that makes them until the last tensor that looks at them is gone; FSDP2 empties and fills
gathered storages without an operation, by `UntypedStorage.resize_`, and that is seen as well.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lgm_scale.parallel.shards import local_part
from lgm_scale.parallel.torch_internals import TorchDispatchMode, schema_of, tree_leaves


class Product(NamedTuple):
    """A matrix product, a convolution, or an attention with its products inside."""

    kind: str
    """`matmul` or `attention`."""
    flops: int
    nbytes: int
    half: bool
    """Whether its numbers have 16 bits."""


@dataclass
class Work:
    """What a stretch of training computes."""

    products: Counter[Product] = field(default_factory=Counter)
    eager_bytes: int = 0
    """Read and written by everything else, each operation a kernel of its own."""
    fused_bytes: int = 0
    """The same, where all between two products is one kernel: what it reads from outside, once,
    and what outlives it. What a backward pass still needs counts as written, though a compiler
    may compute some of it again instead."""
    kernels: int = 0
    """Operations that are more than a view."""

    @property
    def flops(self) -> int:
        """Operations of all products, a multiply-add being two."""
        return sum(product.flops * count for product, count in self.products.items())


class Recorder(TorchDispatchMode):
    """A context that records allocations in `events` and what is computed in `work`."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        """Serial number of a storage, and bytes that it grew, or shrank, by."""
        self.work = Work()
        self._serials: dict[int, int] = {}  # by identity, while it lives
        self._sizes: dict[int, int] = {}
        self._read: dict[int, int] = {}
        self._made: dict[int, int] = {}
        self._count = 0

    def __enter__(self) -> Recorder:
        """Record from here on."""
        self._resize = original = torch.UntypedStorage.resize_

        def resize_(storage: Any, size: int) -> Any:
            result = original(storage, size)
            if (serial := self._serials.get(id(storage))) is not None:
                self._change(serial, size)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stop."""
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record, and go on."""
        if DTensor in types:
            return NotImplemented  # let it come apart: its local tensors are what counts
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._compute(func, args, kwargs, result)
        return result

    def serials(self, tensors: Iterable[Tensor]) -> set[int]:
        """Of the storages of tensors, those that were seen."""
        found = (id(local_part(tensor).untyped_storage()) for tensor in tensors)
        return {self._serials[key] for key in found if key in self._serials}

    def alive(self) -> list[int]:
        """Serial numbers of the storages that are alive."""
        return list(self._sizes)

    def take_work(self) -> Work:
        """What was computed since the last call."""
        self._flush()
        work, self.work = self.work, Work()
        return work

    def timeline(self, first: int = 0, without: set[int] | None = None) -> np.ndarray:
        """Bytes that are alive after each event from `first` on, those of before included."""
        left = without or set()
        changes = [0 if serial in left else change for serial, change in self.events]
        return np.cumsum(changes)[first:]

    # --- allocations --------------------------------------------------------------------------

    def _storage(self, tensor: Tensor) -> int:
        """Serial number of a tensor's storage, which is counted from now on if it is new."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._serials:
            self._count += 1
            self._serials[key] = self._count
            self._change(self._count, storage.nbytes())
            weakref.finalize(storage, self._free, key)
        return self._serials[key]

    def _change(self, serial: int, size: int) -> None:
        self.events.append((serial, size - self._sizes.get(serial, 0)))
        self._sizes[serial] = size

    def _free(self, key: int) -> None:
        serial = self._serials.pop(key)
        self.events.append((serial, -self._sizes.pop(serial)))

    # --- computation --------------------------------------------------------------------------

    def _compute(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        read: dict[int, int] = {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                serial = self._storage(tensor)
                read[serial] = max(read.get(serial, 0), _bytes(tensor))
        names = {a.name: i for i, a in enumerate(schema_of(func).arguments) if _writes(a)}
        changed = [kwargs.get(name, args[i] if i < len(args) else ()) for name, i in names.items()]
        written: dict[int, int] = {}
        for tensor in (*tree_leaves(changed), *outputs):
            if isinstance(tensor, Tensor):
                serial = self._storage(tensor)
                if names or serial not in read:
                    written[serial] = max(written.get(serial, 0), _bytes(tensor))
        name = schema_of(func).name
        if not written or "::empty" in name or "::new_empty" in name:  # a view, or nothing done
            return
        self.work.kernels += 1
        moved = sum(read.values()) + sum(written.values())
        kind, flops = _product(func, args, kwargs, result)
        if kind is not None:
            half = outputs[0].element_size() == 2
            self.work.products[Product(kind, flops, moved, half)] += 1
            self._flush()
            return
        self.work.eager_bytes += moved
        for serial, size in read.items():
            if serial not in self._made:
                self._read[serial] = max(self._read.get(serial, 0), size)
        self._made |= written

    def _flush(self) -> None:
        """End a stretch between two products."""
        alive = sum(size for serial, size in self._made.items() if serial in self._sizes)
        self.work.fused_bytes += alive + sum(self._read.values())
        self._read, self._made = {}, {}


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, those of an expanded dimension once."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride else 1
    return numel * tensor.element_size()


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _product(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[str | None, int]:
    """Kind and operations of a product; None for anything else."""
    space, name = schema_of(func).name.split("::")
    packet = getattr(getattr(torch.ops, space), name)
    if "scaled_dot_product" in name:
        backward = "backward" in name
        shapes = [x.shape for x in args[: 4 if backward else 3]]
        count = sdpa_backward_flop_count if backward else sdpa_flop_count
        return "attention", count(*shapes)
    if packet in flop_registry:
        return "matmul", flop_registry[packet](*args, **kwargs, out_val=result)
    return None, 0
