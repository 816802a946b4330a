"""Matrix products of transformer blocks in 8-bit floats, by torchao: approximate, for training."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

_LAYERS = ("qkv", "proj", "w12", "w3", "fc1", "fc2")
"""Of attention and MLP. Modulations work on one row per sample, too few to gain."""
_DIVISOR = 16
"""The kernels want sizes that it divides."""


def float8_problem(device: torch.device) -> str | None:
    """Why there are no products of 8-bit floats here; None if there are."""
    if find_spec("torchao") is None:
        return "torchao is not installed; pip install torchao"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return f"{device} does not compute them; it takes a GPU of capability 8.9 or more, as H100"
    return None


def takes_float8(module: nn.Module, name: str) -> bool:
    """Whether a layer of this name is one of those, and of sizes that the kernels take."""
    if not isinstance(module, nn.Linear) or name.split(".")[-1] not in _LAYERS:
        return False
    return module.in_features % _DIVISOR == 0 and module.out_features % _DIVISOR == 0


def use_float8(blocks: list[nn.Module], emulate: bool = False) -> None:
    """Convert the blocks' layers in place; parameters and their names stay.

    Scales are taken from each tensor at each call, so that a state has nothing more in it. Before
    blocks are compiled. `emulate` rounds without the kernels, on any device.
    """
    from torchao.float8 import (  # type: ignore[import-not-found]  # maybe not installed
        Float8LinearConfig,
        convert_to_float8_training,
    )

    config = Float8LinearConfig(emulate=emulate)
    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=takes_float8, config=config)
