"""Open a checkpoint of others without executing anything in it.

A pickle may hold tensors, numbers, strings, containers and `argparse.Namespace`, the class of the
release's `args`. It is a bag of values: building one runs no code of the file.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lgm_scale.errors import CheckpointError

__all__ = ["entries", "read_dictionary", "shape_of", "weights_of"]

_MAX_REASON = 200


def read_dictionary(path: str | Path) -> dict[Any, Any]:
    """The dictionary of a `torch.save` or safetensors file. Large files are mapped, not read.

    Raises: CheckpointError if it is missing, damaged, no dictionary, or asks for any class or
    function besides tensors and `argparse.Namespace`.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{path} is not a file")
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except Exception as error:  # a damaged file makes the readers raise all kinds of errors
        raise CheckpointError(f"{path} {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a dictionary is needed")
    return content


def _reason(error: Exception) -> str:
    """What is wrong with the file. torch's own advice, to execute it, is left out."""
    text = " ".join(str(error).split())
    foreign = re.search(r"GLOBAL ([\w.]+)", text)
    if foreign:
        name = foreign.group(1)
        return (
            f"asks for {name}, which is neither a tensor nor plain data; nothing was executed. "
            "A checkpoint of the release needs no such thing: do not trust this file"
        )
    detail = text.rpartition("WeightsUnpickler error: ")[2]
    first = re.split(r"(?<=\.) ", detail)[0] or type(error).__name__
    return f"cannot be read; it is damaged or no checkpoint ({first[:_MAX_REASON]})"


def entries(content: dict[Any, Any]) -> str:
    """The first keys of a checkpoint's dictionary, for messages."""
    names = [str(name) for name in content]
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"


def weights_of(content: dict[Any, Any], entry: str, path: str | Path) -> dict[str, Tensor]:
    """The state stored under `entry`, as name -> tensor; a wrapper's common prefix is dropped.

    Raises: CheckpointError if it is absent or holds anything but named dense tensors.
    """
    state = content.get(entry)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} has no weights under {entry!r}; it holds {entries(content)}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise CheckpointError(f"{path}: {entry}[{name!r}] is a {kind}; a tensor is needed")
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{path}: {entry}[{name!r}] is sparse or quantized")
    for prefix in ("module.", "_orig_mod."):  # data parallelism, then torch.compile
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def shape_of(
    state: Mapping[str, Tensor], name: str, form: tuple[int | None, ...], path: str | Path
) -> tuple[int, ...]:
    """Shape of a weight that the configuration is read from.

    Args:
        state: Weights under the release's names.
        name: Name of the weight.
        form: Expected size per dimension; None: any.
        path: For messages.

    Raises: CheckpointError if it is missing or of another form.
    """
    wanted = "[" + ", ".join("?" if size is None else str(size) for size in form) + "]"
    if name not in state:
        raise CheckpointError(f"{path}: key {name}: missing; expected shape {wanted}")
    shape = tuple(state[name].shape)
    fits = len(shape) == len(form) and all(
        want in (None, size) for want, size in zip(form, shape, strict=True)
    )
    if not fits or 0 in shape:
        raise CheckpointError(f"{path}: key {name}: shape {list(shape)}, expected {wanted}")
    return shape
