"""Steps that hold all lengths: the numbers of each sample alone, equal shares for every rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from streaming.base.partition import get_partitions
from streaming.base.world import World
from test_flops import counted
from test_training import generator_model, latent_batch, part
from torch import nn

from lgm_scale.config.rules import load_training_run
from lgm_scale.config.schema import MeanFlowConfig
from lgm_scale.data import streaming_internals
from lgm_scale.errors import ConfigError
from lgm_scale.families.lgm.config import DIT_SIZES, DiTSize
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.flow import NoiseScale
from lgm_scale.layers import choose_attention
from lgm_scale.merging.tree import MergeTree
from lgm_scale.parallel.blocks import checkpoint_blocks, compile_blocks
from lgm_scale.planning.plan import networks
from lgm_scale.planning.report import model_flops, step_shape
from lgm_scale.planning.simulation import simulate
from lgm_scale.planning.workload import length_shares
from lgm_scale.training.batch_scaling import split_evenly
from lgm_scale.training.callbacks import StepKeys
from lgm_scale.training.flow_model import TIMESTEP_BINS
from lgm_scale.training.length_schedule import LengthSchedule, spread_lengths
from lgm_scale.training.throughput import Throughput

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = [16, 16, 9, 4, 4, 4]


@pytest.fixture(scope="module")
def tree() -> MergeTree:
    return MergeTree.from_embeddings(torch.randn(16, 8, generator=torch.manual_seed(0)))


def random_net(end_time: bool = False) -> MergeDiT:
    net = MergeDiT(32, 2, 2, 4, 16, num_classes=5, end_time=end_time).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return net


def states(lengths: list[int]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    found = [torch.randn(1, k, 4, generator=generator, dtype=torch.float64) for k in lengths]
    return found, torch.rand(len(lengths), generator=generator), torch.arange(len(lengths)) % 6


def packed(net: MergeDiT, tree: MergeTree, lengths: list[int]) -> list[torch.Tensor]:
    """Velocities [1, K, D] of the samples, made at once."""
    z, t, labels = states(lengths)
    runs = Counter(lengths)
    groups, first = [], 0
    for count in runs.values():
        groups.append(torch.cat(z[first : first + count]))
        first += count
    result = net(groups, t, labels, [tree.assignment(k) for k in runs])
    return [sample[None] for group in result for sample in group]


def alone(net: MergeDiT, tree: MergeTree, lengths: list[int]) -> list[torch.Tensor]:
    """The same, one after the other."""
    z, t, labels = states(lengths)
    return [
        net(z[i], t[i : i + 1], labels[i : i + 1], tree.assignment(k))
        for i, k in enumerate(lengths)
    ]


# --- the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mask", "channel"])
@pytest.mark.parametrize("lengths", [LENGTHS, [16, 16], [9]])
def test_velocities_and_gradients_are_those_of_each_sample_alone(tree, form, lengths):
    results = []
    for forward in (packed, alone):
        net = random_net()
        choose_attention(net, form)
        if forward is packed:
            checkpoint_blocks(list(net.blocks), 0.5)
        velocities = forward(net, tree, lengths)
        sum((v * (v + i + 1)).sum() for i, v in enumerate(velocities)).backward()
        results.append([*velocities, *(p.grad for p in net.parameters())])
    assert len(results[0]) == len(results[1]) > len(lengths)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_operations_are_those_of_the_samples(tree):
    net = MergeDiT.from_size("tiny", latent_dim=4, num_base_tokens=16, num_classes=5).double()
    expected = sum(map(net.flops, LENGTHS))
    assert counted(lambda: packed(net, tree, LENGTHS)) == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_a_layout_is_compiled_once(tree):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    net, eager = random_net(), random_net()
    try:
        compile_blocks(net, LENGTHS, backend=count)
        for _ in range(2):
            found = packed(net, tree, LENGTHS)
            sum(v.square().sum() for v in found).backward()
        assert len(graphs) == 1
        assert not torch._dynamo.utils.counters["graph_break"]
        torch.testing.assert_close(found, packed(eager, tree, LENGTHS), rtol=1e-12, atol=1e-12)
    finally:
        torch._dynamo.reset()


# --- the training step ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", list(NoiseScale))
def test_a_step_is_the_mean_of_its_samples_whatever_the_micro_batch(scale):
    batch = latent_batch(size=6) | {"num_tokens": LENGTHS}
    found = []
    singles = [
        part(batch, slice(i, i + 1)) | {"num_tokens": k} for i, k in enumerate(LENGTHS)
    ]  # by the plain path
    for items in (singles, [batch], split_evenly(batch, 3), split_evenly(batch, 2)):
        model = generator_model(scale=scale)
        model.lengths = sorted(set(LENGTHS))
        losses = [model.loss(model(item), item) for item in items]
        torch.stack(losses).mean().backward()
        groups = model.record.take_groups()
        bins = [groups[name] for name in TIMESTEP_BINS]
        gradients = [p.grad for p in model.net.parameters()]
        found.append([model.record.take()["loss"], *bins, *gradients])
        if items is not singles:
            counts = {k: groups[f"loss/K={k}"][1].item() for k in set(LENGTHS)}
            assert counts == {16: 2, 9: 1, 4: 3}
            total = sum(groups[f"loss/K={k}"][0].item() for k in set(LENGTHS))
            assert total / 6 == pytest.approx(found[0][0].item(), rel=1e-5)
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["mask", "channel"])
@pytest.mark.parametrize("scale", list(NoiseScale))
def test_mean_flow_and_contrast_of_a_row_are_those_of_each_length_alone(scale, form):
    """Each sample with its own target, guidance and end; the other one is of the same K."""
    lengths, results = [16, 16, 9, 9, 9, 4, 4], []
    batch = latent_batch(size=len(lengths)) | {"num_tokens": lengths}
    groups = [
        part(batch, slice(lengths.index(k), lengths.index(k) + lengths.count(k)))
        | {"num_tokens": k}
        for k in (16, 9, 4)
    ]  # by the plain path
    for items in ([batch], groups):
        model = generator_model(scale=scale)
        model.net = random_net(end_time=True)
        flow = MeanFlowConfig(share=0.7, guidance=3.0)
        model.objective = replace(model.objective, mean_flow=flow, contrastive=0.1)
        choose_attention(model.double(), form)
        outputs = [model(item) for item in items]
        outputs = outputs[0] if items[0] is batch else outputs
        error = [(o.v_pred - o.v_target).square().mean((1, 2)) for o in outputs]
        error += [model._per_sample(o) for o in outputs]
        torch.cat(error).sum().backward()
        found = [part for o in outputs for part in (o.v_pred, o.v_target, o.t)]
        results.append([*found, *error, *(p.grad for p in model.net.parameters())])
    for found, expected in zip(*results, strict=True):
        exact = 1e-12 if found.dtype is torch.float64 else 1e-6  # losses are float32
        torch.testing.assert_close(found, expected, rtol=exact, atol=exact)


def test_the_lengths_of_a_batch_reach_every_micro_batch():
    state = SimpleNamespace(
        batch={"sample_ids": torch.arange(8)},
        timestamp=SimpleNamespace(batch=SimpleNamespace(value=5)),
    )
    spread = spread_lengths([4, 8], 8)
    StepKeys(LengthSchedule([4, 8]), True, spread).batch_start(state, None)  # type: ignore[arg-type]
    first, second = split_evenly(state.batch, 4)
    assert first["num_tokens"] == second["num_tokens"] == [8, 8, 4, 4]
    assert first["sample_ids"].tolist() == [0, 2, 4, 6]
    assert (first["step"], second["sample_ids"].tolist()) == (5, [1, 3, 5, 7])


# --- which sample has which length ------------------------------------------------------------


@pytest.mark.parametrize("choices", [[32, 128, 64, 128], [128, 128, 128, 128, 64, 64, 32]])
def test_ranks_and_micro_batches_share_the_lengths_of_a_global_batch(choices):
    whole = spread_lengths(choices, 64)
    assert whole == sorted(whole, reverse=True)
    exact = {k: 64 * choices.count(k) / len(choices) for k in choices}
    assert all(abs(whole.count(k) - exact[k]) < 1 for k in choices)
    for world in (1, 2, 4, 8):
        ranks = [spread_lengths(choices, 64, rank, world) for rank in range(world)]
        assert sorted(k for rank in ranks for k in rank) == sorted(whole)
        assert sum(ranks[0]) == max(map(sum, ranks))
        assert all(abs(rank.count(k) - exact[k] / world) < 1 for rank in ranks for k in choices)
        assert ranks[0] == spread_lengths(choices, 64 // world)


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("seen", [0, 24])
def test_the_library_deals_samples_out_as_we_say(monkeypatch, nodes, workers, seen):
    """Whatever the number of ranks, a global batch is the same, and so is each sample's place."""
    ranks_per_node, global_batch = 2, 12
    world_size = nodes * ranks_per_node
    size = global_batch // world_size
    dealt = get_partitions("relaxed", 120, 1, nodes, ranks_per_node, workers, size, seen, nodes)
    for rank in range(world_size):
        found = World(nodes, ranks_per_node, 1, rank)
        monkeypatch.setattr(streaming_internals.World, "detect", lambda found=found: found)
        place = streaming_internals.rank_place()
        mine = dealt[found.node, found.rank_of_node]  # [workers, batches, size]
        batches = mine.transpose(1, 0, 2).reshape(-1, size)  # workers take turns
        for index in range((120 - seen) // global_batch):
            first = seen + index * global_batch
            expected = range(first + place, first + global_batch, world_size)
            assert batches[index].tolist() == list(expected)


# --- configuration, plan and report -----------------------------------------------------------


def run_of(*overrides: str, world_size: int = 1):
    keys = ["lengths.per_sample=true", *overrides]
    return load_training_run(str(ROOT / "yamls/demo/dit.yaml"), keys, world_size, has_gpu=None)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["lengths.weights=[1,1,1,1,1]"], r"lengths.weights: \[1.0, .* set it to null"),
        (["lengths.longest_first=5"], "lengths.longest_first: 5 beside .* set it to 0"),
        (["train.batch_scaling=constant_tokens"], "constant_tokens beside .* constant_samples"),
        (["train.device_microbatch_tokens=640"], "device_microbatch_tokens: 640 beside"),
        (["train.float8=true"], "train.float8: true was not tried beside lengths.per_sample"),
        (
            ["objective.contrastive=0.05", "train.device_microbatch_size=8"],
            "size: 8 is too small for the losses, which need 10 samples",
        ),
        (["lora={base: x}", "lengths.choices=[8]"], "lengths.per_sample: true, and an adapter"),
        (["train.global_batch_size=4"], "4 samples do not hold the 5 lengths.choices"),
    ],
)
def test_what_does_not_go_with_it_is_refused(overrides, text):
    with pytest.raises(ConfigError, match=text):
        run_of(*overrides)


def test_a_plan_counts_every_sample_once(monkeypatch):
    monkeypatch.setitem(DIT_SIZES, "tiny", DiTSize(128, 1, 4, 0.0))  # one block is simulated sooner
    run = run_of("train.global_batch_size=40", "train.device_microbatch_size=5", world_size=2)
    assert length_shares(run) == {8: 0.2, 16: 0.2, 32: 0.2, 64: 0.4}
    shape = step_shape(run, 2, 64)
    assert (shape.num_tokens, shape.micro_batches) == ((64, 64, 32, 16, 8), 4)
    nets = networks(run)
    flops = sum(map(nets.network.flops, [64, 64, 32, 16, 8]))  # type: ignore[operator]
    assert model_flops(nets, shape) == pytest.approx(3 * 4 * flops)
    simulated = simulate(run, 1, shape.num_samples, shape.num_tokens)
    assert simulated is not None
    (passes,) = simulated.passes
    assert passes.work.flops == pytest.approx(3 * flops, rel=0.05)


def test_throughput_counts_the_samples_of_all_ranks():
    reports = []
    log = SimpleNamespace(log_metrics=reports.append)
    callback = Throughput(2, lambda k: 100.0 * k, 1e6, [32, 8, 8])
    callback._clock = SimpleNamespace(mark=lambda: None, seconds=lambda start, end: 2.0)  # type: ignore[assignment]
    batch = {"num_tokens": [32, 8], "sample_ids": torch.arange(2)}
    for _ in range(2):
        callback.batch_start(SimpleNamespace(batch=batch), log)  # type: ignore[arg-type]
        callback.batch_end(SimpleNamespace(batch=batch), log)  # type: ignore[arg-type]
    assert reports[0]["throughput/tokens_per_second"] == 2 * 48 / 2.0
    assert reports[0]["throughput/mfu"] == pytest.approx(3 * 2 * 4800 / 2.0 / 1e6)
    assert not any("K=" in name for name in reports[0])
