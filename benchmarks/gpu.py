"""Training and sampling of B and XL on one GPU, and the calibration file of that GPU.

    python -m benchmarks.gpu --out runs/gpu
    python -m benchmarks.gpu --reference other_models.py:build_xl
    python -m benchmarks.gpu --device cpu --tiny      # seconds; its numbers mean nothing

Images/s and utilisation (the network's own count of operations over the peak), eager and
compiled, of training steps and of whole samplings of 25 guided Euler steps, latents not decoded. A
cell is one network, form, mode and K. Cells run by importance: training before sampling, compiled
before reference before eager, the largest size first; then what is to be chosen by measurement:
compiled with another form of attention (`train.attention`) or with 8-bit floats, and samplings of
few images: as they are, replayed as CUDA graphs, and with matrices that autocast casts at every
call. One that would probably exceed the budget is dropped, and said so (`--forms` picks some); one
that needs too much memory is noted, and the next one runs.

Written after every cell: OUT/gpu.json. Before the cells: OUT/calibration.json, for
`lgm_scale/train.py ... --dry-run --simulate --calibration` (docs/planning.md).

A reference is FILE.py:CALLABLE or MODULE:CALLABLE, as for `benchmarks.generator`; it is compared
with the largest size. If it has `flops(K)`, as our networks, its utilisation is told as well.

Nothing of this has ever run on CUDA.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.version
from torch import nn

from benchmarks import calibration
from benchmarks.generator import NUM_BASE_TOKENS, build_network, halving_tree, load_reference
from benchmarks.gpu_steps import SAMPLER, TrainStep, called_again, sample_batch, seconds_of
from benchmarks.harness import print_table
from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.families.lgm.config import DIT_SIZES
from lgm_scale.layers import ATTENTION_FORMS, cast_matrices, choose_attention
from lgm_scale.parallel.blocks import compile_blocks, transformer_blocks
from lgm_scale.parallel.float8 import float8_problem, use_float8
from lgm_scale.planning.hardware import GPU, GPUS
from lgm_scale.sampling.replay import ReplayedVelocity, record_graph

TREE = halving_tree(NUM_BASE_TOKENS)
FIRST_CELL = 45.0
"""Seconds that a cell is taken to need while none of its kind has run."""
TRAIN_PASSES = 3
"""A backward pass costs two forward ones."""


@dataclass(frozen=True)
class Group:
    """Cells of one network."""

    mode: str
    form: str
    size: str


MAIN_FORMS = ("compiled", "reference", "eager")
CHOICES = (
    ("train", "flex"),
    ("sample", "few"),
    ("sample", "few-graphs"),
    ("sample", "few-uncast"),
    ("train", "float8"),
    ("train", "mask"),
)
"""What is compared with the main forms and each other, to be made the default or not."""
FEW = 4
"""Images of a sampling whose time is the host's, not the GPU's."""
FORMS = (*MAIN_FORMS, *(form for _, form in CHOICES))


def groups(sizes: Sequence[str], with_reference: bool, forms: Sequence[str]) -> Iterator[Group]:
    """All groups of these forms, the most important first."""
    for mode, form in (*itertools.product(("train", "sample"), MAIN_FORMS), *CHOICES):
        if form == "reference" and with_reference:
            yield Group(mode, form, sizes[0])
        elif form != "reference" and form in forms:
            yield from (Group(mode, form, size) for size in sizes)


class Benchmark:
    """What is measured, within a budget, and written down cell by cell."""

    def __init__(self, args: argparse.Namespace, peak: float | None) -> None:
        self.args, self.peak = args, peak
        self.started = time.monotonic()
        self.longest: dict[tuple[str, str], float] = {}
        self.cells: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.args.budget - (time.monotonic() - self.started)

    def run(self, group: Group) -> None:
        """All cells of a group, at every K."""
        net = make = None
        for num_tokens in self.args.num_tokens:
            size = max(1, self.args.tokens // num_tokens)
            if group.form.startswith("few"):
                size = FEW
            cell = {
                "mode": group.mode, "network": group.form, "size": group.size,
                "num_tokens": num_tokens, "batch": size,
            }  # fmt: skip
            absent = self._absent(group.form)
            if absent is not None:
                self._note(cell, "dropped", absent)
                continue
            need = self.longest.get((group.mode, group.form), FIRST_CELL)
            if need > self.left:
                why = (
                    f"needs some {need:.0f} s, and {max(self.left, 0):.0f} s of the budget are left"
                )
                self._note(cell, "dropped", why)
                continue
            start = time.monotonic()
            try:
                if net is None:
                    net = self._network(group)
                    make = self._step_maker(group, net)
                assert make is not None
                self._note(
                    cell | self._measure(group, net, make(num_tokens, size), cell), "measured"
                )
            except torch.OutOfMemoryError as error:
                if net is not None:
                    net.zero_grad()
                self._note(cell, "out of memory", str(error).split(". ")[0])
            except RuntimeError as error:  # a compiler's, or a kernel's; the next one may run
                self._note(cell, "failed", f"{type(error).__name__}: {error}"[:500])
            self._free()
            took = time.monotonic() - start
            key = group.mode, group.form
            self.longest[key] = max(self.longest.get(key, 0.0), took)
            self.cells[-1]["took_s"] = round(took, 2)
            self.save()
        del net, make
        torch.compiler.reset()  # its graphs hold the network's shapes, and count against its limit
        self._free()

    def _absent(self, form: str) -> str | None:
        """Why a form cannot be measured here; None if it can."""
        if form == "flex" and self.args.device.type == "cpu":
            return "torch 2.11 refuses the backward pass of FlexAttention on a CPU"
        return float8_problem(self.args.device) if form == "float8" else None

    def _network(self, group: Group) -> nn.Module:
        device = self.args.device
        if group.form == "reference":
            return load_reference(self.args.reference, device)
        with device:
            net = build_network(group.size)
        if group.mode == "sample" and group.form != "few-uncast":
            cast_matrices(net, torch.bfloat16)  # as a pipeline does
        attends = group.form in ATTENTION_FORMS
        choose_attention(net, group.form if attends else "auto")
        if group.form == "float8":
            use_float8(transformer_blocks(net))
        if group.form in ("compiled", "float8") or attends:
            backend = "eager" if self.args.tiny else "inductor"
            compile_blocks(net, self.args.num_tokens, backend=backend)
        return net

    def _step_maker(self, group: Group, net: nn.Module) -> Callable[[int, int], Callable[[], Any]]:
        """What makes the step of K and a batch size."""
        if group.mode == "sample":
            velocity: Any = net
            if group.form == "few-graphs":
                on_gpu = self.args.device.type == "cuda"
                velocity = ReplayedVelocity(net, record_graph if on_gpu else called_again)
            return lambda k, size: partial(sample_batch, velocity, TREE, k, size, self.args.device)
        train = TrainStep(net, TREE, self.args.device)
        return lambda k, size: partial(train, *train.batch(k, size))

    def _measure(
        self, group: Group, net: Any, step: Callable[[], Any], cell: dict[str, Any]
    ) -> dict[str, Any]:
        device, training = self.args.device, group.mode == "train"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = seconds_of(step, device, self.args.repeats, self.args.cell_seconds)
        median, size = statistics.median(times), cell["batch"]
        low, _, high = statistics.quantiles(times, n=4)
        found = {"runs": len(times), "median_s": median, "quartiles_s": [low, high]}
        found["images_per_s"] = size / median
        if hasattr(net, "flops"):
            rows = (
                {cell["num_tokens"]: TRAIN_PASSES} if training else SAMPLER.rows(cell["num_tokens"])
            )
            flops = size * sum(count * net.flops(k) for k, count in rows.items())
            found["tflops"] = flops / median / 1e12
            found["utilisation"] = None if self.peak is None else found["tflops"] / self.peak
        if device.type == "cuda":
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return found

    def _note(self, cell: dict[str, Any], status: str, why: str = "") -> None:
        self.cells.append({**cell, "status": status, **({"why": why} if why else {})})
        names = [str(cell[key]) for key in ("mode", "network", "size")]
        speed = f"{cell['images_per_s']:,.1f} images/s" if status == "measured" else status
        print(
            f"{' '.join(names)} K = {cell['num_tokens']}: {speed}; {self.left:.0f} s left",
            flush=True,
        )

    def _free(self) -> None:
        gc.collect()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()

    def save(self) -> None:
        """Write what is known so far."""
        args = self.args
        content = {
            "machine": machine(args.device),
            "warning": "tiny: the numbers mean nothing" if args.tiny else None,
            "settings": {
                "precision": "bfloat16 autocast, float32 weights",
                "tokens_per_step": args.tokens,
                "sampler": SAMPLER.settings(),
                "reference": args.reference,
                "budget_s": args.budget,
                "peak_tflops": self.peak,
            },
            "cells": self.cells,
        }
        (args.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def machine(device: torch.device) -> dict[str, Any]:
    """Device and versions."""
    found: dict[str, Any] = {"device": str(device), "name": platform.processor() or "CPU"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"name": properties.name, "memory_gib": properties.total_memory / 2**30}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found | {"python": platform.python_version(), "torch": torch.__version__}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu"), help="folder (default: runs/gpu)")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--tiny", action="store_true", help="a tiny network, to see that it runs")
    add("--sizes", nargs="+", choices=list(DIT_SIZES), help="default: xl b")
    add("--num-tokens", nargs="+", type=int, help="every K (default: 32 64 128 256)")
    add("--tokens", type=int, help="tokens of a step: K times images (default: 16384)")
    add("--repeats", type=int, default=10, help="timed runs of a cell, at most (default: 10)")
    add("--cell-seconds", type=float, help="of timing, 3 runs at least (default: 6)")
    add("--budget", type=float, default=480.0, help="seconds for all cells (default: 480)")
    add("--peak-tflops", type=float, help="of dense bfloat16 (default: H100, H200, A100 are known)")
    add("--forms", nargs="+", choices=FORMS, default=FORMS, help="default: all")
    add("--reference", metavar="WHERE:CALLABLE", help="another network")
    args = parser.parse_args(argv)
    args.sizes = args.sizes or (["tiny"] if args.tiny else ["xl", "b"])
    args.sizes.sort(key=list(DIT_SIZES).index, reverse=True)
    args.num_tokens = args.num_tokens or ([16, 64] if args.tiny else [32, 64, 128, 256])
    args.tokens = args.tokens or (64 if args.tiny else 16384)
    args.cell_seconds = args.cell_seconds or (0.01 if args.tiny else 6.0)
    for name in ("tokens", "repeats", "cell_seconds", "budget", "peak_tflops"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: {value} must be above 0")
    for num_tokens in args.num_tokens:
        TREE.assignment(num_tokens)  # told now, if it is outside the tree
    if args.device == "cpu" and not args.tiny:
        parser.error("--device: cpu goes with --tiny; use python -m benchmarks.generator on a CPU")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: no CUDA device is visible; --device cpu --tiny runs anywhere")
    args.device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    return args


def base_gpu(args: argparse.Namespace) -> tuple[GPU, float | None]:
    """The table's figures for what cannot be measured here, and the peak, None if unknown."""
    name = "a CPU: these numbers mean nothing"
    if args.device.type == "cuda":
        name = torch.cuda.get_device_name(args.device)
    known = calibration.table_entry(name)
    base = known or GPUS["h100"]
    peak = args.peak_tflops or (known.half_tflops if known else None)
    return replace(base, name=name, half_tflops=peak or base.half_tflops), peak


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate, measure, write; status 1 if a cell failed."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.reference:
        load_reference(args.reference, args.device)  # one that does not fit is told at once
    base, peak = base_gpu(args)
    benchmark = Benchmark(args, peak)
    if peak is None and not args.tiny:
        print(f"{base.name}: peak unknown; no utilisation and no calibration without --peak-tflops")
    else:
        gpu = calibration.measure(args.device, base, args.tiny)
        table = calibration.table_entry(base.name) or GPUS["h100"]
        calibration.write(args.out / "calibration.json", gpu, table, machine(args.device))
        print(f"{args.out / 'calibration.json'}; {benchmark.left:.0f} s left", flush=True)
    for group in groups(args.sizes, args.reference is not None, args.forms):
        benchmark.run(group)
    benchmark.save()
    report(benchmark)
    return 1 if any(cell["status"] == "failed" for cell in benchmark.cells) else 0


def report(benchmark: Benchmark) -> None:
    """A table of what was measured, and a line for everything else."""
    if benchmark.args.tiny:
        print("\ntiny: the numbers mean nothing")
    measured = [cell for cell in benchmark.cells if cell["status"] == "measured"]
    rows = []
    for cell in measured:
        used = cell.get("utilisation")
        spread = (cell["quartiles_s"][1] - cell["quartiles_s"][0]) / cell["median_s"]
        texts = [cell[key] for key in ("mode", "network", "size", "num_tokens", "batch")]
        rows.append((*texts, cell["images_per_s"], spread, "-" if used is None else f"{used:.1%}"))
    names = ("step", "network", "size", "K", "images")
    heads = {
        **dict.fromkeys(names, ""),
        "images/s": ",.1f",
        "quartiles apart": ".1%",
        "of peak": "",
    }
    print()
    print_table(heads, rows)
    for cell in benchmark.cells:
        if cell["status"] != "measured":
            what = " ".join(str(cell[key]) for key in ("mode", "network", "size"))
            print(f"{cell['status']}: {what} K = {cell['num_tokens']}: {cell.get('why', '')}")


if __name__ == "__main__":
    exit_on_user_error(main)
