"""Weights of networks as safetensors files: written, and read into a network, frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lgm_scale.errors import CheckpointError
from lgm_scale.storage.files import follow_umask


class Unfilled(TorchFunctionMode):
    """A context in which networks are made without drawing initial weights.

    For networks whose weights a file brings, all of them: drawing those of XL takes seconds. And
    for the meta device, where it imports torch's compiler. Memory holds what it held before.
    Spectral norm does not iterate either: its vectors are weights of that file.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, unless all it does is to draw initial weights."""
        kwargs = kwargs or {}
        module = getattr(func, "__module__", None)  # what reads an attribute has none
        if module == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        if func is functional.normalize and kwargs.get("out") is not None:
            return kwargs["out"]  # a step of spectral norm's power iteration
        return func(*args, **kwargs)


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
