"""Validation images through the tokenizer at each K: PSNR, SSIM, LPIPS and rFID.

    composer eval/reconstruct.py --bundle BUNDLE --images MDS --out FOLDER [--lengths 8 16 ...]
        [--vgg16 FILE] [--inception FILE] [--reference FILE]

Writes reconstruction.json (numbers with their whole protocol) and reconstruction.png. The numbers
do not depend on how many ranks work, and the same command again goes on where it was interrupted.
LPIPS and rFID need weights that are never downloaded: without its file a metric is off. Exit
status: 0 done, 2 for anything the user must mend.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist

from lgm_scale import __version__
from lgm_scale.data.manifest import read_manifest
from lgm_scale.errors import ConfigError, MissingAssetError, exit_on_user_error
from lgm_scale.evaluation.commands.adaptive import (
    AdaptiveSaving,
    adaptive_saving,
    default_lengths,
    saving_line,
)
from lgm_scale.evaluation.engine.parts import Part, join_ranks
from lgm_scale.evaluation.engine.stages import Engine
from lgm_scale.evaluation.features.inception import WEIGHTS_URL
from lgm_scale.evaluation.features.spaces import (
    Spaces,
    ValidationImages,
    check_reference,
    network_spaces,
)
from lgm_scale.evaluation.metrics.image_metrics import PerceptualDistance
from lgm_scale.evaluation.reconstructions.plans import ReconstructionPlans
from lgm_scale.evaluation.references.files import load_reference
from lgm_scale.evaluation.report.metric_curves import metric_curves
from lgm_scale.evaluation.report.theme import LIGHT, to_png
from lgm_scale.evaluation.sweep.families import outside_lengths
from lgm_scale.evaluation.sweep.results import headline
from lgm_scale.evaluation.sweep.rules import repeated_lengths, wrong_image_size
from lgm_scale.families.lgm.bundle import TOKENIZER_NAME, load_tokenizer, read_bundle
from lgm_scale.families.lgm.data import TREE_NAME
from lgm_scale.families.tokenizer.assets import VGG16_URL
from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.merging.tree import MergeTree
from lgm_scale.storage.files import write_json, write_whole

__all__ = ["main"]

LPIPS_SIDE = 16  # VGG16 halves it four times
ASSETS = {
    "vgg16": ("LPIPS", "528 MB", VGG16_URL),
    "inception": ("rFID", "96 MB", WEIGHTS_URL),
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="composer eval/reconstruct.py",
        description="PSNR, SSIM, LPIPS and rFID of reconstructed images at each token count.",
    )
    parser.add_argument("--bundle", required=True, help="tokenizer or generator bundle")
    parser.add_argument("--images", required=True, metavar="MDS", help="from images_to_mds.py")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for the JSON and picture")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="K", help="default: N, N/2, ... to the least"
    )
    parser.add_argument("--vgg16", metavar="FILE", help=f"for LPIPS, from {VGG16_URL}")
    parser.add_argument("--inception", metavar="FILE", help=f"for rFID, from {WEIGHTS_URL}")
    parser.add_argument(
        "--reference", metavar="FILE", help="also: rFID against these statistics, such as ADM's"
    )
    parser.add_argument(
        "--target-psnr",
        type=float,
        nargs="+",
        default=[],
        metavar="DB",
        help="also: the mean K saved by giving each image the smallest K that reaches this",
    )
    parser.add_argument("--batch-size", type=int, default=50, help="images per step and rank")
    parser.add_argument("--chunk-size", type=int, default=250, help="images per file of work")
    return parser.parse_args(argv)


def refuse_missing(args: argparse.Namespace) -> None:
    """Raise MissingAssetError if a path that was given is no file."""
    wrong = [
        f"--{key}: {getattr(args, key)} is not a file; {use} needs it (about {size}, from {url}), "
        f"or leave --{key} out"
        for key, (use, size, url) in ASSETS.items()
        if getattr(args, key) is not None and not Path(getattr(args, key)).is_file()
    ]
    if wrong:
        raise MissingAssetError("\n".join(wrong))


def refuse_problems(args: argparse.Namespace, net: Tokenizer, least: int) -> None:
    """Raise ConfigError with everything that is wrong with the command line."""
    image_size = net.image_size
    manifest = read_manifest(args.images, "images")
    outside = outside_lengths(args.lengths or (), least, net.num_base_tokens)
    problems = [f"--lengths: {text}" for text in outside]
    problems += [f"--lengths: {text}" for text in repeated_lengths(args.lengths or ())]
    problems += [f"--{text}" for text in wrong_image_size(args.images, manifest, image_size)]
    problems += [f"--{text}" for text in _other_problems(args, manifest.num_samples, image_size)]
    if problems:
        raise ConfigError(problems)


def _other_problems(args: argparse.Namespace, count: int, image_size: int) -> Iterator[str]:
    for key in ("batch_size", "chunk_size"):
        if getattr(args, key) < 1:
            yield f"{key.replace('_', '-')}: {getattr(args, key)} must be 1 or more"
    if args.inception is not None and count < 2:
        yield f"images: {args.images} holds {count} image; rFID needs 2 or more"
    if args.vgg16 is not None and image_size < LPIPS_SIDE:
        yield f"vgg16: LPIPS needs {LPIPS_SIDE} pixels per side, the bundle makes {image_size}"


def output_folder(out: str) -> Path:
    """Make the folder of results now, not after the work. Raises: ConfigError."""
    path = Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: {out} cannot be a folder ({error.strerror}); choose another"
        ) from error
    return path


def main() -> int:
    """Check, load, reconstruct at each K, write."""
    args = parse_args(sys.argv[1:])
    refuse_missing(args)
    tokenizer = load_tokenizer(args.bundle)
    files = read_bundle(args.bundle, "tokenizer")["files"]
    has_tree = TREE_NAME in files  # truncation and per-image merging have none
    tree = MergeTree.load(Path(args.bundle) / TREE_NAME) if has_tree else None
    refuse_problems(args, tokenizer, tree.num_blocks if tree else tokenizer.merging.min_tokens)
    out = output_folder(args.out)
    device, start = join_ranks(), time.perf_counter()
    images = ValidationImages.open(args.images, tokenizer.image_size)
    spaces = Spaces(network_spaces(args.inception, None, device), images)
    reference = load_reference(args.reference) if args.reference else None
    check_reference(reference, spaces, tokenizer.image_size)
    lengths = set(args.lengths or default_lengths(tokenizer))
    if args.target_psnr:  # an image that never reaches the target keeps all its tokens
        lengths.add(tokenizer.num_base_tokens)
    plans = ReconstructionPlans(
        tokenizer=tokenizer.to(device),
        tree=tree,
        files={name: files[name] for name in (TOKENIZER_NAME, TREE_NAME) if name in files},
        images=images,
        device=device,
        spaces=spaces,
        perceptual=PerceptualDistance(args.vgg16, device) if args.vgg16 else None,
        reference=reference,
        chunk_size=args.chunk_size,
        batch_size=args.batch_size,
        metrics=("fid",),
    )
    rows, savings = measure(plans, Engine(out, device), sorted(lengths), args.target_psnr)
    if dist.get_global_rank() == 0:
        run = {"ranks": dist.get_world_size(), "seconds": time.perf_counter() - start}
        write_results(out, plans, rows, savings, run)
    dist.barrier()
    return 0


def measure(
    plans: ReconstructionPlans, engine: Engine, lengths: list[int], targets: list[float]
) -> tuple[list[dict[str, Any]], list[AdaptiveSaving]]:
    """Rows at each K, and what choosing K per image saves at each target."""
    engine.make_chunks(plans.jobs(lengths), Part(), "reconstruct", may_work=True)
    plans.reduce(engine)
    row_plans = plans.plans(lengths)
    engine.make_sums([(plan.job, plan.sums) for plan in engine.open_plans(row_plans)])
    rows = engine.make_rows(row_plans)
    savings: list[AdaptiveSaving] = []
    if targets:
        table = np.stack([plans.psnr(k, engine) for k in lengths], axis=1)  # [M, L]
        savings = [adaptive_saving(table, lengths, target) for target in targets]
    if engine.first:
        for line in plans.off.values():
            print(line)
        for plan, row in zip(row_plans, rows, strict=True):
            print(f"{plan.title}   {headline(row)}")
        for saving in savings:
            print(saving_line(saving))
    engine.clean(row_plans, keep_features=True)
    return rows, savings


def write_results(
    out: Path,
    plans: ReconstructionPlans,
    rows: list[dict[str, Any]],
    savings: list[AdaptiveSaving],
    run: dict[str, Any],
) -> None:
    """reconstruction.json and reconstruction.png."""
    results = {
        "format": "lgm_scale.reconstruction",
        "version": 2,
        "versions": {"lgm_scale": __version__, "torch": torch.__version__},
        "off": plans.off,
        "rows": rows,
        "adaptive": [asdict(saving) for saving in savings],
        "run": run,
    }
    write_json(out / "reconstruction.json", results)
    flat = [{"num_tokens": row["num_tokens"], **row["metrics"]} for row in rows]
    title = f"Reconstructions of {rows[0]['num_images']} validation images"
    write_whole(
        out / "reconstruction.png",
        to_png(metric_curves(flat, rows[0]["names"], title, LIGHT), LIGHT),
    )
    print(f"results: {out / 'reconstruction.json'}, {out / 'reconstruction.png'}")


if __name__ == "__main__":
    exit_on_user_error(main)
