"""Which part of which parameter this rank keeps under ZeRO, read off a DeepSpeed engine.

None of DeepSpeed's checkpoints is needed: weights and moments are read and written through views
of the float32 tensors that its optimizer steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lgm_scale.parallel.deepspeed_internals import HeldElements, held_elements
from lgm_scale.parallel.shards import ParameterShard, fresh_adamw_state

__all__ = ["zero_shards"]


def zero_shards(engine: Any, model: nn.Module) -> list[ParameterShard]:
    """This rank's shard of every parameter, in the model's order; some may be empty.

    The shards are views that stay valid through training. To load a state, write into them on all
    ranks, then call `deepspeed_internals.update_model_weights`.

    Args:
        engine: DeepSpeed's engine, of any ZeRO stage.
        model: The module that the engine was given.
    """
    optimizer = engine.optimizer.optimizer  # torch's, inside DeepSpeed's
    return [FlatShard(name, held, optimizer) for name, held in held_elements(engine, model)]


class FlatShard(ParameterShard):
    """A run of elements of a flat tensor, in which the shards of many parameters lie.

    Args:
        name: The parameter's name in the model.
        held: Which elements they are, and where they lie.
        optimizer: torch's optimizer, which steps whole flat tensors.
    """

    def __init__(self, name: str, held: HeldElements, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(name, held.shape, held.start, held.numel, trainable=held.stepped)
        self.flat = held.flat
        self.offset = held.offset
        self.optimizer = optimizer

    @override
    def weight(self) -> Tensor:
        return self._run(self.flat)

    @override
    def gradient(self) -> None:
        """None: DeepSpeed averages, uses and drops gradients inside its step."""

    @override
    def optimizer_state(self) -> dict[str, Tensor]:
        """Views of the moments, and `step`, one scalar for all shards of a flat tensor."""
        if not self.trainable:
            return {}
        state = self.optimizer.state[self.flat]
        if not state:
            state |= fresh_adamw_state(self.flat)
        return {key: value if key == "step" else self._run(value) for key, value in state.items()}

    def _run(self, flat: Tensor) -> Tensor:
        return flat.detach().view(-1)[self.offset : self.offset + self.numel]
