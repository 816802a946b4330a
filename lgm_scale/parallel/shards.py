"""Which part of which parameter this rank keeps, told in the same way under every strategy.

A *shard* is a run of elements, [start, start + numel), of a flattened parameter. Under DDP a rank's
shard is the whole parameter, under FSDP and ZeRO a run that may begin and end anywhere. Every rank
has one shard of every parameter, maybe an empty one.

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
    if isinstance(tensor, DTensor):
        with torch.no_grad():  # its history would cost a dispatch of DTensor to take and to drop
            tensor = tensor.to_local()
    return tensor.detach()


def local_shards(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[ParameterShard]:
    """This rank's shard of every parameter under DDP or FSDP, in the model's order.

    Call it when the strategy has been applied, for sharding replaces the parameters.
    """
    shards, shapes = [], _whole_shapes(model)
    for name, p in model.named_parameters():
        start = _first_element(p) if isinstance(p, DTensor) else 0
        stepped_by = optimizer if p.requires_grad else None
        numel = local_part(p).numel()
        shards.append(ParameterShard(name, shapes[name], start, numel, p, stepped_by))
    return shards


def flatten_parameters(model: nn.Module) -> None:
    """Make a vector of every parameter, in place; its module still reads it in its own shape.

    FSDP2 cuts dimension 0 and pads it until the ranks divide it: of a table [1, 256, 1152], 1,024
    ranks gather 1,024 times as much, of a matrix with 1,152 rows, 78 % more. Of a vector they pad
    less than one element each. Another dimension to cut would not help: those are no better.

    What is registered is the vector: names stay, and optimizer, gradients and shards see vectors.
    What the module's code reads, such as `self.weight`, is a view in the parameter's shape; while
    FSDP2 has it cut, it is FSDP2's own vector. Like FSDP2, this gives a module a class of its own.
    """
    vectors: dict[nn.Parameter, nn.Parameter] = {}  # one for each, also for one with two owners
    for module in model.modules():
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        tables = {name: p for name, p in own if p.ndim > 1}
        for name, p in tables.items():
            if p not in vectors:
                vectors[p] = nn.Parameter(p.detach().view(-1), p.requires_grad)
            module.register_parameter(name, vectors[p])
        if tables:
            shapes = {name: p.shape for name, p in tables.items()}
            views = {name: _view(name, shape) for name, shape in shapes.items()}
            old = type(module)
            module.__class__ = type(old.__name__, (old,), views | {"table_shapes": shapes})


def _view(name: str, shape: torch.Size) -> property:
    def get(module: nn.Module) -> Tensor:
        vector: Any = nn.Module.__getattr__(module, name)  # what is registered
        return vector if isinstance(vector, DTensor) else vector.view(shape)

    return property(get)


def _whole_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shape of every parameter by its name; of a vector of `flatten_parameters`, that of before."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for prefix, module in model.named_modules():
        for name, shape in getattr(module, "table_shapes", {}).items():
            shapes[f"{prefix}.{name}" if prefix else name] = shape
    return shapes


def _first_element(vector: DTensor) -> int:
    """Index of the first local element. FSDP cuts like torch.chunk, and all it has are vectors."""
    assert vector.ndim == 1, "flatten_parameters comes before fully_shard"
    start = 0
    for dim, placement in enumerate(vector.placements):
        if isinstance(placement, ShardPlacement):
            part = -(-vector.numel() // vector.device_mesh.size(dim))
            start = min(part * vector.device_mesh.get_local_rank(dim), vector.numel())
    return start


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
