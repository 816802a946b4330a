"""Fully sharded data parallelism, versions 1 and 2, on finished models under Composer's trainer.

Every transformer block is a unit, and so is what is left of each network. Version 1 goes through
Composer's own configuration. Version 2 is applied here: Composer's FSDP2Config has no CPU offload
and its mesh is replaced by a flat one, so that hybrid sharding would silently be full sharding.

Parameters, moments and gradients stay float32. The forward pass computes in the trainer's
precision: version 2 gathers weights in it, version 1 gathers float32 and leaves the casting to
autocast, because it would round the networks' inputs (timesteps!) as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from composer import Trainer
from composer.distributed.fsdp2_utils import sync_optimizer_and_model_params
from composer.utils import dist
from composer.utils.parallelism import FSDPConfig as ComposerFSDP1
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)

from lgm_scale.config.schema import FSDPConfig
from lgm_scale.errors import ConfigError

__all__ = [
    "FSDP2Trainer",
    "composer_fsdp1",
    "fsdp1_on_cpu",
    "shard",
    "shard_group",
    "transformer_blocks",
]


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """What is wrapped, recomputed or compiled one by one: the members of each `blocks`."""
    return [
        block
        for name, module in model.named_modules()
        if name.split(".")[-1] == "blocks"
        for block in module.children()
    ]


def _group_size(config: FSDPConfig) -> int:
    """Raises: ConfigError for a group of one: FSDP1 would then average no gradients at all."""
    size = config.group_size or dist.get_local_world_size()
    if size < 2 or dist.get_world_size() % size != 0:
        raise ConfigError(
            f"parallel.fsdp.group_size: {size} of {dist.get_world_size()} ranks cannot share a "
            "copy; name a divisor of them above 1, or use strategy: ddp"
        )
    return size


def _mesh(config: FSDPConfig) -> DeviceMesh:
    """One dimension; under `hybrid`, copies by shards."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world_size = dist.get_world_size()
    if config.shard != "hybrid":
        return init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
    size = _group_size(config)
    return init_device_mesh(
        device, (world_size // size, size), mesh_dim_names=("replicate", "shard")
    )


def _reduce_dtype(config: FSDPConfig, compute: torch.dtype) -> torch.dtype:
    if not torch.cuda.is_available():
        # gloo knows no average, and FSDP2 would silently return sums of float32 gradients (seen
        # with torch 2.7.0). With float64 it divides by itself, and rounds less than NCCL does.
        return torch.float64
    return torch.float32 if config.reduce == "fp32" else compute


def shard(model: nn.Module, config: FSDPConfig, compute: torch.dtype) -> None:
    """Apply FSDP2 in place; afterwards, parameters are DTensors and other objects.

    Args:
        model: A shell whose children are networks; they are called through `forward` alone.
        config: Version 2.
        compute: Dtype of gathered weights.
    """
    arguments: dict[str, Any] = {
        "mesh": _mesh(config),
        "reshard_after_forward": config.shard != "grad_op",
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if compute == torch.float32 else compute,
            reduce_dtype=_reduce_dtype(config, compute),
            cast_forward_inputs=False,  # autocast casts where it does no harm
        ),
    }
    if config.cpu_offload:
        arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for block in transformer_blocks(model):
        fully_shard(block, **arguments)
    for network in model.children():
        fully_shard(network, **arguments)


class FSDP2Trainer(Trainer):
    """Composer's trainer, with the model sharded where Composer would do it.

    Args:
        *args: Composer's.
        fsdp: Version 2.
        compute: Dtype of gathered weights.
        **kwargs: Composer's.
    """

    def __init__(self, *args: Any, fsdp: FSDPConfig, compute: torch.dtype, **kwargs: Any) -> None:
        self._fsdp, self._compute = fsdp, compute
        super().__init__(*args, **kwargs)

    def _wrap_model_for_distributed(self, model: Any, optimizers: Any) -> None:
        (optimizer,) = self.state.optimizers
        with sync_optimizer_and_model_params(optimizer, model):
            shard(model, self._fsdp, self._compute)


def composer_fsdp1(config: FSDPConfig, model: nn.Module) -> dict[str, ComposerFSDP1]:
    """Composer's `parallelism_config` for version 1; marks the blocks of `model` as units."""
    blocks = set(transformer_blocks(model))
    for network in model.children():
        network.fsdp_wrap_fn = lambda module: module in blocks  # type: ignore[assignment]
    strategies = {"full": "FULL_SHARD", "grad_op": "SHARD_GRAD_OP", "hybrid": "HYBRID_SHARD"}
    degrees: dict[str, Any] = {}
    if config.shard == "hybrid":
        degrees["data_parallel_shard_degree"] = _group_size(config)
        degrees["data_parallel_replicate_degree"] = dist.get_world_size() // _group_size(config)
    reduce = "fp32" if config.reduce == "fp32" or not torch.cuda.is_available() else "bf16"
    return {
        "fsdp": ComposerFSDP1(
            sharding_strategy=strategies[config.shard],
            use_orig_params=True,
            mixed_precision={"reduce_dtype": reduce},
            **degrees,
        )
    }


def shard_group(model: nn.Module) -> ProcessGroup | None:
    """Under FSDP1, the ranks among which one copy of the parameters is cut; None if it is not."""
    for network in model.children():
        if isinstance(network, FullyShardedDataParallel):
            handle = network._handle
            if handle is not None and handle.uses_sharded_strategy:
                return network.process_group
    return None


@contextlib.contextmanager
def fsdp1_on_cpu() -> Iterator[None]:
    """Without a GPU, tell Composer so: it asks CUDA for the device that FSDP1 is to use."""
    if torch.cuda.is_available():
        yield
        return
    asked = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        torch.cuda.current_device = asked
