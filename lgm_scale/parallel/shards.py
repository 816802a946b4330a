"""Which part of which parameter this rank keeps, told in the same way under every strategy.

A *shard* is a run of elements, [start, start + numel), of a flattened parameter. Under DDP a rank's
shard is the whole parameter, under FSDP some of its rows, under ZeRO a run that may begin and end
anywhere. Every rank has one shard of every parameter, maybe an empty one.

The moving average and the resume state know shards and nothing else. That is why they work under
every strategy without communication, and why a state that was written under one strategy, or on
some number of ranks, can be read under another: both are lists of runs, and runs can be
intersected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

__all__ = ["ParameterShard", "gather", "local_part", "local_shards", "owned"]


class ParameterShard:
    """Elements [start, start + numel) of a flattened parameter, kept by this rank.

    Weight and moments are read and written through views, which stay valid through training.

    Args:
        name: The parameter's name in the model.
        shape: Shape of the whole parameter.
        start: Index of the first element.
        numel: Number of elements; may be 0.
        held: The tensor that has them: the parameter itself, or one in which many lie.
        optimizer: The optimizer that steps `held`; None if the parameter is frozen.
        offset: Where in `held`, flattened, the elements begin.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        start: int,
        numel: int,
        held: Tensor,
        optimizer: torch.optim.Optimizer | None,
        offset: int = 0,
    ) -> None:
        self.name = name
        self.shape = tuple(shape)
        self.start = start
        self.numel = numel
        self.trainable = optimizer is not None
        self._held = held
        self._optimizer = optimizer
        self._offset = offset

    def weight(self) -> Tensor:
        """The values that the optimizer works on, as a view. Shapes: -> [numel]."""
        return self._part(self._held)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Views of AdamW's moments, [numel] each, and `step`, a scalar; {} if frozen.

        Before the first step they are made, as zeros: a state can be loaded into them. `step` is
        one for all shards that lie in the same tensor.
        """
        if self._optimizer is None:
            return {}
        state = self._optimizer.state[self._held]
        if not state:
            state |= _fresh_adamw_state(self._held)
        return {
            key: value if key == "step" else self._part(value)
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def _part(self, tensor: Tensor) -> Tensor:
        return local_part(tensor).view(-1)[self._offset : self._offset + self.numel]


def _fresh_adamw_state(parameter: Tensor) -> dict[str, Any]:
    """What torch's AdamW makes in its first step: two moments, and a count of steps.

    The count is on the device where the fused kernel wants it: that of the parameter.
    """
    device = parameter.device if parameter.is_cuda else "cpu"
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter.detach()),
        "exp_avg_sq": torch.zeros_like(parameter.detach()),
    }


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, without its history: of a DTensor, a part."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shards(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[ParameterShard]:
    """This rank's shard of every parameter under DDP or FSDP, in the model's order.

    Call it when the strategy has been applied, for sharding replaces the parameters.
    """
    shards = []
    for name, p in model.named_parameters():
        numel, start = local_part(p).numel(), 0
        if isinstance(p, DTensor):
            start = _first_row(p) * (p.numel() // max(len(p), 1))
        stepped_by = optimizer if p.requires_grad else None
        shards.append(ParameterShard(name, p.shape, start, numel, p, stepped_by))
    return shards


def _first_row(parameter: DTensor) -> int:
    """Index of the first local row. FSDP cuts the first dimension like torch.chunk."""
    row, rows = 0, parameter.shape[0] if parameter.ndim else 1
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, ShardPlacement):
            assert placement.dim == 0, "FSDP cuts rows"
            size = -(-rows // parameter.device_mesh.size(dim))
            row = min(size * parameter.device_mesh.get_local_rank(dim), rows)
    return row


def owned(shards: Sequence[ParameterShard]) -> list[bool]:
    """Whether this rank owns each of its shards: of equal shards, exactly one rank does.

    Only the owner writes a shard into a state or hands it out. Of n equal copies of parameter i,
    the owner is the holder number i mod n: dealt like cards, so that under DDP, where all ranks
    hold everything, each of them writes a part of the state, and no rank all of it.

    Every rank must call it.
    """
    mine = [(shard.start, shard.numel) for shard in shards]
    if not _several_ranks():
        return [numel > 0 for _, numel in mine]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    verdict = []
    for index, run in enumerate(mine):
        holders = [rank for rank, runs in enumerate(every) if runs[index] == run]
        verdict.append(run[1] > 0 and holders[index % len(holders)] == dist.get_rank())
    return verdict


def gather(
    shards: Sequence[ParameterShard], values: Sequence[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors on the host, one parameter at a time. Every rank must iterate to the end.

    One at a time, because a model that needs sharding does not fit as a whole.

    Shapes: values float32 [shard.numel] each -> (name, [*shard.shape]).
    """
    if not _several_ranks():
        for shard, value in zip(shards, values, strict=True):
            yield shard.name, value.to("cpu", copy=True).view(shard.shape)
        return
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    for shard, value, mine in zip(shards, values, owned(shards), strict=True):
        # A sum in which each element has one owner, and zeros from all others. Of integers, for
        # it is to move bits: -0.0 + 0.0 is 0.0, and a NaN may lose its payload.
        whole = torch.zeros(torch.Size(shard.shape).numel(), dtype=torch.int32, device=device)
        if mine:
            bits = value.float().contiguous().view(torch.int32).to(device)
            whole[shard.start : shard.start + shard.numel] = bits
        dist.all_reduce(whole)
        yield shard.name, whole.view(torch.float32).view(shard.shape).cpu()


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
