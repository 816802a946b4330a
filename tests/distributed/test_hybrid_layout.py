"""Hybrid sharding on four ranks: two copies, each cut in two, and one owner for every element.

A step under it needs GPUs; what each rank keeps does not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from composer.utils import dist as composer_dist
from composer.utils import get_device
from rank_processes import run_calls
from torch import nn

from lgm_scale.config.schema import FSDPConfig
from lgm_scale.errors import ConfigError
from lgm_scale.parallel.fsdp import shard_model
from lgm_scale.parallel.shards import gather, local_shards, owned

RANKS = 4


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Module()
    net.blocks = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))  # 3 rows: no equal halves
    net.scale = nn.Parameter(torch.randn(5))
    return nn.ModuleDict({"net": net})


def worker(folder: Path) -> None:
    composer_dist.initialize_dist(get_device("cpu"))
    model = network()
    shard_model(model, FSDPConfig(shard="hybrid", group_size=2), torch.float32)
    shards = local_shards(model, torch.optim.AdamW(model.parameters()))
    whole = dict(gather(shards, [shard.weight() for shard in shards]))
    try:
        shard_model(network(), FSDPConfig(shard="hybrid", group_size=3), torch.float32)
        refused = ""
    except ConfigError as error:
        refused = str(error)
    found = {
        "runs": [(shard.start, shard.numel) for shard in shards],
        "owned": owned(shards),
        "whole": whole,
        "refused": refused,
    }
    torch.save(found, folder / f"{dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    run_calls(RANKS, worker, folder, log=folder / "log")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_groups_hold_the_same_rows(ranks):
    runs = [rank["runs"] for rank in ranks]
    assert runs[0] == runs[2] != runs[1] == runs[3]
    weights = [name for name, _ in network().named_parameters()]
    first = weights.index("net.blocks.0.weight")
    assert (runs[0][first], runs[1][first]) == ((0, 9), (9, 9))  # halves of 3 rows of 6


def test_every_element_has_one_owner(ranks):
    for index, (_, parameter) in enumerate(network().named_parameters()):
        elements = sorted(
            element
            for rank in ranks
            if rank["owned"][index]
            for element in range(rank["runs"][index][0], sum(rank["runs"][index]))
        )
        assert elements == list(range(parameter.numel()))
    shares = [sum(rank["owned"]) for rank in ranks]
    assert max(shares) < sum(shares) / 2  # no rank writes most of it


def test_they_make_the_whole(ranks):
    for rank in ranks:
        for name, parameter in network().named_parameters():
            assert torch.equal(rank["whole"][name], parameter.detach())


def test_a_group_that_does_not_divide_the_ranks_is_refused(ranks):
    assert all("group_size: 3 of 4 ranks cannot share a copy" in r["refused"] for r in ranks)
