"""ZeRO by DeepSpeed, under Composer's trainer.

Composer dropped its DeepSpeed integration in 0.28. What is left to do is small: the engine stands
where DDP would, its step where the optimizer's would, and DeepSpeed does the sharding alone:
batches, losses, learning rates, precision and resume states stay Composer's and ours.

Weights stay in float32 and bfloat16 comes from autocast, as under DDP, so that every strategy
computes the same numbers. (DeepSpeed's own bfloat16 mode rounds all weights, frozen ones included,
starts its float32 copies from the rounded ones, and averages rounded gradients.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from composer.core import Precision, State
from torch import nn

from lgm_scale.config.schema import DeepSpeedConfig
from lgm_scale.errors import DivergenceError
from lgm_scale.parallel.deepspeed_internals import build_no_kernels

_BYTES = 4  # of float32, the unit of DeepSpeed's buckets


def shard_state(state: State, zero: DeepSpeedConfig, clip_norm: float | None) -> None:
    """Put an engine where Composer's state has model and optimizer.

    Both are left out of Composer's own state dictionary, for no rank has them as a whole: they are
    written and read by their shards (`deepspeed_internals.zero_shards`). Algorithms and callbacks
    that touch `p.grad` or `p.data`, such as Composer's GradientClipping, EMA and OptimizerMonitor,
    find nothing there, or nothing that is whole.

    Args:
        state: Composer's state; its model becomes an `EngineModel`.
        zero: What is sharded, and where it lies.
        clip_norm: Largest norm of the gradient of all parameters together; None: any.
    """
    (optimizer,) = state.optimizers
    bf16 = state.precision is Precision.AMP_BF16
    engine = start_engine(state.model, optimizer, settings(zero, clip_norm, bf16))
    state.model = EngineModel(engine)  # type: ignore[assignment]
    state.optimizers = EngineOptimizer(engine, optimizer)
    whole = {"model", "optimizers"}
    state.serialized_attributes = [n for n in state.serialized_attributes if n not in whole]


def settings(zero: DeepSpeedConfig, clip_norm: float | None, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration; where its defaults do other than DDP, it is told to do as DDP.

    Args:
        zero: What is sharded, and where it lies.
        clip_norm: Largest norm of the gradient; None: any.
        bf16: Whether the model runs under bfloat16 autocast.
    """
    bucket = zero.bucket_mib * 2**20 // _BYTES
    sharding: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    pinned = torch.cuda.is_available()
    if zero.offload != "none":
        sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if zero.offload == "all":
        sharding["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    return {
        # The loop, and with it the end of an accumulation, is Composer's: step() is the boundary.
        "managed_gradient_accumulation": False,
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,  # has no effect, but must be there
        "gradient_clipping": clip_norm or 0.0,  # the default is 1.0
        "zero_allow_untested_optimizer": True,  # torch's AdamW, fused
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": sharding,
        # An empty list: gradients and weights travel in float32, as under DDP.
        "torch_autocast": {
            "enabled": bf16,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 2**31 - 1,
    }


def start_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, configuration: dict[str, Any]
) -> Any:
    """A DeepSpeed engine that has taken model and optimizer over. Every rank must call it.

    At stage 3 a module's weights are there while its forward runs, and at no other time. A model
    some of whose modules read a weight of another one has a method `read_elsewhere`, which yields
    such pairs of module and weight.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        build_no_kernels()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist.get_backend(), verbose=False)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=configuration, dist_init_required=False
    )
    if engine.zero_optimization_stage() == 3 and hasattr(model, "read_elsewhere"):
        for module, parameter in model.read_elsewhere():  # type: ignore[operator]
            deepspeed.zero.register_external_parameter(module, parameter)
    return engine


class EngineModel(nn.Module):
    """The engine as Composer calls it.

    Composer puts DDP around every model of which some parameter has a gradient, and there is no
    switch against it. So this model shows Composer no parameters: the engine sees to gradients.
    Names and buffers, `train()` and `eval()` are the engine's.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, batch: Any) -> Any:
        """The outputs of the model for one micro-batch."""
        return self.engine(batch)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """No parameters, so that Composer adds no DDP."""
        return iter(())


class EngineOptimizer(torch.optim.Optimizer):
    """The optimizer as Composer calls it: its step is the engine's.

    The groups are those of the optimizer that the engine steps, so that Composer's schedulers,
    bound to it before, set the rate that is used.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self.engine = engine
        self.optimizer = optimizer
        self.defaults = optimizer.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the optimizer that the engine steps."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the optimizer that the engine steps."""
        return self.optimizer.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: the engine drops gradients after its step."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Run Composer's closure, which is all micro-batches, and then the engine's step.

        Raises: DivergenceError if a gradient is not finite; DeepSpeed would leave the step out.
        """
        loss = closure() if closure is not None else None
        self.engine.step()
        if not self.engine.was_step_applied():
            raise DivergenceError(
                "a gradient is NaN or infinite; stopped before the optimizer's step, and nothing "
                "was saved since. Run it again with a lower optimizer.lr, or look at the data."
            )
        return loss
