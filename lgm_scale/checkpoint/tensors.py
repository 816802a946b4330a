"""Shards of parameters to and from safetensors files.

A file holds, for each shard that its rank owns, `weight/<i>`, the optimizer's `exp_avg/<i>`,
`exp_avg_sq/<i>` and `step/<i>`, and `ema/<i>`, where i is the parameter's place in the model. All
are flat. Which elements they are stands in the manifest. Rank 0 adds the model's buffers.

A rank reads from every file what that has in common with its own shards, and nothing else, so that
neither the number of ranks nor the strategy need be those that wrote the state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lgm_scale.checkpoint.manifest import StateFile, StateManifest
from lgm_scale.errors import CheckpointError
from lgm_scale.parallel.shards import ParameterShard
from lgm_scale.storage.files import follow_umask


class ShardCopy:
    """What this rank writes into a state, by value, in memory of its host that serves every state.

    (New memory for each would cost more than copying does: the system clears it page by page.)
    """

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        """[index, start, numel] of what it holds."""
        self._tensors: dict[str, Tensor] = {}
        self._arrived: Any = None

    def take(
        self,
        shards: Sequence[ParameterShard],
        owned: Sequence[bool],
        average: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> None:
        """Copy them. On a GPU this is queued behind the steps so far, and not waited for.

        Args:
            shards: This rank's shards, one for each parameter.
            owned: Which of them it writes.
            average: This rank's part of the moving average by the parameter's name, flat.
            buffers: The model's buffers by name; empty on all ranks but one.
        """
        self.pieces = []
        for name, value in buffers.items():
            self._copy(f"buffer/{name}", value)
        for index, (shard, mine) in enumerate(zip(shards, owned, strict=True)):
            if not mine:
                continue
            self.pieces.append([index, shard.start, shard.numel])
            self._copy(f"weight/{index}", shard.weight())
            if shard.name in average:
                self._copy(f"ema/{index}", average[shard.name])
            for key, value in shard.optimizer_state().items():
                self._copy(f"{key}/{index}", value)
        if torch.cuda.is_available():
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def write(self, path: Path) -> None:
        """Write this rank's file; in any thread."""
        if self._arrived is not None:
            self._arrived.synchronize()
        save_file(self._tensors, str(path))
        follow_umask(path)

    @torch.no_grad()
    def _copy(self, name: str, tensor: Tensor) -> None:
        if name not in self._tensors:
            # Only page-locked memory can be copied to while the host goes on.
            self._tensors[name] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
            )
        self._tensors[name].copy_(tensor, non_blocking=True)


def check_same_model(manifest: StateManifest, shards: Sequence[ParameterShard], root: str) -> None:
    """Raise CheckpointError, with an example, if a state's parameters are not the model's."""
    here = [[shard.name, list(shard.shape)] for shard in shards]
    if here == manifest.parameters:
        return
    pairs = zip(manifest.parameters, here, strict=False)
    unlike = next(((was, now) for was, now in pairs if was != now), None)
    example = ""
    if unlike is not None:
        (was, shape), (now, other) = unlike
        example = f"; {was} {shape} there, {now} {other} here"
    raise CheckpointError(
        f"checkpoint.folder: {root} holds another model: {len(manifest.parameters)} parameters "
        f"there, {len(here)} here{example}. Choose another `out`"
    )


def files_needed(manifest: StateManifest, shards: Sequence[ParameterShard]) -> list[StateFile]:
    """The files that hold elements of these shards, and the first one, which holds the buffers."""
    return [
        file
        for number, file in enumerate(manifest.files)
        if number == 0 or any(_overlap(shards[i], start, n) for i, start, n in file.pieces)
    ]


def _overlap(shard: ParameterShard, start: int, numel: int) -> bool:
    return start < shard.start + shard.numel and shard.start < start + numel


@torch.no_grad()
def read_shards(
    manifest: StateManifest,
    paths: Mapping[str, Path],
    model: nn.Module,
    shards: Sequence[ParameterShard],
    average: Mapping[str, Tensor],
) -> None:
    """Fill this rank's shards, its average and the model's buffers, in place.

    Args:
        manifest: The state's manifest.
        paths: Where the `files_needed` are, by name.
        model: The model, whose buffers are filled; those named in its `fixed_buffers` are
            determined by the data, and are compared instead.
        shards: This rank's shards.
        average: This rank's part of the moving average by the parameter's name, flat.

    Raises: CheckpointError if a file cannot be read or an element is in none.
    """
    missing = [shard.numel for shard in shards]  # elements that no file has had yet
    for file in manifest.files:
        if file.name not in paths:
            continue
        try:
            with safe_open(str(paths[file.name]), framework="pt") as content:
                if file is manifest.files[0]:
                    _read_buffers(content, model)
                for index, start, numel in file.pieces:
                    if _overlap(shards[index], start, numel):
                        missing[index] -= _read_shard(content, shards[index], index, start, average)
        except SafetensorError as error:
            raise CheckpointError(f"{paths[file.name]}: {error}") from error
    lost = [shard.name for shard, count in zip(shards, missing, strict=True) if count != 0]
    if lost:
        raise CheckpointError(f"the state does not hold every element of {', '.join(lost[:3])}")


def _read_shard(
    content, shard: ParameterShard, index: int, start: int, average: Mapping[str, Tensor]
) -> int:
    """Copy the elements that a file's shard and this one share. Returns: how many they are."""
    targets = {"weight": shard.weight(), **shard.optimizer_state()}
    if shard.name in average:
        targets["ema"] = average[shard.name]
    count = 0
    for key, target in targets.items():
        if key == "step":
            target.copy_(content.get_tensor(f"step/{index}"))
            continue
        source = content.get_slice(f"{key}/{index}")  # reads from the disk what is asked for
        first = max(start, shard.start)
        last = min(start + source.get_shape()[0], shard.start + shard.numel)
        count = last - first
        target[first - shard.start : last - shard.start].copy_(source[first - start : last - start])
    return count


def _read_buffers(content, model: nn.Module) -> None:
    """Fill the buffers; those that the data determine must be equal to what was saved."""
    fixed = getattr(model, "fixed_buffers", ())
    for name, buffer in model.named_buffers():
        value = content.get_tensor(f"buffer/{name}")
        if name in fixed and not torch.equal(value, buffer.cpu()):
            raise CheckpointError(
                f"the state was trained on other data: its {name} differs from the data set's; "
                "put the data set back, or choose another `out`"
            )
        buffer.copy_(value)
