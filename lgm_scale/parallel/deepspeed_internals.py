"""Everything inside DeepSpeed's ZeRO optimizers that shards of weights and moments need.

Read from deepspeed 0.19.8, `runtime/zero/stage_1_and_2.py`, `stage3.py` and
`partition_parameters.py`. DeepSpeed's own door to these tensors are its checkpoints, which another
strategy cannot read. `tests/unit/test_private_names_parallel.py` fails, and says why, when one of
these names is gone.

"bit16" and "fp16" in DeepSpeed's names are the weights that the model computes with, "fp32" those
that the optimizer steps. Here both are float32; they are two copies all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "HeldElements",
    "build_no_kernels",
    "held_elements",
    "live_gradients",
    "partition_of",
    "update_model_weights",
]


def build_no_kernels() -> None:
    """Let DeepSpeed compile no C++ when it sets its communication up.

    On a CPU it would build an operator for inference there, on every rank, for minutes. It asks
    `deepspeed.ops.__compatible_ops__` first, a table that it fills by probing the compiler.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]


class HeldElements(NamedTuple):
    """The elements of one parameter that this rank keeps, and where.

    They are elements [start, start + numel) of the flattened parameter, and lie in `flat` from
    `offset` on. `stepped` tells whether the optimizer steps `flat`, under which its state is then
    found, or the parameter is frozen.
    """

    shape: tuple[int, ...]
    start: int
    numel: int
    flat: Tensor
    offset: int
    stepped: bool


def held_elements(engine: Any, model: nn.Module) -> Iterator[tuple[str, HeldElements]]:
    """Name of every parameter, in the model's order, and what this rank keeps of it."""
    find = _stage_3 if engine.zero_optimization_stage() == 3 else _stages_1_and_2
    return find(engine.optimizer, model)


def _stages_1_and_2(optimizer: Any, model: nn.Module) -> Iterator[tuple[str, HeldElements]]:
    """All parameters of an optimizer's group are laid end to end, and that is cut by ranks.

    So a cut goes through a parameter anywhere, and most parameters lie on one rank alone: on the
    others, `_hp_mapping`, which links a parameter to its fragment, is None.
    """
    group_of = {
        id(parameter): group
        for group, parameters in enumerate(optimizer.bit16_groups)
        for parameter in parameters
    }
    for name, parameter in model.named_parameters():
        shape, group = tuple(parameter.shape), group_of.get(id(parameter))
        if group is None:  # frozen: whole on every rank
            yield name, HeldElements(shape, 0, parameter.numel(), parameter.data, 0, False)
            continue
        flat, mapping = optimizer.single_partition_of_fp32_groups[group], parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            yield name, HeldElements(shape, 0, 0, flat, 0, True)
            continue
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield name, HeldElements(shape, here.start, here.numel, flat, there.start, True)


def _stage_3(optimizer: Any, model: nn.Module) -> Iterator[tuple[str, HeldElements]]:
    """Each parameter is cut by itself, into equal parts; the last ranks' parts are padded.

    `ds_shape` and `ds_numel` are those of the whole parameter, which is empty while it is not
    gathered. `grad_position` has (group, offset in its flat tensor, length with padding).
    """
    parameter: Any
    for name, parameter in model.named_parameters():
        part = parameter.partition_numel()
        start = min(part * dist.get_rank(), parameter.ds_numel)
        numel = min(part, parameter.ds_numel - start)
        flat, offset = parameter.ds_tensor, 0
        if parameter.requires_grad:
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
        shape = tuple(parameter.ds_shape)
        yield name, HeldElements(shape, start, numel, flat, offset, parameter.requires_grad)


def update_model_weights(engine: Any) -> None:
    """Copy the weights that the optimizer steps to where the model reads them.

    DeepSpeed does so at the end of its own step; something was loaded without one. Every rank must
    call it.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()  # "lp": the model's copy
        return
    # Weights that still lie gathered from an earlier forward would hide the new ones.
    engine.empty_partition_cache()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    # Small parameters stay gathered for ever, and so they have to be gathered again.
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def live_gradients(engine: Any) -> list[Tensor]:
    """Every gradient that lies in memory between the backward pass and the step.

    Stage 1 keeps them in `all_grad_tensors`, stages 2 and 3 in `averaged_gradients`, and what was
    not averaged yet is the parameters' own.
    """
    kept = getattr(engine.optimizer, "all_grad_tensors", {}), engine.optimizer.averaged_gradients
    inside = [tensor for groups in kept for group in groups.values() for tensor in group or ()]
    return inside + [p.grad for p in engine.module.parameters() if p.grad is not None]


def partition_of(parameter: nn.Parameter) -> Tensor | None:
    """This rank's part of a parameter that stage 3 has cut; None for any other parameter."""
    return getattr(parameter, "ds_tensor", None)
