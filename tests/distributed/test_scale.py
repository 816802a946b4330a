"""What a step moves on 8, 64 and 1,024 ranks: the parameters, and next to nothing beside them.

The widths are those of each family's XL network (the tokenizer's is L); of its blocks, which are
all alike, one or three stay. Every collective is compared with the parameters of its own unit, so
depth plays no part.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lgm_scale.config.schema import FSDPConfig
from lgm_scale.families.elit.config import SIT_SIZES
from lgm_scale.families.elit.network import ELIT
from lgm_scale.families.lgm.config import DIT_SIZES
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.merging.tree import MergeTree
from lgm_scale.parallel.blocks import transformer_blocks
from lgm_scale.parallel.fsdp import shard_model
from lgm_scale.parallel.torch_internals import fake_tensors
from lgm_scale.parallel.traffic import Traffic, Transfer
from lgm_scale.planning.simulation import fake_ranks

WORLDS = (8, 64, 1024)
Run = Callable[[nn.Module], Tensor]


def lgm() -> tuple[nn.Module, Run]:
    with torch.device("cpu"):
        cut = MergeTree.from_embeddings(torch.randn(256, 8), 4).assignment(32)
    row = DIT_SIZES["xl"]
    net = MergeDiT(row.width, 1, row.num_heads, 32, 256, 1000)
    return net, lambda net: net(torch.randn(2, 32, 32), torch.rand(2), torch.zeros(2).long(), cut)


def elit() -> tuple[nn.Module, Run]:
    row = SIT_SIZES["xl"]
    net = ELIT(
        *(row.width, 3, row.num_heads, 4, 32, 2, 1000), head_blocks=1, tail_blocks=1, group_size=4
    )
    k = net.token_lengths[0]
    return net, lambda net: net(torch.randn(2, 4, 32, 32), torch.rand(2), torch.zeros(2).long(), k)


def tokenizer() -> tuple[nn.Module, Run]:
    def run(net: nn.Module) -> Tensor:
        outputs = net(torch.randn(1, 3, 256, 256), 256)
        return outputs.reconstruction.float().sum() + outputs.similarity.sum()

    net = Tokenizer(TokenizerModelConfig(size="l"))
    for part in (net.encoder, net.decoder):
        del part.vit.blocks[1:]
    return net, run


NETWORKS = {"lgm": lgm, "elit": elit, "tokenizer": tokenizer}


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("family", NETWORKS)
def test_nothing_but_parameters_is_gathered_and_reduced(family, world_size):
    with torch.device("meta"):
        net, run = NETWORKS[family]()
    blocks = transformer_blocks(net)
    units = [sum(p.numel() for p in block.parameters()) for block in blocks]
    units.append(sum(p.numel() for p in net.parameters()) - sum(units))
    model = nn.ModuleDict({"net": net})
    with fake_ranks(world_size):
        shard_model(model, FSDPConfig(), torch.bfloat16)
        with fake_tensors(), torch.autocast("cpu", torch.bfloat16):
            model.to_empty(device="cpu")
            with Traffic() as traffic:
                run(net).float().sum().backward()

    def moved(operation: str, itemsize: int) -> list[int]:
        found = [t for t in traffic.transfers if t == Transfer(operation, t.numel, itemsize)]
        return sorted(t.numel for t in found)

    # What is left of the network stays gathered from the forward to the end of the backward pass.
    for found, of in (
        (moved("all-gather", 2), sorted(units + units[:-1])),
        (moved("reduce-scatter", 8), sorted(units)),  # float64 on a CPU
    ):
        assert len(found) == len(of)
        for elements, parameters in zip(found, of, strict=True):
            assert parameters <= elements <= 1.05 * parameters
