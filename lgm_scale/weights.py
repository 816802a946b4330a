"""Weights of networks as safetensors files: written, and read into a network, frozen."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lgm_scale.errors import CheckpointError
from lgm_scale.storage.files import follow_umask


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write tensors, from whatever device and in whatever layout."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path)
    follow_umask(path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Read a module's weights and freeze it, in eval mode.

    Raises: CheckpointError if the file is damaged, or does not hold just these weights.
    """
    try:
        module.load_state_dict(load_file(str(path)))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit its configuration: {error}") from error
    module.eval().requires_grad_(False)
