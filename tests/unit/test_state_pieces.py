"""Who owns which piece of a parameter, which files hold it, and what a manifest refuses."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from lgm_scale.checkpoint.manifest import StateFile, StateManifest, StateName
from lgm_scale.checkpoint.tensors import check_same_model, files_needed
from lgm_scale.errors import CheckpointError
from lgm_scale.parallel import shards as shards_module
from lgm_scale.parallel.shards import ParameterShard, gather, owned

Runs = list[tuple[int, int]]


class Ranks:
    """torch.distributed, as seen by one of several ranks whose shards and values are known."""

    def __init__(self, rank: int, runs: list[Runs], values: list[list[Tensor]] | None = None):
        self.rank, self.runs, self.values = rank, runs, values or []
        self.calls = 0

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_world_size(self) -> int:
        return len(self.runs)

    def get_rank(self) -> int:
        return self.rank

    def get_backend(self) -> str:
        return "gloo"

    def all_gather_object(self, every: list[Any], mine: Runs) -> None:
        assert mine == self.runs[self.rank]
        every[:] = self.runs

    def all_reduce(self, whole: Tensor) -> None:
        """Add what the other ranks hold of this parameter, as integers."""
        index, self.calls = self.calls, self.calls + 1
        for rank, runs in enumerate(self.runs):
            start, numel = runs[index]
            if rank != self.rank:
                whole[start : start + numel] += self.values[rank][index].view(torch.int32)


def shards_of(runs: Runs, shape: tuple[int, ...] = (2, 3)) -> list[ParameterShard]:
    return [
        ParameterShard(f"p{i}", shape, start, numel, torch.zeros(numel), None)
        for i, (start, numel) in enumerate(runs)
    ]


def test_equal_shards_are_dealt_like_cards_and_empty_ones_to_nobody(monkeypatch):
    runs: list[Runs] = [[(0, 6)] * 4 + [(0, 3), (0, 0), (0, 5)] for _ in range(2)]
    runs += [[(0, 6)] * 4 + [(3, 3), (0, 0), (5, 1)]]
    verdicts = []
    for rank in range(3):
        monkeypatch.setattr(shards_module, "dist", Ranks(rank, runs))
        verdicts.append(owned(shards_of(runs[rank])))
    assert verdicts == [
        [True, False, False, True, True, False, True],
        [False, True, False, False, False, False, False],
        [False, False, True, False, True, False, True],
    ]


def test_one_rank_owns_all_that_is_not_empty():
    assert owned(shards_of([(0, 6), (0, 0), (5, 1)])) == [True, False, True]


def test_pieces_are_gathered_bit_by_bit(monkeypatch):
    bits = torch.tensor([0x7FC00123, -0x80000000, 0x3F800000, 5, -7, 0], dtype=torch.int32)
    whole = bits.view(torch.float32)  # a NaN with a payload, minus zero, and small ones
    runs: list[Runs] = [[(0, 4)] * 2, [(4, 2)] * 2]
    values = [[whole[:4]] * 2, [whole[4:]] * 2]
    for rank in range(2):
        monkeypatch.setattr(shards_module, "dist", Ranks(rank, runs, values))
        found = dict(gather(shards_of(runs[rank]), values[rank]))
        assert list(found) == ["p0", "p1"]
        for value in found.values():
            assert value.shape == (2, 3)
            assert torch.equal(value.flatten().view(torch.int32), bits)


def test_one_rank_gathers_copies():
    value = torch.arange(6.0)
    ((name, found),) = gather(shards_of([(0, 6)]), [value])
    value.zero_()
    assert (name, found.tolist()) == ("p0", [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("numel", [1, 3, 4, 5, 8, 11])
def test_a_vectors_first_element_is_where_torch_chunk_cuts(numel):
    starts = [int(part[0]) for part in torch.arange(numel).chunk(4)]
    for rank in range(4):
        mesh = SimpleNamespace(
            size=lambda dim: (4, 2)[dim], get_local_rank=lambda dim, rank=rank: (rank, 1)[dim]
        )
        vector: Any = SimpleNamespace(
            ndim=1, placements=[Shard(0), Replicate()], numel=lambda: numel, device_mesh=mesh
        )
        found = shards_module._first_element(vector)
        assert found == (starts[rank] if rank < len(starts) else numel)


def test_a_piece_sees_its_part_of_weight_and_moments():
    held = nn.Parameter(torch.arange(6.0))
    optimizer = torch.optim.AdamW([held])
    piece = ParameterShard("p", (2, 3), 1, 3, held, optimizer, offset=2)
    assert piece.trainable
    assert piece.weight().tolist() == [2, 3, 4]
    made = piece.optimizer_state()  # before the first step
    assert {key: value.tolist() for key, value in made.items()} == {
        "step": 0,
        "exp_avg": [0, 0, 0],
        "exp_avg_sq": [0, 0, 0],
    }
    optimizer.state[held]["note"] = 3  # no tensor: not part of a state
    made["step"].fill_(7)
    made["exp_avg"].fill_(5)
    piece.weight().fill_(9)
    assert held.tolist() == [0, 1, 9, 9, 9, 5]
    assert optimizer.state[held]["exp_avg"].tolist() == [0, 0, 5, 5, 5, 0]
    assert {key: value.tolist() for key, value in piece.optimizer_state().items()} == {
        "step": 7,
        "exp_avg": [5, 5, 5],
        "exp_avg_sq": [0, 0, 0],
    }


def test_a_frozen_parameter_has_a_piece_without_moments():
    net = nn.Linear(2, 3)
    net.bias.requires_grad_(False)
    found = shards_module.local_shards(net, torch.optim.AdamW([net.weight]))
    assert [(piece.name, piece.trainable, piece.numel) for piece in found] == [
        ("weight", True, 6),
        ("bias", False, 3),
    ]
    assert found[1].optimizer_state() == {}


def test_tables_keep_their_names_and_shapes_in_every_module():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    net.register_parameter("table", nn.Parameter(torch.zeros(4, 5)))
    shapes = {name: p.shape for name, p in net.named_parameters()}
    shards_module.flatten_parameters(net)
    assert shards_module._whole_shapes(net) == shapes


# --- which files ------------------------------------------------------------------------------


def manifest(pieces: list[list[list[int]]], **changes: Any) -> StateManifest:
    files = [StateFile(f"rank-{i}", 1, "", part) for i, part in enumerate(pieces)]
    parameters = [["p0", [2, 3]], ["p1", [2, 3]]]
    return dataclasses.replace(
        StateManifest("run", 7, 1, len(files), "any", parameters, {}, files), **changes
    )


@pytest.mark.parametrize(
    ("runs", "needed"),
    [
        ([(0, 2), (0, 0)], [0, 1]),
        ([(2, 2), (0, 0)], [0, 2]),
        ([(1, 2), (0, 0)], [0, 1, 2]),
        ([(0, 0), (0, 6)], [0, 3]),
        ([(0, 0), (0, 0)], [0]),
    ],
)
def test_only_files_that_share_an_element_are_needed_and_the_first(runs, needed):
    state = manifest([[[1, 0, 0]], [[0, 0, 2]], [[0, 2, 4]], [[1, 0, 6]]])
    assert [file.name for file in files_needed(state, shards_of(runs))] == [
        f"rank-{i}" for i in needed
    ]


def test_another_model_is_told_by_its_first_difference():
    here = shards_of([(0, 6), (0, 6)])
    check_same_model(manifest([]), here, "folder")
    unlike = manifest([], parameters=[["p0", [2, 3]], ["q1", [6]], ["r", []]])
    text = r"folder holds another model: 3 parameters there, 2 here; q1 \[6\] there, p1 \[2, 3\]"
    with pytest.raises(CheckpointError, match=text):
        check_same_model(unlike, here, "folder")
    with pytest.raises(CheckpointError, match=r"1 parameters there, 2 here\. Choose"):
        check_same_model(manifest([], parameters=[["p0", [2, 3]]]), here, "folder")


# --- manifests --------------------------------------------------------------------------------


def test_a_states_name_says_its_step_and_attempt():
    assert str(StateName(12, 3)) == "ba00000012-a0003"
    for name in (StateName(12, 3), StateName(123456789, 12345)):
        assert StateName.parse(str(name)) == name
    for other in ("ba12-a0003", "ba00000012-a0003/x", "xba00000012-a0003", "attempts"):
        assert StateName.parse(other) is None


def test_a_manifest_comes_back_and_refuses_what_was_changed():
    state = manifest([[[0, 0, 2]]], scalars={"rate": 0.1, "name": "é"})
    content = state.to_bytes()
    assert StateManifest.from_bytes(content) == state
    with pytest.raises(CheckpointError, match="does not have its checksum"):
        StateManifest.from_bytes(content.replace(b'"step":7', b'"step":8'))
    with pytest.raises(CheckpointError, match="has format 2, this version reads 1"):
        StateManifest.from_bytes(dataclasses.replace(state, format=2).to_bytes())
    for damaged in (content[:-3], b"", b"[]", json.dumps({"sha256": ""}).encode()):
        with pytest.raises(CheckpointError, match="is damaged"):
            StateManifest.from_bytes(damaged)
