"""Compiled blocks: the same numbers, one graph per length, and none after each was seen once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lgm_scale.checkpoint.run_folder import RunFolder, differing
from lgm_scale.config.loading import to_dict
from lgm_scale.config.rules import load_training_run, uncompiled_reason
from lgm_scale.config.schema import TrainingRun
from lgm_scale.families.elit.network import ELIT
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.layers import choose_attention
from lgm_scale.merging.tree import MergeTree
from lgm_scale.parallel import compilation
from lgm_scale.parallel.blocks import compile_blocks
from lgm_scale.parallel.compilation import compiler_problem, settle_compile

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_flex_attention_is_part_of_the_graph(fresh_compiler, nets, tree):
    eager, compiled, counter = nets
    choose_attention(compiled, "flex")
    with torch.no_grad():  # newer versions refuse the backward pass on a CPU
        torch.testing.assert_close(step(compiled, tree, 16), step(eager, tree, 16))
        step(compiled, tree, 16, seed=1)
    assert counter.graphs == 1
    assert not torch._dynamo.utils.counters["graph_break"]


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


@pytest.mark.slow
def test_without_the_raised_limit_torch_gives_up(fresh_compiler, golden_dit, tree):
    """Why the limit is raised: by itself torch stops after eight graphs and runs uncompiled."""
    counter = GraphCounter()
    for block in golden_dit.blocks:
        block.compile(dynamic=False, backend=counter)
    for num_tokens in LENGTHS:
        step(golden_dit, tree, num_tokens)
    assert counter.graphs == torch._dynamo.config.recompile_limit < len(LENGTHS)


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


# --- train.compile: auto --------------------------------------------------------------------------

RECIPE = Path(__file__).resolve().parents[2] / "yamls" / "dit_xl.yaml"


def recipe(*overrides: str) -> TrainingRun:
    return load_training_run(str(RECIPE), list(overrides), 8, None)


def test_the_compiler_is_tried(fresh_compiler):
    def broken(graph, example_inputs):
        raise RuntimeError("no Triton")

    cpu, counter = torch.device("cpu"), GraphCounter()
    assert compiler_problem(cpu, backend=counter) is None
    assert counter.graphs == 1
    assert compiler_problem(cpu, backend=broken) == (
        "BackendCompilerFailed: backend='broken' raised: RuntimeError: no Triton"
    )


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ((), None),
        (("train.compile=true",), None),
        (("train.compile=false",), "train.compile: false"),
        (
            ("parallel.strategy=deepspeed", "parallel.deepspeed.stage=3"),
            "train.compile: auto is off; true has no use with parallel.deepspeed.stage: 3",
        ),
        (
            ("lora.base=runs/other/bundle", "lengths.choices=[64]"),
            "train.compile: auto is off; true is for generators without lora, so far",
        ),
    ],
)
def test_what_auto_means_is_known_without_a_gpu(overrides, reason):
    found = uncompiled_reason(recipe(*overrides))
    assert found == reason or (found or "").startswith(f"{reason}, ")


@pytest.mark.parametrize(
    # begun: the run that goes on was compiled; problem: of the compiler on some rank
    ("gpu", "begun", "reason", "problem", "recorded", "runs", "told"),
    [
        (True, None, None, None, True, True, "auto is on"),
        (True, None, None, "rank 3: no Triton", False, False, "fails on rank 3: no Triton"),
        (True, None, "a rule", None, False, False, "a rule"),
        (False, None, None, None, False, False, ""),
        (True, False, None, None, False, False, ""),
        (True, True, None, None, True, True, "auto is on"),
        (True, True, None, "rank 0: no Triton", True, False, "fails on rank 0"),
        (False, True, None, None, True, True, "auto is on"),
    ],
)
def test_all_ranks_settle_auto_alike(
    monkeypatch, caplog, gpu, begun, reason, problem, recorded, runs, told
):
    caplog.set_level("INFO", "lgm_scale")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    # This rank's own compiler works: what the others say decides.
    monkeypatch.setattr(compilation, "compiler_problem", lambda device: None)
    monkeypatch.setattr(compilation, "first_of_ranks", lambda own: own or problem)
    found = settle_compile(recipe(), begun, reason)
    assert [config.train.compile for config in found] == [recorded, runs]
    assert caplog.text.count("\n") == (1 if told else 0)
    assert told in caplog.text
    given = recipe("train.compile=true")
    assert settle_compile(given, begun, reason) == (given, given)


def test_a_run_stays_what_it_was_when_it_began(tmp_path):
    auto, on, off = (
        recipe(*words) for words in ((), ("train.compile=true",), ("train.compile=false",))
    )
    for config in (on, off):
        there = to_dict(config)
        assert differing(there, auto) == {}
        run = RunFolder(tmp_path / str(config.train.compile), config)
        assert run.begun_compiled() is None, "nothing is there"
        run.claim()
        (run.path / "bundle").mkdir()
        (run.path / "bundle" / "bundle.json").write_text("{}")
        assert RunFolder(run.path, auto).begun_compiled() is config.train.compile
        assert RunFolder(run.path, auto).finished()
    assert differing(to_dict(on), off) == {"train.compile": (True, False)}
    older = to_dict(off)
    del older["train"]["compile"]  # of before the key
    assert differing(older, off) == differing(older, auto) == {}
    assert differing(older, on) == {"train.compile": (False, True)}
