"""Compiled blocks: the same numbers, one graph per length, and none after each was seen once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lgm_scale.families.elit.network import ELIT
from lgm_scale.families.lgm.config import RoutingConfig
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.merging.nesting import nested_cuts
from lgm_scale.merging.tree import MergeTree
from lgm_scale.parallel.blocks import compile_blocks

LENGTHS = [8, 16, 24, 32, 48, 64, 96, 128, 256]  # more than torch's own limit of 8 graphs


@pytest.fixture(scope="module")
def tree() -> MergeTree:
    return MergeTree.from_embeddings(torch.randn(256, 12, generator=torch.manual_seed(0)))


class GraphCounter:
    """A compiler that changes nothing and counts its graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


@pytest.fixture
def nets(golden_dit) -> tuple[MergeDiT, MergeDiT, GraphCounter]:
    """The same network twice, eager and compiled."""
    compiled, counter = MergeDiT(64, 2, 4, 8, 256, 10), GraphCounter()
    compiled.load_state_dict(golden_dit.state_dict())
    compile_blocks(compiled, LENGTHS, backend=counter)
    return golden_dit, compiled, counter


def step(net: nn.Module, tree: MergeTree, num_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z_t = torch.randn(2, num_tokens, 8, generator=generator)
    t = torch.rand(2, generator=generator)
    return net(z_t, t, torch.tensor([seed % 10, 10]), tree.assignment(num_tokens))


def test_no_graph_is_made_twice(fresh_compiler, nets, tree):
    _, net, counter = nets
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for seed, num_tokens in enumerate(LENGTHS):
        step(net, tree, num_tokens, seed).square().mean().backward()
        optimizer.step()
    assert counter.graphs == len(LENGTHS), "one per length, shared by all blocks"
    order = torch.randint(len(LENGTHS), (60,), generator=torch.manual_seed(1)).tolist()
    for seed, index in enumerate(order):
        step(net, tree, LENGTHS[index], seed).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.graphs == len(LENGTHS)
    assert not torch._dynamo.utils.counters["graph_break"]

    with torch.no_grad():  # evaluation has graphs of its own, once
        for _ in range(2):
            for num_tokens in LENGTHS:
                step(net, tree, num_tokens)
    assert counter.graphs == 2 * len(LENGTHS)


@pytest.mark.parametrize("num_tokens", [16, 64, 256])
def test_compiled_numbers_are_the_eager_ones(fresh_compiler, nets, tree, num_tokens):
    eager, compiled, counter = nets
    for net in nets[:2]:
        step(net, tree, num_tokens).square().mean().backward()
    assert counter.graphs == 1
    torch.testing.assert_close(step(compiled, tree, num_tokens), step(eager, tree, num_tokens))
    expected = dict(eager.named_parameters())
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad)


def test_without_the_raised_limit_torch_gives_up(fresh_compiler, golden_dit, tree):
    """Why the limit is raised: by itself torch stops after eight graphs and runs uncompiled."""
    counter = GraphCounter()
    for block in golden_dit.blocks:
        block.compile(dynamic=False, backend=counter)
    for num_tokens in LENGTHS:
        step(golden_dit, tree, num_tokens)
    assert counter.graphs == torch._dynamo.config.recompile_limit < len(LENGTHS)


def test_nested_routing_has_a_graph_for_each_token_count(fresh_compiler, tree):
    torch.manual_seed(0)
    eager, compiled = (
        MergeDiT(64, 3, 4, 8, 256, 10, RoutingConfig(first=1, last=1)) for _ in range(2)
    )
    for parameter in eager.parameters():
        nn.init.normal_(parameter, std=0.1)
    compiled.load_state_dict(eager.state_dict())
    compiled.trained_middles, counter = {64: {16: 0.5, 64: 0.5}, 32: {16: 1.0}}, GraphCounter()
    compile_blocks(compiled, (64, 32), backend=counter)
    t, labels = torch.tensor([0.2, 0.8]), torch.tensor([1, 5])
    for num_tokens, inner in [(64, 16), (64, 64), (32, 16)] * 2:
        cuts = nested_cuts(tree, num_tokens, inner)
        z_t = torch.randn(2, num_tokens, 8)
        losses = [net(z_t, t, labels, cuts.fine, cuts).square().mean() for net in (eager, compiled)]
        torch.testing.assert_close(losses[1], losses[0])
        losses[1].backward()
    assert counter.graphs == 3
    assert torch._dynamo.config.recompile_limit >= 3 * 4


def test_an_elit_has_a_graph_per_budget_and_one_for_its_outer_blocks(fresh_compiler):
    torch.manual_seed(0)
    options = {"head_blocks": 1, "tail_blocks": 1, "group_size": 2, "position_rows": 64}
    eager, compiled = (ELIT(32, 4, 4, 3, 16, 2, 5, **options) for _ in range(2))
    for parameter in eager.parameters():
        nn.init.normal_(parameter, std=0.1)
    compiled.load_state_dict(eager.state_dict())
    counter, budgets = GraphCounter(), (16, 32, 48)
    compile_blocks(compiled, budgets, backend=counter)
    z_t, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.8]), torch.tensor([1, 5])
    for num_tokens in budgets * 2:
        losses = [net(z_t, t, labels, num_tokens).square().mean() for net in (eager, compiled)]
        torch.testing.assert_close(losses[1], losses[0])
        losses[1].backward()
    assert counter.graphs == len(budgets) + 1
    assert not torch._dynamo.utils.counters["graph_break"]
