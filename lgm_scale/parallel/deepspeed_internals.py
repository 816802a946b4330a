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
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lgm_scale.parallel.shards import ParameterShard


def build_no_kernels() -> None:
    """Let DeepSpeed compile no C++ when it sets its communication up.

    On a CPU it would build an operator for inference there, on every rank, for minutes. It asks
    `deepspeed.ops.__compatible_ops__` first, a table that it fills by probing the compiler.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]


def zero_shards(engine: Any, model: nn.Module) -> list[ParameterShard]:
    """This rank's shard of every parameter under ZeRO, in the model's order.

    To load a state, write into the shards on all ranks, then call `update_model_weights`.

    Args:
        engine: DeepSpeed's engine, of any ZeRO stage.
        model: The module that the engine was given.
    """
    find = _stage_3 if engine.zero_optimization_stage() == 3 else _stages_1_and_2
    return list(find(engine.optimizer, model))


def _stages_1_and_2(optimizer: Any, model: nn.Module) -> Iterator[ParameterShard]:
    """All parameters of an optimizer's group are laid end to end, and that is cut by ranks.

    So a cut goes through a parameter anywhere, and most parameters lie on one rank alone: on the
    others, `_hp_mapping`, which links a parameter to its fragment, is None.
    """
    group_of = {id(p): group for group, ps in enumerate(optimizer.bit16_groups) for p in ps}
    parameter: Any
    for name, parameter in model.named_parameters():
        shape, group = parameter.shape, group_of.get(id(parameter))
        if group is None:  # frozen: whole on every rank
            yield ParameterShard(name, shape, 0, parameter.numel(), parameter.data, None)
            continue
        flat, mapping = optimizer.single_partition_of_fp32_groups[group], parameter._hp_mapping
        start = numel = offset = 0
        if mapping is not None:
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            start, numel, offset = here.start, here.numel, there.start
        # torch's optimizer, inside DeepSpeed's, steps whole flat tensors.
        yield ParameterShard(name, shape, start, numel, flat, optimizer.optimizer, offset)


def _stage_3(optimizer: Any, model: nn.Module) -> Iterator[ParameterShard]:
    """Each parameter is cut by itself, into equal parts; the last ranks' parts are padded.

    `ds_shape` and `ds_numel` are those of the whole parameter, which is empty while it is not
    gathered. `grad_position` has (group, offset in its flat tensor, length with padding).
    """
    parameter: Any
    for name, parameter in model.named_parameters():
        shape, part = parameter.ds_shape, parameter.partition_numel()
        start = min(part * dist.get_rank(), parameter.ds_numel)
        numel = min(part, parameter.ds_numel - start)
        if not parameter.requires_grad:
            yield ParameterShard(name, shape, start, numel, parameter.ds_tensor, None)
            continue
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        yield ParameterShard(name, shape, start, numel, flat, optimizer.optimizer, offset)


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
    """Gradients that the engine keeps, beside the parameters' own, from backward to step.

    Stage 1 keeps them in `all_grad_tensors`, stages 2 and 3 in `averaged_gradients`.
    """
    kept = getattr(engine.optimizer, "all_grad_tensors", {}), engine.optimizer.averaged_gradients
    return [tensor for groups in kept for group in groups.values() for tensor in group or ()]


def partition_of(parameter: nn.Parameter) -> Tensor | None:
    """This rank's part of a parameter that stage 3 has cut; None for any other parameter."""
    return getattr(parameter, "ds_tensor", None)
