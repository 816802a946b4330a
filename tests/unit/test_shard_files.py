"""A state is runs of elements: written by some cut of the parameters, read by any other."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lgm_scale.checkpoint.manifest import StateFile, StateManifest
from lgm_scale.checkpoint.tensors import ShardCopy, read_shards
from lgm_scale.errors import CheckpointError
from lgm_scale.parallel.shards import ParameterShard

SHAPES = {"net.weight": (4, 5), "net.bias": (4,), "net.scale": ()}
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
# (start, numel) of each parameter on each rank.
WHOLE = [[(0, 20), (0, 4), (0, 1)]]
ROWS = [[(0, 10), (0, 2), (0, 1)], [(10, 10), (2, 2), (1, 0)]]  # FSDP: whole rows
# FSDP's first version, of which states still exist: a cut goes through rows anywhere.
RUNS = [[(0, 13), (0, 0), (0, 0)], [(13, 7), (0, 3), (0, 0)], [(20, 0), (3, 1), (0, 1)]]


class Part(NamedTuple):
    """A shard, and the values that it reads and writes."""

    shard: ParameterShard
    values: dict[str, Tensor]


def model() -> nn.Module:
    net = nn.Module()
    net.register_buffer("table", torch.arange(3.0))
    return net


def whole(index: int, key: str, numel: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * index + len(key))
    return torch.randn(numel, generator=generator)


def parts_of(cut: list[tuple[int, int]], filled: bool) -> list[Part]:
    found = []
    for index, (name, (start, numel)) in enumerate(zip(SHAPES, cut, strict=True)):
        total = torch.Size(SHAPES[name]).numel()
        values = {
            key: whole(index, key, total)[start : start + numel].clone()
            for key in ("weight", "exp_avg", "exp_avg_sq", "ema")
        }
        values["step"] = torch.tensor(7.0)
        if not filled:
            values = {key: torch.full_like(value, -1) for key, value in values.items()}
        optimizer = torch.optim.AdamW([values["weight"]])
        optimizer.state[values["weight"]] = {key: values[key] for key in MOMENTS}
        shard = ParameterShard(name, SHAPES[name], start, numel, values["weight"], optimizer)
        found.append(Part(shard, values))
    return found


def split(parts: list[Part]) -> tuple[list[ParameterShard], dict[str, Tensor]]:
    """The shards, and the moving average by the parameter's name."""
    return [p.shard for p in parts], {p.shard.name: p.values["ema"] for p in parts}


def written(folder: Path, cuts: list[list[tuple[int, int]]]) -> StateManifest:
    files = []
    for rank, cut in enumerate(cuts):
        path = folder / f"rank-{rank}.safetensors"
        parts = parts_of(cut, filled=True)
        shards, average = split(parts)
        buffers = dict(model().named_buffers()) if rank == 0 else {}
        owned = [shard.numel > 0 for shard in shards]
        copied = ShardCopy()
        copied.take(shards, owned, average, buffers)
        for value in (value for part in parts for value in part.values.values()):
            value.fill_(-2)  # the training goes on
        copied.write(path)
        files.append(StateFile(path.name, path.stat().st_size, "", copied.pieces))
    parameters = [[name, list(shape)] for name, shape in SHAPES.items()]
    return StateManifest("run", 7, 1, len(cuts), "any", parameters, {}, files)


CUTS = {"whole": WHOLE, "rows": ROWS, "runs": RUNS}


@pytest.mark.parametrize("wrote", CUTS)
@pytest.mark.parametrize("reads", CUTS)
def test_any_cut_reads_what_any_cut_wrote(tmp_path, wrote, reads):
    manifest = written(tmp_path, CUTS[wrote])
    paths = {file.name: tmp_path / file.name for file in manifest.files}
    for cut in CUTS[reads]:
        found, expected = parts_of(cut, filled=False), parts_of(cut, filled=True)
        net = model()
        net.table.zero_()  # type: ignore[operator]
        read_shards(manifest, paths, net, *split(found))
        assert torch.equal(net.table, torch.arange(3.0))  # type: ignore[arg-type]
        for part, wanted in zip(found, expected, strict=True):
            for key, value in wanted.values.items():
                if part.shard.numel:
                    assert torch.equal(part.values[key], value), (part.shard.name, key)


def test_a_state_that_lacks_elements_is_refused(tmp_path):
    manifest = written(tmp_path, RUNS)
    paths = {file.name: tmp_path / file.name for file in manifest.files[:2]}
    found = parts_of(WHOLE[0], filled=False)
    with pytest.raises(CheckpointError, match=r"not hold every element of net\.bias, net\.scale"):
        read_shards(manifest, paths, model(), *split(found))


def test_a_state_that_was_trained_on_other_data_is_refused(tmp_path):
    manifest = written(tmp_path, WHOLE)
    paths = {file.name: tmp_path / file.name for file in manifest.files}
    net = model()
    net.fixed_buffers = ("table",)  # type: ignore[assignment]  # the data determine it
    read_shards(manifest, paths, net, *split(parts_of(WHOLE[0], filled=False)))
    net.table[0] = 9  # type: ignore[index]
    with pytest.raises(CheckpointError, match="trained on other data: its table differs"):
        read_shards(manifest, paths, net, *split(parts_of(WHOLE[0], filled=False)))
