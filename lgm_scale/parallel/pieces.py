"""Which part of which parameter this rank keeps, the same under every strategy.

Under DDP a rank keeps whole parameters, under FSDP2 some of their rows, under FSDP1 and ZeRO any
run of their elements. All of these are *pieces*: elements [start, start + numel) of a flattened
parameter. The moving average and the resume state are written in terms of pieces, and so they
work under every strategy, without communication, and a state can be read under another one.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard

__all__ = ["ParameterPiece", "Piece", "gather", "local_pieces", "owned", "plain_name"]

# Names that wrappers put between those of the model's own modules.
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def plain_name(name: str) -> str:
    """A parameter's name without those of wrappers."""
    return _WRAPPERS.sub("", name)


class Piece(ABC):
    """Elements [start, start + numel) of a flattened parameter, kept by this rank.

    Args:
        name: Of the parameter in the model.
        shape: Of the whole parameter.
        start: First element.
        numel: How many; may be 0.
        trainable: Whether the parameter has a gradient.
    """

    def __init__(
        self, name: str, shape: Sequence[int], start: int, numel: int, trainable: bool
    ) -> None:
        self.name = name
        self.shape = tuple(shape)
        self.start = start
        self.numel = numel
        self.trainable = trainable

    @abstractmethod
    def weight(self) -> Tensor:
        """The values that the optimizer works on; a view. Shapes: -> [numel]."""

    @abstractmethod
    def gradient(self) -> Tensor | None:
        """The gradient of the last backward pass. Shapes: -> [numel]."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """Views of the moments, [numel] each, and `step`, a scalar. Zeros before the first step."""


class ParameterPiece(Piece):
    """A piece that is a parameter of the optimizer: DDP, FSDP1 and FSDP2."""

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        start: int,
        parameter: nn.Parameter,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.parameter = parameter
        self.optimizer = optimizer
        super().__init__(name, shape, start, _flat(parameter).numel(), parameter.requires_grad)

    def weight(self) -> Tensor:
        """See `Piece`."""
        return _flat(self.parameter)

    def gradient(self) -> Tensor | None:
        """See `Piece`."""
        return None if self.parameter.grad is None else _flat(self.parameter.grad)

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Piece`."""
        if not self.trainable:
            return {}
        state = self.optimizer.state[self.parameter]
        if not state:
            state |= fresh_adamw_state(self.parameter)
        return {
            key: value if key == "step" else _flat(value)
            for key, value in state.items()
            if isinstance(value, Tensor)
        }


def fresh_adamw_state(parameter: Tensor) -> dict[str, Any]:
    """What torch's AdamW makes in its first step: two moments, and a count of steps.

    The count is on the device where the fused kernel wants it: that of the parameter.
    """
    device = parameter.device if parameter.is_cuda else "cpu"
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter.detach()),
        "exp_avg_sq": torch.zeros_like(parameter.detach()),
    }


def _flat(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)


def local_pieces(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Piece]:
    """One piece per parameter, in the model's order: that of this rank, maybe empty.

    Call it when the strategy has been applied. ZeRO has a function of its own.
    """
    flat_parts = _fsdp1_parts(model)
    pieces: list[Piece] = []
    for name, parameter in model.named_parameters():
        shape, start = parameter.shape, 0
        if isinstance(parameter, DTensor):
            start = _first_row(parameter) * (parameter.numel() // max(len(parameter), 1))
        elif parameter in flat_parts:
            shape, start = flat_parts[parameter]
        pieces.append(ParameterPiece(plain_name(name), shape, start, parameter, optimizer))
    return pieces


def _first_row(parameter: DTensor) -> int:
    """Where the local rows begin. FSDP2 cuts the first dimension like torch.chunk."""
    row, rows = 0, parameter.shape[0] if parameter.ndim else 1
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "FSDP2 shards rows"
            size = -(-rows // parameter.device_mesh.size(dim))
            row = min(size * parameter.device_mesh.get_local_rank(dim), rows)
    return row


def _fsdp1_parts(model: nn.Module) -> dict[Tensor, tuple[tuple[int, ...], int]]:
    """Whole shape and first local element of the parameters that FSDP1 has cut."""
    parts: dict[Tensor, tuple[tuple[int, ...], int]] = {}
    for module in model.modules():
        handle = getattr(module, "_handle", None)
        if not isinstance(module, FullyShardedDataParallel) or handle is None:
            continue
        if not handle.uses_sharded_strategy:
            continue
        flat: Any = handle.flat_param
        infos = zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True)
        for parameter, shape, info in infos:
            parts[parameter] = (tuple(shape), info.intra_param_start_idx or 0)
    return parts


def owned(pieces: Sequence[Piece]) -> list[bool]:
    """Whether this rank speaks for each of its pieces: of equal copies, one rank does.

    The work is spread: of n copies of piece i, number i mod n does. Every rank must call it.
    """
    mine = [(piece.start, piece.numel) for piece in pieces]
    if not _several_ranks():
        return [numel > 0 for _, numel in mine]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    verdict = []
    for index, part in enumerate(mine):
        holders = [rank for rank, parts in enumerate(every) if parts[index] == part]
        verdict.append(part[1] > 0 and holders[index % len(holders)] == dist.get_rank())
    return verdict


def gather(pieces: Sequence[Piece], values: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors on the host, one parameter at a time. Every rank must iterate to the end.

    Bits are moved, not numbers: nothing is rounded on the way.

    Shapes: values float32 [piece.numel] each -> (name, [*piece.shape]).
    """
    if not _several_ranks():
        for piece, value in zip(pieces, values, strict=True):
            yield piece.name, value.to("cpu", copy=True).view(piece.shape)
        return
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    speaks = owned(pieces)
    for piece, value, mine in zip(pieces, values, speaks, strict=True):
        numel = torch.Size(piece.shape).numel()
        whole = torch.zeros(numel, dtype=torch.int32, device=device)
        if mine:
            bits = value.float().contiguous().view(torch.int32).to(device)
            whole[piece.start : piece.start + piece.numel] = bits
        dist.all_reduce(whole)
        yield piece.name, whole.view(torch.float32).view(piece.shape).cpu()


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
