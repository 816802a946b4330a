"""The length controls side by side: train each with several seeds, measure, write the table.

    python -m eval.length_control [--seeds 0 1 2] [key=value ...]

Runs are those of yamls/experiments/length_control, under runs/length_control; finished runs and
measurements are kept, so the command continues where it stopped. The table goes between the
markers of docs/length_control.md, the plot beside it. Extra key=value go to every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from lgm_scale.checkpoint.run_folder import RunFolder
from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import DataError, exit_on_user_error

__all__ = ["mean_and_std", "measure_run", "write_between_markers"]

CONTROLS = ("lgm", "fixed", "tome", "truncate")
LENGTHS = (8, 16, 32, 48, 64)
YAMLS = Path("yamls/experiments/length_control")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

Row = dict[str, Any]


def train(control: str, seed: int, out: Path, overrides: Sequence[str]) -> Path:
    """Train one control, unless that is done; return its bundle. Raises: DataError on failure."""
    folder = out / f"{control}-seed{seed}"
    own = [f"seed={seed}", f"run_name=length-control-{control}-seed{seed}", f"out={folder}"]
    yaml, changes = str(YAMLS / f"{control}.yaml"), [*own, *overrides]
    run = RunFolder(folder, load_training_run(yaml, changes, world_size=1, has_gpu=None))
    if not run.finished():
        command = ["composer", "lgm_scale/train.py", yaml, *changes]
        print("$", " ".join(command), flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            raise DataError(f"{folder}: training stopped with an error, see above")
    return run.bundle


def measure_run(bundle: Path, images: str, lengths: Sequence[int]) -> Row:
    """PSNR per K, CKNNA and merged-pair cosine of one run; kept in measured.json beside it."""
    import torch

    from lgm_scale.evaluation.reconstructions.adaptive import psnr_table
    from lgm_scale.evaluation.reconstructions.alignment import measure_alignment
    from lgm_scale.families.tokenizer.bundle import load_tokenizer, tokenizer_id

    path = bundle.parent / "measured.json"
    key = {"tokenizer_id": tokenizer_id(bundle), "images": images, "lengths": list(lengths)}
    if path.is_file():
        kept = json.loads(path.read_text())
        if all(kept.get(name) == value for name, value in key.items()):
            return kept
    tokenizer = load_tokenizer(bundle, "cuda" if torch.cuda.is_available() else "cpu")
    table = psnr_table(tokenizer, images, lengths)
    psnr = {str(k): float(value) for k, value in zip(lengths, table.mean(0), strict=True)}
    row = measure_alignment(tokenizer, images, lengths) | key | {"psnr": psnr}
    path.write_text(json.dumps(row, indent=1) + "\n")
    return row


def mean_and_std(values: Sequence[float | None], digits: int) -> str:
    """`22.17 ± 0.05`, the sample standard deviation over seeds; "-" where nothing is defined."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.mean(known):.{digits}f}"
    return f"{text} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else text


def _column(rows: list[Row], read: Callable[[Row], float | None], digits: int) -> str:
    return mean_and_std([read(row) for row in rows], digits)


def render(results: dict[str, list[Row]], steps: str) -> str:
    """The two tables as Markdown."""
    first = next(iter(results.values()))
    lengths, images = [str(k) for k in first[0]["lengths"]], first[0]["num_images"]
    merged = lengths[:-1]  # at N nothing is merged
    lines = [
        f"Demo scale: {steps} steps, {len(first)} seeds per control, {images} validation images; "
        "mean ± standard deviation over seeds.",
        "",
        f"| length control | {' | '.join(f'PSNR, K = {k}' for k in lengths)} | CKNNA |",
        f"| --- |{' --- |' * (len(lengths) + 1)}",
    ]
    for control, rows in results.items():
        cells = [_column(rows, lambda row, k=k: row["psnr"][k], 2) for k in lengths]
        cells.append(_column(rows, lambda row: row["cknna_mean"], 3))
        lines.append(f"| {control} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| cosine of token pairs | {' | '.join(f'merged at {k}' for k in merged)} | all in a "
        "block | all |",
        f"| --- |{' --- |' * (len(merged) + 2)}",
    ]
    for control, rows in results.items():
        cells = [_column(rows, lambda row, k=k: row["cosine_merged"][k], 3) for k in merged]
        cells += [
            _column(rows, lambda row, name=name: row[name], 3)
            for name in ("cosine_in_block", "cosine_all")
        ]
        lines.append(f"| {control} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the markers of a Markdown file; without them, append both."""
    old = path.read_text(encoding="utf-8") if path.is_file() else "# Length controls compared\n"
    if BEGIN not in old or END not in old:
        old = f"{old.rstrip()}\n\n{BEGIN}\n{END}\n"
    head, rest = old.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def plot(results: dict[str, list[Row]], path: Path) -> None:
    """PSNR over K, and CKNNA between each K and N, with the spread over seeds."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for control, rows in results.items():
        lengths = rows[0]["lengths"]
        psnr = [[row["psnr"][str(k)] for row in rows] for k in lengths]
        to_full = [[row["cknna"][i][-1] for row in rows] for i in range(len(lengths) - 1)]
        for axes, places, values in ((left, lengths, psnr), (right, lengths[:-1], to_full)):
            means = [statistics.mean(each) for each in values]
            spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
            axes.errorbar(places, means, spread, marker="o", capsize=3, label=control)
    for axes, label in ((left, "PSNR, dB"), (right, "CKNNA to full length")):
        axes.set(xlabel="K", ylabel=label, xscale="log")
        axes.set_xticks(LENGTHS, [str(k) for k in LENGTHS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    right.legend(loc="lower right")
    figure.suptitle("Length controls at demo scale", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.length_control",
        description="Train and compare the length controls on the demo photographs.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/length_control", help="folder of the runs")
    parser.add_argument(
        "--images", default="runs/quickstart/data/images/val", metavar="MDS", help="to measure on"
    )
    parser.add_argument("--doc", default="docs/length_control.md", help="Markdown file to fill in")
    return parser.parse_intermixed_args(argv)


def main() -> int:
    """Train, measure, write."""
    args = parse_args(sys.argv[1:])
    results: dict[str, list[Row]] = {control: [] for control in CONTROLS}
    for seed in args.seeds:
        for control in CONTROLS:
            bundle = train(control, seed, Path(args.out), args.overrides)
            results[control].append(measure_run(bundle, args.images, LENGTHS))
    info = json.loads(
        (Path(args.out) / f"{CONTROLS[0]}-seed{args.seeds[0]}/config.json").read_text()
    )
    table = render(results, info["train"]["max_duration"].removesuffix("ba"))
    doc = Path(args.doc)
    write_between_markers(doc, table)
    plot(results, doc.with_suffix(".png"))
    print(table)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
