"""Length knobs side by side: SiT, ELIT at three budgets, LGM at three lengths, equal training work.

    python -m eval.elastic [--seeds 0 1 2] [--jobs 2] [key=value ...]

Runs are those of yamls/experiments/elastic, under runs/elastic, on the quickstart's photographs.
Every generator is trained for the same number of floating-point operations; what that means in
steps is computed from its network and its lengths. Finished runs and sweeps are kept, so the
command continues where it stopped. The table goes between the markers of docs/elastic.md, the plot
beside it. Extra key=value go to every generator's run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

from experiments.length_control import mean_and_std, write_between_markers
from lgm_scale.checkpoint.run_folder import RunFolder
from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import ConfigError, DataError, exit_on_user_error
from lgm_scale.evaluation.sweep.results import read_results
from lgm_scale.families.elit.config import ELITRun
from lgm_scale.families.lgm.config import LGMRun

__all__ = ["equal_steps", "render"]

YAMLS = Path("yamls/experiments/elastic")
PHOTOS = Path("runs/quickstart/data/photos/val")
TRAIN_IMAGES = "runs/quickstart/data/images/train"
LENGTHS = {"sit": (64,), "elit": (16, 32, 64), "lgm": (16, 32, 64)}
NAMES = {"sit": "SiT", "elit": "ELIT", "lgm": "LGM"}
METRIC = "pixel_frechet"
BUDGET_STEPS = 600
"""Steps of the SiT, which set the budget of all."""

Row = dict[str, Any]


def training_work(name: str) -> tuple[float, int]:
    """Operations of a mean step of a generator (forward and backward), and its cycle of lengths."""
    import torch

    from lgm_scale.families.elit.network import build_elit
    from lgm_scale.families.lgm.network import build_merge_dit

    config = load_training_run(str(YAMLS / f"{name}.yaml"), [], 1, has_gpu=None)
    with torch.device("meta"):
        if isinstance(config, ELITRun):
            net = build_elit(config.model, config.space)
        else:
            assert isinstance(config, LGMRun)
            net = build_merge_dit(config.model)
    choices = config.lengths.choices
    forward = statistics.mean(net.flops(k) for k in choices)
    return 3 * config.train.global_batch_size * forward, len(choices)


def equal_steps(work: float, cycle: int, budget: float) -> int:
    """Steps that make `budget` operations, rounded to whole cycles of lengths.

    Args:
        work: Operations of a mean step.
        cycle: Steps in which every length had its turn.
        budget: Operations in all.
    """
    return max(1, round(budget / (work * cycle))) * cycle


def run(*command: str) -> None:
    """Show a command and run it. Raises: DataError if it fails."""
    print("$", " ".join(command), flush=True)
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode != 0:
        raise DataError(f"{' '.join(command)}: stopped with an error:\n{result.stderr[-3000:]}")


def prepare(out: Path) -> None:
    """Validation images at 32 pixels, the tokenizer and its latents, unless they are there."""
    if not PHOTOS.is_dir():
        raise ConfigError(
            f"{PHOTOS} is no folder: run `make quickstart` first, for its photographs"
        )
    convert = ("data_tools/images_to_mds.py", str(PHOTOS), "--out", str(out / "val"))
    run(sys.executable, *convert, "--image-size", "32")
    run("composer", "lgm_scale/train.py", str(YAMLS / "tokenizer.yaml"))
    run(
        "composer", "data_tools/encode_latents.py", "--tokenizer", str(out / "tokenizer/bundle"),
        "--images", TRAIN_IMAGES, "--out", str(out / "latents"),
    )  # fmt: skip


def train_and_measure(
    name: str, steps: int, out: Path, overrides: Sequence[str], seed: int
) -> list[Row]:
    """Rows of one generator's sweep; what is finished is kept."""
    folder = out / f"{name}-seed{seed}"
    yaml = str(YAMLS / f"{name}.yaml")
    own = [f"seed={seed}", f"run_name=elastic-{name}-seed{seed}", f"out={folder}"]
    changes = [*own, f"train.max_duration={steps}ba", *overrides]
    state = RunFolder(folder, load_training_run(yaml, changes, world_size=1, has_gpu=None))
    if not state.finished():
        run("composer", "lgm_scale/train.py", yaml, *changes)
    sweep = folder / "sweep"
    cells = f"cells=[{{num_tokens: {list(LENGTHS[name])}}}]"
    run(
        "composer", "eval/sweep.py", str(YAMLS / "sweep.yaml"), f"bundle={folder}/bundle",
        f"out={sweep}", f"images={out}/val", cells,
    )  # fmt: skip
    return read_results(sweep)["rows"]


def render(results: dict[str, list[list[Row]]], steps: dict[str, int], budget: float) -> str:
    """The table as Markdown: one line per generator and length."""
    seeds = len(next(iter(results.values())))
    images = next(iter(results.values()))[0][0]["num_images"]
    lines = [
        f"{budget / 1e12:.1f} TFLOPs of training each; {seeds} seeds; {images} samples of each; "
        "mean ± standard deviation over seeds.",
        "",
        "| generator | K | steps | GFLOPs per forward pass | GFLOPs per image | distance |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in results.items():
        for i, row in enumerate(runs[0]):
            k, work = row["cell"]["num_tokens"], row["work"]
            distance = mean_and_std([each[i]["metrics"][METRIC] for each in runs], 1)
            lines.append(
                f"| {NAMES[name]} | {k} | {steps[name]} | "
                f"{work['tflops_per_row'][str(k)] * 1e3:.3f} | "
                f"{work['tflops_per_image'] * 1e3:.2f} | {distance} |"
            )
    return "\n".join(lines)


def plot(results: dict[str, list[list[Row]]], path: Path) -> None:
    """Distance over operations per image, with the spread over seeds."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for name, runs in results.items():
        work = [row["work"]["tflops_per_image"] * 1e3 for row in runs[0]]
        values = [[each[i]["metrics"][METRIC] for each in runs] for i in range(len(work))]
        means = [statistics.mean(each) for each in values]
        spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
        axes.errorbar(work, means, spread, marker="o", capsize=3, label=NAMES[name])
        for row, x, y in zip(runs[0], work, means, strict=True):
            label = f"K = {row['cell']['num_tokens']}"
            axes.annotate(label, (x, y), xytext=(6, 6), textcoords="offset points", size=8)
    axes.set(
        xlabel="GFLOPs per image (networks and decoder)",
        ylabel="Fréchet distance, 48 components of pixels",
        xscale="log",
    )
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.xaxis.set_minor_formatter("{x:.3g}")
    axes.tick_params(which="minor", labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title("Demo scale, equal training operations; lower is better", size=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.elastic",
        description="Train and compare SiT, ELIT and LGM on the demo photographs, at equal "
        "training operations.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every generator")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--doc", default="docs/elastic.md", help="Markdown file to fill in")
    args = parser.parse_intermixed_args(argv)
    if args.jobs < 1:
        raise ConfigError(f"--jobs: {args.jobs} must be 1 or more")
    return args


def main() -> int:
    """Prepare, train, measure, write."""
    args, out = parse_args(sys.argv[1:]), Path("runs/elastic")
    prepare(out)
    work = {name: training_work(name) for name in LENGTHS}
    budget = BUDGET_STEPS * work["sit"][0]
    steps = {name: equal_steps(*each, budget) for name, each in work.items()}
    with ThreadPoolExecutor(args.jobs) as pool:  # all at once: no job waits for a family's last
        waiting = {
            name: pool.map(
                partial(train_and_measure, name, steps[name], out, args.overrides), args.seeds
            )
            for name in LENGTHS
        }
        results = {name: list(rows) for name, rows in waiting.items()}
    table = render(results, steps, budget)
    doc = Path(args.doc)
    write_between_markers(doc, table)
    plot(results, doc.with_suffix(".png"))
    print(table)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
