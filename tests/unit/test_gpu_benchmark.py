"""The benchmark for a GPU, on a CPU: it runs, drops, notes what does not fit, and writes all."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import calibration, gpu, gpu_steps
from benchmarks.generator import halving_tree, load_reference
from lgm_scale.errors import ConfigError
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.planning.hardware import GPUS, read_calibration
from lgm_scale.sampling.config import SamplerConfig

CPU = torch.device("cpu")
REFERENCE = """
from lgm_scale.families.lgm.network import MergeDiT

def build():
    return MergeDiT.from_size("tiny", 32, 256, 1000)

def narrow():
    return MergeDiT.from_size("tiny", 16, 256, 1000)

number = 3
"""


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "others.py"
    path.write_text(REFERENCE)
    return path


def run(folder, *words: str) -> tuple[int, list[dict], dict]:
    """Exit status, cells, and everything that was written."""
    status = gpu.main(["--device", "cpu", "--tiny", "--out", str(folder), *words])
    content = json.loads((folder / "gpu.json").read_text())
    return status, content["cells"], content


@pytest.mark.slow
def test_every_cell_runs_and_is_written_down(tmp_path, reference, capsys, monkeypatch):
    monkeypatch.setattr(gpu_steps, "SAMPLER", SamplerConfig(num_steps=3, cfg_scale=2.0))
    words = ("--num-tokens", "16", "--tokens", "32", "--peak-tflops", "1000")
    status, cells, content = run(tmp_path, *words, "--reference", f"{reference}:build")
    assert status == 0
    assert [(cell["mode"], cell["network"]) for cell in cells] == [
        ("train", "compiled"), ("train", "reference"), ("train", "eager"),
        ("sample", "compiled"), ("sample", "reference"), ("sample", "eager"),
        ("train", "flex"), ("sample", "few"), ("sample", "few-graphs"), ("sample", "few-uncast"),
        ("train", "float8"), ("train", "mask"),
    ]  # fmt: skip
    absent = {cell["network"]: cell["why"] for cell in cells if cell["status"] == "dropped"}
    assert list(absent) == ["flex", "float8"]
    assert "torchao" in absent["float8"] or "cpu does not compute" in absent["float8"]
    for cell in cells:
        if cell["network"] in absent:
            continue
        assert cell["status"] == "measured"
        few = cell["network"].startswith("few")
        assert cell["batch"] == (gpu.FEW if few else 2)
        assert cell["images_per_s"] == pytest.approx(cell["batch"] / cell["median_s"])
        assert cell["utilisation"] == pytest.approx(cell["tflops"] / 1000)
    assert "mean nothing" in content["warning"]
    assert "mean nothing" in capsys.readouterr().out
    found = read_calibration(tmp_path / "calibration.json")
    assert found.half_tflops == 1000
    assert found.watts == GPUS["h100"].watts
    about = json.loads((tmp_path / "calibration.json").read_text())
    assert {"watts", "node_gbs"} <= set(about["assumed"]["fields"])
    assert not set(about["assumed"]["fields"]) & set(about["measured"])


@pytest.fixture
def quick(monkeypatch):
    """Nothing is timed: every cell takes a second."""
    monkeypatch.setattr(gpu, "seconds_of", lambda step, *_: [step() or 0.5, 1.0, 2.0])
    monkeypatch.setattr(calibration, "measure", lambda device, base, tiny: base)
    monkeypatch.setattr(gpu_steps.TrainStep, "__call__", lambda self, *batch: None)
    monkeypatch.setattr(gpu, "sample_batch", lambda *_: None)


def test_operations_are_those_of_the_network(quick, tmp_path):
    words = ("--num-tokens", "32", "--tokens", "64", "--forms", "eager")
    _, cells, _ = run(tmp_path, *words)
    flops = MergeDiT.from_size("tiny", 32, 256, 1000).flops(32)
    rows = gpu.SAMPLER.rows(32)[32]
    assert 25 < rows < 50, "25 steps, some of them guided"
    by_mode = {cell["mode"]: cell for cell in cells}
    assert by_mode["train"]["tflops"] == pytest.approx(2 * 3 * flops / 1e12)
    assert by_mode["sample"]["tflops"] == pytest.approx(2 * rows * flops / 1e12)
    assert by_mode["train"]["utilisation"] is None, "the peak of a CPU is not known"


@pytest.mark.slow
def test_what_the_budget_does_not_hold_is_dropped_and_told(quick, tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: float(next(clock)))
    _, cells, _ = run(tmp_path, "--budget", "90")
    done = [cell["status"] for cell in cells]
    assert set(done) == {"measured", "dropped"}
    assert done == sorted(done, reverse=True), "the least important ones, which come last"
    assert "of the budget are left" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cell_that_fails_does_not_end_the_others(quick, tmp_path, monkeypatch):
    def step(self, z, labels, ids, assignment) -> None:
        if assignment.num_tokens == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        raise RuntimeError("a kernel")

    monkeypatch.setattr(gpu_steps.TrainStep, "__call__", step)
    status, cells, _ = run(tmp_path, "--forms", "compiled", "eager")
    found = {(cell["mode"], cell["num_tokens"]): cell["status"] for cell in cells}
    assert status == 1
    assert found == {
        ("train", 16): "out of memory", ("train", 64): "failed",
        ("sample", 16): "measured", ("sample", 64): "measured",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("{}:narrow", "does not fit"),
        ("{}:number", "no callable 'number'"),
        ("{}", "write FILE.py:CALLABLE or MODULE:CALLABLE"),
        ("nowhere.py:build", "cannot be imported"),
        ("no_such_module:build", "PYTHONPATH"),
        ("builtins:dict", "does not fit"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(reference, name, text):
    with pytest.raises(ConfigError, match=text):
        load_reference(name.format(reference), CPU)


def test_a_reference_may_be_a_module(reference, monkeypatch):
    monkeypatch.syspath_prepend(str(reference.parent))
    assert load_reference("others:build", CPU).num_classes == 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_runs_anywhere(capsys):
    with pytest.raises(ConfigError, match="--device cpu --tiny runs anywhere"):
        gpu.main([])
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "goes with --tiny" in capsys.readouterr().err


def test_a_peak_below_what_was_reached_is_refused():
    base = calibration.replace(GPUS["h100"], half_tflops=1e-9)
    with pytest.raises(ConfigError, match="--peak-tflops"):
        calibration.measure(CPU, base, tiny=True)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L4", None),
    ],
)
def test_known_gpus_are_found_by_their_name(name, key):
    assert calibration.table_entry(name) == (key and GPUS[key])


def test_the_tree_of_benchmarks_is_one():
    cut = halving_tree(64).assignment(16)
    assert cut.sizes.tolist() == [4] * 16


def test_times_on_a_gpu_are_those_of_its_events(monkeypatch):
    """With stand-ins for CUDA's events and clock: a millisecond for each call."""

    class Event:
        calls = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = Event.calls

        def elapsed_time(self, other: Event) -> float:
            return float(other.at - self.at)

    def step() -> None:
        Event.calls += 1

    waits = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    times = gpu_steps.seconds_of(step, torch.device("cuda", 0), repeats=5, limit=60.0)
    assert times == [1e-3] * 5
    assert Event.calls == 7, "two that do not count"
    assert len(waits) == 3, "none between the timed ones"
