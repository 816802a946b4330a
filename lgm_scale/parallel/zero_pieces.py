"""What a rank keeps of each parameter under ZeRO, read off a DeepSpeed engine.

No DeepSpeed is imported here, and none of its checkpoints is needed: weights and moments are read
and written through views of the float32 tensors that its optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lgm_scale.parallel.pieces import Piece, fresh_adamw_state, plain_name

__all__ = ["live_gradients", "reload", "zero_pieces"]


def zero_pieces(engine: Any, model: nn.Module) -> list[Piece]:
    """One piece per parameter, in the model's order: that of this rank, maybe empty.

    They are views that training does not cut off. To load a state, write into them on all ranks,
    then call `reload`.

    Args:
        engine: DeepSpeed's, of any ZeRO stage.
        model: What the engine was given.
    """
    find = _partition if engine.zero_optimization_stage() == 3 else _fragments(engine.optimizer)
    return [find(engine, plain_name(name), p) for name, p in model.named_parameters()]


def live_gradients(engine: Any) -> list[Tensor]:
    """Gradients that the engine keeps between the backward pass and its step."""
    kept = getattr(engine.optimizer, "all_grad_tensors", {}), engine.optimizer.averaged_gradients
    inside = [tensor for groups in kept for group in groups.values() for tensor in group or ()]
    return inside + [p.grad for p in engine.module.parameters() if p.grad is not None]


def reload(engine: Any) -> None:
    """Bring the pieces' weights to where the model reads them. Every rank must call it."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    # As in DeepSpeed's own step: what lies gathered is let go, and small parameters, which always
    # do, are gathered again.
    engine.empty_partition_cache()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


class _FlatPiece(Piece):
    """A run of one of the flat float32 tensors that the optimizer steps.

    Args:
        name, shape, start, numel: See `Piece`.
        flat: The tensor.
        offset: Where the run begins in it.
        optimizer: Whose state is that of `flat`.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        start: int,
        numel: int,
        flat: Tensor,
        offset: int,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        super().__init__(name, shape, start, numel, trainable=True)
        self.flat = flat
        self.offset = offset
        self.optimizer = optimizer

    def weight(self) -> Tensor:
        """See `Piece`."""
        return self._run(self.flat)

    def gradient(self) -> None:
        """None: DeepSpeed averages, uses and drops gradients inside its step."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Piece`. `step` is one scalar for all pieces of a flat tensor."""
        state = self.optimizer.state[self.flat]
        if not state:
            state |= fresh_adamw_state(self.flat)
        return {key: value if key == "step" else self._run(value) for key, value in state.items()}

    def _run(self, flat: Tensor) -> Tensor:
        return flat.detach()[self.offset : self.offset + self.numel]


class _FrozenPiece(Piece):
    """A run of a parameter that no optimizer steps."""

    def __init__(
        self, name: str, shape: Sequence[int], start: int, numel: int, held: Tensor
    ) -> None:
        super().__init__(name, shape, start, numel, trainable=False)
        self.held = held

    def weight(self) -> Tensor:
        """See `Piece`."""
        return self.held.detach().view(-1)[: self.numel]

    def gradient(self) -> None:
        """None."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Piece`; empty."""
        return {}


def _fragments(optimizer: Any) -> Callable[[Any, str, Any], Piece]:
    """ZeRO-1 and 2: each group of parameters is one flat tensor, cut into one part per rank."""
    groups = {
        id(parameter): index
        for index, parameters in enumerate(optimizer.bit16_groups)
        for parameter in parameters
    }

    def find(engine: Any, name: str, parameter: Any) -> Piece:
        if id(parameter) not in groups:
            return _FrozenPiece(name, parameter.shape, 0, parameter.numel(), parameter.data)
        start = numel = offset = 0
        if parameter._hp_mapping is not None:
            here, there = (
                parameter._hp_mapping.lp_fragment_address,
                parameter._hp_mapping.hp_fragment_address,
            )
            start, numel, offset = here.start, here.numel, there.start
        flat = optimizer.single_partition_of_fp32_groups[groups[id(parameter)]]
        return _FlatPiece(name, parameter.shape, start, numel, flat, offset, optimizer.optimizer)

    return find


def _partition(engine: Any, name: str, parameter: Any) -> Piece:
    """ZeRO-3: each parameter is cut into one part per rank, the last ones padded."""
    part = parameter.partition_numel()
    start = min(part * dist.get_rank(), parameter.ds_numel)
    numel = min(part, parameter.ds_numel - start)
    if not parameter.requires_grad:
        return _FrozenPiece(name, parameter.ds_shape, start, numel, parameter.ds_tensor)
    optimizer = engine.optimizer
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    return _FlatPiece(name, parameter.ds_shape, start, numel, flat, offset, optimizer.optimizer)
