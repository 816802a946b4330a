"""Fully sharded data parallelism (FSDP2) on finished models, under Composer's trainer.

Every transformer block is a unit: its weights are gathered together, right before they are used.
What is left of each network is one more. Sharding is applied here and not through Composer, whose
FSDP2Config has no CPU offload, and which replaces the mesh by a flat one, so that hybrid sharding
would silently be full sharding.

Parameters, moments and gradients stay float32; weights are gathered in the trainer's precision, and
those of a network whose `full_precision` is True as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from composer.core import State
from composer.utils import dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from lgm_scale.config.schema import FSDPConfig
from lgm_scale.errors import ConfigError
from lgm_scale.parallel.blocks import transformer_blocks
from lgm_scale.parallel.composer_internals import sync_optimizer_and_model_params
from lgm_scale.parallel.shards import flatten_parameters


def _mesh(config: FSDPConfig) -> DeviceMesh:
    """All ranks in a row; under `hybrid`, a table: copies by shards.

    Raises: ConfigError if the ranks of a node, which make a group by default, do not divide all.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world_size = dist.get_world_size()
    if config.shard != "hybrid":
        return init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
    size = config.group_size or dist.get_local_world_size()
    if size < 2 or world_size % size != 0:
        raise ConfigError(
            f"parallel.fsdp.group_size: {size} of {world_size} ranks cannot share a "
            "copy; name a divisor of them above 1, or use strategy: ddp"
        )
    return init_device_mesh(
        device, (world_size // size, size), mesh_dim_names=("replicate", "shard")
    )


def _reduce_dtype(config: FSDPConfig, compute: torch.dtype, gpu: bool) -> torch.dtype:
    """Dtype in which gradients are averaged."""
    if not gpu:
        # For float32, FSDP2 asks the backend for an average. gloo has none and returns the sum,
        # without a word (seen with torch 2.7.0): every gradient would be world_size times too
        # large, and Adam, which does not feel a constant factor, would hide it. For other dtypes
        # FSDP2 divides by itself; float64 is the one among them that loses nothing.
        return torch.float64
    return torch.float32 if config.reduce == "fp32" else compute


def shard_model(
    model: nn.Module, config: FSDPConfig, compute: torch.dtype, gpu: bool | None = None
) -> None:
    """Apply FSDP2 in place; afterwards, parameters are other objects: DTensors, and vectors.

    Args:
        model: A shell whose children are networks; they are called through `forward` alone.
        config: What is sharded, and where it lies.
        compute: Dtype of gathered weights.
        gpu: Whether gradients are averaged as on a GPU; None: as on this machine.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    arguments: dict[str, Any] = {
        "mesh": _mesh(config),
        "reshard_after_forward": config.shard != "grad_op",
    }
    if config.cpu_offload:
        arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    flatten_parameters(model)
    for network in model.children():
        # Under autocast it computes in float32, and a gathered bfloat16 would not fit its inputs.
        own = torch.float32 if getattr(network, "full_precision", False) else compute
        policy = MixedPrecisionPolicy(
            param_dtype=None if own == torch.float32 else own,
            reduce_dtype=_reduce_dtype(config, own, gpu),
            # A timestep in bfloat16 has three digits. Autocast casts where it does no harm.
            cast_forward_inputs=False,
        )
        # From the inside out: a unit takes what no unit inside it has taken.
        for unit in (*transformer_blocks(network), network):
            fully_shard(unit, mp_policy=policy, **arguments)


def shard_state(state: State, config: FSDPConfig, compute: torch.dtype) -> None:
    """Apply FSDP2 to the model of Composer's state, whose optimizer then steps the shards."""
    (optimizer,) = state.optimizers
    with sync_optimizer_and_model_params(optimizer, state.model):
        shard_model(state.model, config, compute)
