"""Open a checkpoint of others without executing anything in it.

A pickle may hold tensors, numbers, strings, containers and `argparse.Namespace`, the class of the
release's `args`. It is a bag of values: building one runs no code of the file. Numbers may be of
ruamel.yaml's or numpy's types: they are read as plain numbers, and neither package is imported.
"""

from __future__ import annotations

import argparse
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lgm_scale.errors import CheckpointError

_MAX_REASON = 200
_WRAPPERS = ("module.", "_orig_mod.")  # data parallelism, torch.compile


# --- numbers of other packages' types -----------------------------------------------------------


class _Noted:
    """Drops what a pickle adds to a value: how YAML wrote the number, its anchor."""

    def __setstate__(self, state: object) -> None:
        """Keep nothing."""


class _Float(_Noted, float):
    """A float that remembered how it was written."""


class _Int(_Noted, int):
    """An integer or truth value that remembered how it was written."""


class _NumpyType:
    """What numpy's `dtype` is pickled as: a code of kind and size, and a byte order."""

    order = "<"

    def __init__(self, code: str, *_: object) -> None:
        self.format = _FORMATS[code]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _numpy_number(kind: _NumpyType, data: bytes) -> float | int | bool:
    """A numpy scalar as a plain number."""
    return struct.unpack(kind.order + kind.format, data)[0]


_FORMATS = {"b1": "?", "f2": "e", "f4": "f", "f8": "d"} | {
    f"{sign}{size}": code if sign == "i" else code.upper()
    for size, code in ((1, "b"), (2, "h"), (4, "i"), (8, "q"))
    for sign in "iu"
}
_YAML = {
    "scalarfloat": (_Float, ("ScalarFloat", "ExponentialFloat", "ExponentialCapsFloat")),
    "scalarint": (
        _Int, ("ScalarInt", "BinaryInt", "OctalInt", "HexInt", "HexCapsInt", "DecimalInt")
    ),
    "scalarbool": (_Int, ("ScalarBoolean",)),
    "anchor": (_Noted, ("Anchor",)),
}  # fmt: skip
_STAND_INS = [
    *((kind, f"ruamel.yaml.{file}.{n}") for file, (kind, names) in _YAML.items() for n in names),
    *((_numpy_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (_NumpyType, "numpy.dtype"),
]
"""What is built in place of a class or function that a pickle names. Nothing of these is imported;
numpy's own `scalar` would unpickle what an object type holds."""


# --- files ---------------------------------------------------------------------------------------


def read_dictionary(path: str | Path) -> dict[Any, Any]:
    """The dictionary of a `torch.save` or safetensors file. Large files are mapped, not read.

    Raises: CheckpointError if it is missing, damaged, no dictionary, or asks for any class or
    function besides tensors, number types and `argparse.Namespace`.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{path} is not a file")
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        with torch.serialization.safe_globals([argparse.Namespace, *_STAND_INS]):
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
            "A checkpoint of the release needs no such thing: do not trust this file. If you know "
            "where it is from, save its weights alone, as safetensors: that is read, too"
        )
    detail = text.rpartition("WeightsUnpickler error: ")[2]
    first = re.split(r"(?<=\.) ", detail)[0] or type(error).__name__
    return f"cannot be read; it is damaged or no checkpoint ({first[:_MAX_REASON]})"


def entries(content: dict[Any, Any]) -> str:
    """The first keys of a checkpoint's dictionary, for messages."""
    names = [str(name) for name in content]
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"


@dataclass(frozen=True)
class Weights:
    """Weights of a checkpoint under the release's names."""

    state: dict[str, Tensor]
    kind: str
    """'ema', 'model', or 'unnamed' where the file does not say which it holds."""
    remark: str
    """One line for the user: what was taken."""


def weights_of(
    content: dict[Any, Any], names: Mapping[str, str], wanted: str | None, path: str | Path
) -> Weights:
    """The weights of a checkpoint; wrappers' common prefixes are dropped.

    Args:
        content: The checkpoint: with entries for weights, or nothing but named tensors.
        names: Entries of the weights by their kind, the preferred one first.
        wanted: The kind to take; None: the first that is there.
        path: For messages.

    Raises: CheckpointError if they are absent or are anything but named dense tensors.
    """
    held = [kind for kind, entry in names.items() if isinstance(content.get(entry), dict)]
    held = [kind for kind in held if content[names[kind]]]
    alone = bool(content) and all(isinstance(value, Tensor) for value in content.values())
    if alone and wanted is None:
        kind, entry, state = "unnamed", "file", content
        remark = f"weights: the tensors of {path}, which does not say whether they are averaged"
    elif wanted in held or (wanted is None and held):
        kind = wanted or held[0]
        entry = names[kind]
        state = content[entry]
        absent = [f"no {name!r}" for other, name in names.items() if other not in held]
        remark = f"weights: {entry!r} of {path}" + "".join(f"; it has {what}" for what in absent)
    else:
        tried = " or ".join(repr(name) for k, name in names.items() if wanted in (None, k))
        fix = "; without --weights it is read" if wanted and (alone or held) else ""
        raise CheckpointError(
            f"{path} has no weights under {tried}; it holds {entries(content)}{fix}"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            found = type(value).__name__
            raise CheckpointError(f"{path}: {entry}[{name!r}] is a {found}; a tensor is needed")
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{path}: {entry}[{name!r}] is sparse or quantized")
    dropped = ""
    while prefix := next((p for p in _WRAPPERS if all(n.startswith(p) for n in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        dropped += prefix
    return Weights(state, kind, f"{remark}; prefix {dropped!r} dropped" if dropped else remark)


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
