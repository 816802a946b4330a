"""Pieces of parameters to and from safetensors files.

A file holds, for each piece that its rank speaks for, `weight/<i>`, the optimizer's `exp_avg/<i>`,
`exp_avg_sq/<i>` and `step/<i>`, and `ema/<i>`, where i is the parameter's place in the model. All
are flat. Which elements they are stands in the manifest. Rank 0 adds the model's buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lgm_scale.checkpoint.manifest import StateFile, StateManifest
from lgm_scale.errors import CheckpointError
from lgm_scale.parallel.pieces import Piece, plain_name

__all__ = ["files_needed", "read_pieces", "write_pieces"]


def write_pieces(
    path: Path,
    pieces: Sequence[Piece],
    speaks: Sequence[bool],
    average: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> list[list[int]]:
    """Write this rank's file.

    Args:
        path: The file.
        pieces: Of this rank, one for each parameter.
        speaks: For which of them it writes.
        average: Moving average by the name of the parameter, flat.
        buffers: Whole tensors by name; empty on all ranks but one.

    Returns: [index, start, numel] of what was written.
    """
    tensors = {f"buffer/{name}": _on_host(value) for name, value in buffers.items()}
    written = []
    for index, (piece, mine) in enumerate(zip(pieces, speaks, strict=True)):
        if not mine:
            continue
        written.append([index, piece.start, piece.numel])
        tensors[f"weight/{index}"] = _on_host(piece.weight())
        if piece.name in average:
            tensors[f"ema/{index}"] = _on_host(average[piece.name])
        for key, value in piece.optimizer_state().items():
            tensors[f"{key}/{index}"] = _on_host(value)
    save_file(tensors, str(path))
    return written


def _on_host(tensor: Tensor) -> Tensor:
    """A copy that shares no storage, which safetensors refuses; of views, their elements alone."""
    tensor = tensor.detach()
    return tensor.to("cpu") if tensor.is_cuda else tensor.clone()


def files_needed(manifest: StateManifest, pieces: Sequence[Piece]) -> list[StateFile]:
    """The files that hold elements of these pieces, or the buffers."""
    needed = []
    for number, file in enumerate(manifest.files):
        if number == 0 or any(_overlap(pieces[i], start, n) for i, start, n in file.pieces):
            needed.append(file)
    return needed


def _overlap(piece: Piece, start: int, numel: int) -> bool:
    return start < piece.start + piece.numel and piece.start < start + numel


@torch.no_grad()
def read_pieces(
    manifest: StateManifest,
    paths: Mapping[str, Path],
    model: nn.Module,
    pieces: Sequence[Piece],
    average: Mapping[str, Tensor],
) -> None:
    """Fill this rank's pieces, its average and the model's buffers, in place.

    Args:
        manifest: Of the state.
        paths: Where `files_needed` are, by name.
        model: Whose buffers are filled; those in its `fixed_buffers` are compared instead.
        pieces: Of this rank.
        average: Moving average by the name of the parameter, flat.

    Raises: CheckpointError if a file cannot be read or an element is in none.
    """
    missing = [piece.numel for piece in pieces]
    for file in manifest.files:
        if file.name not in paths:
            continue
        try:
            with safe_open(str(paths[file.name]), framework="pt") as content:
                if file is manifest.files[0]:
                    _read_buffers(content, model)
                for index, start, numel in file.pieces:
                    if _overlap(pieces[index], start, numel):
                        missing[index] -= _read_piece(content, pieces[index], index, start, average)
        except SafetensorError as error:
            raise CheckpointError(f"{paths[file.name]}: {error}") from error
    lost = [piece.name for piece, count in zip(pieces, missing, strict=True) if count != 0]
    if lost:
        raise CheckpointError(f"the state does not hold every element of {', '.join(lost[:3])}")


def _read_piece(
    content, piece: Piece, index: int, start: int, average: Mapping[str, Tensor]
) -> int:
    """Copy the elements that a file's piece and this one share; how many they are."""
    targets = {"weight": piece.weight(), **piece.optimizer_state()}
    if piece.name in average:
        targets["ema"] = average[piece.name]
    count = 0
    for key, target in targets.items():
        if key == "step":
            target.copy_(content.get_tensor(f"step/{index}"))
            continue
        source = content.get_slice(f"{key}/{index}")
        first = max(start, piece.start)
        last = min(start + source.get_shape()[0], piece.start + piece.numel)
        count = last - first
        target[first - piece.start : last - piece.start].copy_(source[first - start : last - start])
    return count


def _read_buffers(content, model: nn.Module) -> None:
    """Fill the buffers; those that the data determine must be equal."""
    fixed = getattr(model, "fixed_buffers", ())
    for wrapped_name, buffer in model.named_buffers():
        name = plain_name(wrapped_name)
        value = content.get_tensor(f"buffer/{name}")
        if name in fixed and not torch.equal(value, buffer.cpu()):
            raise CheckpointError(
                f"the state was trained on other data: its {name} differs from the data set's; "
                "put the data set back, or choose another `out`"
            )
        buffer.copy_(value)
