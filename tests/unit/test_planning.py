"""Simulated steps, predicted times, and advice: what they say, and what they refuse."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from lgm_scale import train
from lgm_scale.config.rules import load_training_run
from lgm_scale.config.schema import ParallelConfig
from lgm_scale.errors import ConfigError
from lgm_scale.families.base import family_of
from lgm_scale.families.lgm.training import LGMTrainingModel
from lgm_scale.parallel.traffic import Transfer
from lgm_scale.planning import advice
from lgm_scale.planning.advice import GIB, Search, advise
from lgm_scale.planning.hardware import GPUS, parse_memory, read_calibration
from lgm_scale.planning.options import PlanOptions
from lgm_scale.planning.plan import networks
from lgm_scale.planning.prediction import collective_seconds, predict
from lgm_scale.planning.recorder import Recorder
from lgm_scale.planning.report import print_simulation
from lgm_scale.planning.simulation import Simulated, simulate
from lgm_scale.planning.strategies import Moved, PlannedStep, StepShape, plan_step

YAMLS = Path(__file__).resolve().parents[2] / "yamls"
TINY = ["model.size=tiny", "train.global_batch_size=512", "lengths.choices=[64,32]"]
H100 = GPUS["h100"]


def tiny(*overrides: str):
    return load_training_run(str(YAMLS / "dit_xl.yaml"), [*TINY, *overrides], 64, None)


def fsdp(*overrides: str):
    return tiny("parallel.strategy=fsdp", "train.global_batch_size=64", *overrides)


@cache
def simulated(*overrides: str) -> Simulated:
    """A step of 32 samples at full length, of one process."""
    found = simulate(tiny(*overrides), 1, 32, 64)
    assert found is not None
    return found


@cache
def sharded_step(world_size: int, *overrides: str) -> PlannedStep:
    run = fsdp(*overrides)
    step = plan_step(run, networks(run).infos(), world_size, StepShape(8, 64))
    assert step is not None
    return step


# --- what is recorded ---------------------------------------------------------------------------


def test_storages_are_counted_once_from_first_to_last_use():
    with Recorder() as recorder:
        x = torch.zeros(1000)
        view = x.view(10, 100)
        del x
        y = view + 1
        del view
        twice = y * 2
        assert recorder.timeline().tolist() == [4000, 8000, 4000, 8000]
        twice.untyped_storage().resize_(0)  # as FSDP2 frees what it gathered
        assert recorder.timeline()[-1] == 4000
        assert recorder.timeline(without=recorder.serials([y]))[-1] == 0


def test_products_and_bytes_of_other_operations():
    a, b = torch.ones(8, 16), torch.ones(16, 4)
    with Recorder() as recorder:
        c = a @ b
        d = (c + 1).relu()
        work = recorder.take_work()
    assert work.flops == 2 * 8 * 16 * 4
    (product,) = work.products
    assert product.nbytes == 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert work.eager_bytes == 4 * (2 * c.numel() + 2 * d.numel())  # two kernels
    assert work.fused_bytes == 4 * (c.numel() + d.numel())  # one: the sum never lands in memory
    assert work.kernels == 3


@pytest.mark.slow
def test_a_micro_batch_of_any_size_lies_on_the_line_through_two():
    """The peak of a size that was not simulated equals the one that is."""
    run = tiny()
    search = Search(run, networks(run), 8, PlanOptions())
    found = search._choice(run, 32)
    direct = simulated()
    expected = search.infos, 8, StepShape(32, 64, 2)
    assert found.shape == expected[2]
    alone = simulate(run, 1, 32, 64, micro_batches=2)
    step = plan_step(run, *expected, simulated=alone)
    assert step is not None
    assert found.step.state == step.state
    assert found.step.peak == pytest.approx(step.peak, rel=0.02)
    lines = search._simulated(run, 32, 1)
    np.testing.assert_allclose(lines.live, direct.live, rtol=5e-3)
    assert lines.live.max() == pytest.approx(direct.live.max(), rel=1e-3)


@pytest.mark.slow
def test_recomputation_takes_memory_off_and_adds_products():
    plain, again = simulated(), simulated("parallel.activation_checkpointing=1")
    assert again.peak < 0.7 * plain.peak
    assert again.passes[0].work.flops > 1.25 * plain.passes[0].work.flops


@pytest.mark.slow
def test_precision_changes_activations():
    half, full = simulated(), simulated("train.precision=fp32")
    assert half.activations.max() < 0.9 * full.activations.max()


@pytest.mark.slow
def test_operations_are_those_of_the_closed_form():
    network = networks(tiny()).network
    expected = 3 * 32 * network.flops(64)  # type: ignore[operator]
    assert simulated().passes[0].work.flops == pytest.approx(expected, rel=0.05)  # padded heads


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [["space.kind=pixels", "space.vae=null", "model.patch_size=16"], []],
    ids=["pixels", "latents"],
)
def test_elit_can_be_simulated(overrides):
    keys = ["model.size=tiny", "model.interface.split=declared", "lengths.choices=[64]"]
    run = load_training_run(str(YAMLS / "elit_b.yaml"), [*keys, *overrides], 8, None)
    found = simulate(run, 1, 2, 64)
    assert found is not None
    assert found.peak > found.state


@pytest.mark.slow
def test_a_tokenizer_with_all_losses_can_be_simulated():
    small = ["model.size=tiny", "model.pretrained_encoder=null", "assets.dinov2_size=s"]
    run = load_training_run(str(YAMLS / "tokenizer_b.yaml"), small, 8, None)
    for library in family_of(run).libraries(run):
        __import__(library)
    found = simulate(run, 8, 1, 64)
    assert found is not None
    sums = {t.operation for t in found.passes[0].transfers}
    assert sums == {"all-reduce"}  # the losses' means over ranks


# --- what is predicted --------------------------------------------------------------------------


def test_a_ring_moves_all_but_its_own_part():
    gpu = replace(H100, node_gbs=100.0, network_gbs=50.0, node_hop_us=1.0, network_hop_us=10.0)
    gather = Transfer("all-gather", 250_000_000, 4)
    assert collective_seconds(Moved(gather, 8), gpu) == pytest.approx(0.01 * 7 / 8 + 7e-6)
    both = Transfer("all-reduce", 250_000_000, 4)
    expected = 2 * (0.02 * 15 / 16 + 7e-6 + 10e-6)
    assert collective_seconds(Moved(both, 16), gpu) == pytest.approx(expected)
    assert collective_seconds(Moved(both, 1), gpu) == 0.0


@pytest.mark.slow
def test_a_prediction_is_the_sum_of_its_parts_and_compiling_helps():
    run = tiny()
    step = plan_step(run, networks(run).infos(), 8, StepShape(512, 64))
    assert step is not None
    flops = 1e12
    eager, compiled = (predict(step, 1, H100, form, flops) for form in (False, True))
    assert compiled.total < eager.total
    assert compiled.utilisation == pytest.approx(flops / compiled.total / 989e12)
    twice = replace(H100, memory_gbs=2 * H100.memory_gbs)
    assert predict(step, 1, twice, True, flops).others == pytest.approx(compiled.others / 2)
    assert predict(step, 3, H100, True, flops).products == pytest.approx(3 * compiled.products)


def test_shares_rise_with_the_size_of_a_product():
    for gpu in GPUS.values():
        shares = [gpu.share(10.0**power) for power in range(6, 14)]
        assert shares == sorted(shares)
        assert 0 < shares[0] < shares[-1] <= 1


@pytest.mark.parametrize(
    ("text", "size"), [("40GB", 40e9), ("40 GiB", 40 * 2**30), ("1.5tb", 1.5e12)]
)
def test_sizes_have_units(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["40", "GB", "-1GB", "0GB", "40 gigs", "4O GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="write a number above 0 and a unit"):
        parse_memory(text)


def test_a_calibration_replaces_the_table(tmp_path):
    path = tmp_path / "gpu.json"
    values = asdict(H100) | {"name": "mine", "memory_gbs": 3000.0}
    path.write_text(json.dumps({"format": 1, "gpu": values}))
    assert read_calibration(path) == replace(H100, name="mine", memory_gbs=3000.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory_gbs": -1}, "gpu.memory_gbs: -1 must be a number above 0"),
        ({"memory_gbs": True}, "gpu.memory_gbs: True must be a number above 0"),
        ({"error": 2}, "gpu.error: 2 must be above 0 and at most 1"),
        ({"efficiency": [[1e9, 0.5], [1e8, 0.6]]}, "gpu.efficiency: [["),
        ({"efficiency": []}, "must be a list of [operations, share of the peak], rising"),
        ({"name": ""}, "gpu.name: '' must be a name"),
        ({"bandwidth": 1}, "gpu.bandwidth: unknown key; known: name"),
        ({"watts": None}, "gpu.watts: missing"),
    ],
)
def test_a_calibration_that_is_wrong_is_told(tmp_path, change, said):
    path = tmp_path / "gpu.json"
    values = asdict(H100) | change
    path.write_text(
        json.dumps({"format": 1, "gpu": {k: v for k, v in values.items() if v is not None}})
    )
    with pytest.raises(ConfigError) as error:
        read_calibration(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ("[]", "is no calibration"),
        ("{}", "is no cal"),
    ],
)
def test_a_file_that_is_no_calibration_is_told(tmp_path, text, said):
    path = tmp_path / "gpu.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_calibration(path)


# --- advice, and the command line ---------------------------------------------------------------


@pytest.mark.slow
def test_advice_validates_fits_and_is_the_fastest(monkeypatch):
    monkeypatch.setattr(advice, "RATIOS", (0.0,))
    monkeypatch.setattr(advice, "STRATEGIES", advice.STRATEGIES[:3])
    run = tiny()
    memory = int(3.2 * GIB)
    text = advise(run, networks(run), 8, PlanOptions(gpus=(H100,), memory=memory))
    (paste,) = [line for line in text.splitlines() if line.startswith("paste")]
    overrides = shlex.split(paste.removeprefix("paste"))
    advised = load_training_run(str(YAMLS / "dit_xl.yaml"), [*TINY, *overrides], 8, None)
    tokens = advised.train.device_microbatch_tokens
    assert tokens is not None
    size = tokens // 64
    step = plan_step(advised, networks(advised).infos(), 8, StepShape(size, 64, 64 // size))
    assert step is not None
    assert step.peak < memory
    rows = [line for line in text.splitlines() if "images/s" in line]
    speeds = [float(line.split(", ")[-1].split()[0].replace(",", "")) for line in rows]
    assert speeds == sorted(speeds, reverse=True)
    assert rows[0].startswith("> ")


@pytest.mark.slow
def test_advice_drops_the_section_of_another_strategy():
    run = tiny("parallel.strategy=fsdp", "parallel.fsdp.shard=grad_op")
    search = Search(run, networks(run), 8, PlanOptions())
    choice = search.largest(replace(run, parallel=ParallelConfig()))
    overrides = choice.overrides(run.parallel).split()
    given = ["parallel.strategy=fsdp", "parallel.fsdp.shard=grad_op"]
    advised = load_training_run(str(YAMLS / "dit_xl.yaml"), [*TINY, *given, *overrides], 8, None)
    assert advised.parallel == replace(ParallelConfig(), activation_checkpointing=0.0)


@pytest.mark.slow
def test_where_nothing_fits_the_least_is_named(monkeypatch):
    monkeypatch.setattr(advice, "RATIOS", (0.0,))
    monkeypatch.setattr(advice, "STRATEGIES", (ParallelConfig(),))
    run = tiny()
    with pytest.raises(ConfigError, match=r"nothing fits into 1\.6 GiB .* the least is .* micro-"):
        advise(run, networks(run), 8, PlanOptions(memory=int(1.58 * GIB)))


def test_a_family_that_cannot_say_what_a_step_is_gets_a_line(monkeypatch, capsys):
    run = tiny()
    monkeypatch.setattr(type(family_of(run)), "rehearsal", lambda *_: None)
    assert print_simulation(run, 8, PlanOptions(simulate=True)) == 0
    assert "not simulated: task generator does not say what a step is" in capsys.readouterr().out


def test_a_step_that_reads_numbers_gets_a_line(monkeypatch, capsys):
    run = tiny()
    monkeypatch.setattr(LGMTrainingModel, "loss", lambda self, outputs, _: outputs.t.sum().item())
    assert print_simulation(run, 8, PlanOptions(simulate=True)) == 0
    assert "task generator has a step that shapes alone do not run (" in capsys.readouterr().out


@pytest.mark.slow
def test_hybrid_averages_the_shards_of_its_copies():
    full = sharded_step(8)
    hybrid = sharded_step(64, "parallel.fsdp.shard=hybrid", "parallel.fsdp.group_size=8")
    assert list(hybrid.moved[: len(full.moved)]) == list(full.moved)
    reduced = [m.transfer for m in full.moved if m.transfer.operation == "reduce-scatter"]
    copies = [Moved(Transfer("all-reduce", t.numel // 8, t.itemsize), 8) for t in reduced]
    assert list(hybrid.moved[len(full.moved) :]) == copies
    assert hybrid.peak == full.peak


@pytest.mark.slow
def test_grad_op_gathers_once():
    once, twice = sharded_step(8, "parallel.fsdp.shard=grad_op"), sharded_step(8)
    count = [sum(m.transfer.operation == "all-gather" for m in s.moved) for s in (once, twice)]
    assert count == [5, 9]  # four blocks and the rest, which stays gathered either way
    assert once.peak > twice.peak


@pytest.mark.slow
def test_a_dry_run_simulates_when_asked(monkeypatch, capsys):
    arguments = ["--dry-run", "--simulate", "--gpu", "h200", "--price-per-gpu-hour", "2"]
    command = ["train", str(YAMLS / "dit_xl.yaml"), *TINY, *arguments, "--world-size", "8"]
    monkeypatch.setattr(sys, "argv", command)
    assert train.main() == 0
    said = capsys.readouterr().out
    assert "peak of memory in GiB" in said
    assert "PREDICTED" in said
    assert "nothing has run on a GPU" in said
    assert "8 x H200 SXM 141 GB, 1,000,800 steps: " in said
    assert " at 2 per GPU and hour" in said
    moved = [line.split() for line in said.splitlines() if line.startswith("  all-reduce")]
    numbers = networks(tiny()).num_parameters
    assert moved == [["all-reduce", "1", f"{4 * numbers:,}", "4", "8"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--simulate"], "--simulate goes with --dry-run"),
        (["--price-per-gpu-hour", "2"], "--price-per-gpu-hour goes with --dry-run"),
        (["--dry-run", "--gpu-memory", "40GB"], "--gpu-memory goes with --advise"),
        (["--dry-run", "--advise", "--gpu-memory", "40"], "'40' is no size"),
        (["--dry-run", "--utilisation", "40"], "write 40 % as 0.4"),
        (["--dry-run", "--price-per-gpu-hour", "-1"], "must be a number above 0"),
        (["--dry-run", "--gpu", "h100", "--calibration", "x"], "drop one"),
    ],
)
def test_options_that_mean_nothing_are_refused(capsys, arguments, said):
    with pytest.raises(SystemExit) as end:
        train.parse_args(["yamls/dit_xl.yaml", *arguments])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
