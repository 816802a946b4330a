"""FSDP with weights gathered in bfloat16: autocast's numbers, and inputs that stay as they are."""

from __future__ import annotations

import copy

import torch
from composer.utils import dist, get_device
from rank_processes import run_calls
from torch import nn

from lgm_scale.config.schema import FSDPConfig
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.tokenizer.critic import CriticHeads
from lgm_scale.merging.tree import MergeTree
from lgm_scale.parallel.fsdp import shard_model


def test_gathered_bfloat16_is_autocast_and_rounds_no_input(tmp_path):
    run_calls(1, compare_with_autocast, log=tmp_path / "log")


def compare_with_autocast() -> None:
    dist.initialize_dist(get_device("cpu"))
    torch.manual_seed(0)
    net = MergeDiT.from_size("tiny", 8, 16, 10)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    plain, model = copy.deepcopy(net), nn.ModuleDict({"net": net})
    shard_model(model, FSDPConfig(), torch.bfloat16)
    seen: list[torch.dtype] = []
    model["net"].t_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    tree = MergeTree.from_embeddings(torch.randn(16, 4), 4)
    z, t = torch.randn(4, 8, 8), torch.tensor([0.1234567, 0.5, 0.9, 0.7654321])
    batch = (z, t, torch.tensor([0, 1, 2, 10]), tree.assignment(8, "cpu"))
    outputs, gradients = [], []
    for network in (plain, model["net"]):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(network(*batch).float())
        outputs[-1].square().mean().backward()
        (gradient,) = [p.grad for n, p in network.named_parameters() if n == "x_embed.weight"]
        gradients.append(getattr(gradient, "full_tensor", lambda g=gradient: g)().view(-1))
    scale = outputs[0].abs().max()
    assert (outputs[0] - outputs[1]).abs().max() < 0.02 * scale
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()
    assert gradients[1].dtype == torch.float32
    assert seen == [torch.float32]


def test_the_critic_is_gathered_as_it_computes(tmp_path):
    run_calls(1, judge_under_autocast, log=tmp_path / "log")


def judge_under_autocast() -> None:
    dist.initialize_dist(get_device("cpu"))
    torch.manual_seed(0)
    heads = CriticHeads(channels=8, num_depths=2)
    plain, model = copy.deepcopy(heads), nn.ModuleDict({"critic": heads})
    shard_model(model, FSDPConfig(), torch.bfloat16)
    features = [torch.randn(2, 8, 16) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = model["critic"](features), plain(features)
    assert torch.equal(logits, expected)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in heads.parameters())
