"""Validation images through the tokenizer at each K: PSNR, SSIM, LPIPS and rFID.

    python -m lgm_scale.evaluation.commands.reconstruct --bundle BUNDLE --images MDS --out FOLDER
        [--lengths 8 16 ...] [--vgg16 FILE] [--inception FILE] [--fashion-mnist] [--reference FILE]
    composer -n 8 -m lgm_scale.evaluation.commands.reconstruct --bundle BUNDLE ...

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
from typing import TYPE_CHECKING, Any

from lgm_scale import __version__
from lgm_scale.bundle import bundle_folder, read_info
from lgm_scale.data.fashion_mnist import CLASSES, IMAGE_SIZE
from lgm_scale.data.manifest import read_manifest
from lgm_scale.errors import ConfigError, MissingAssetError, exit_on_user_error
from lgm_scale.evaluation.commands.arguments import (
    add_chunk_options,
    add_tokenizer_options,
    command_parser,
    not_positive,
)
from lgm_scale.evaluation.features.files import weights_of
from lgm_scale.evaluation.sweep.rules import repeated_lengths, wrong_image_size
from lgm_scale.published import PUBLISHED
from lgm_scale.sampling.config import outside_lengths
from lgm_scale.start import heavy_imports
from lgm_scale.storage.files import write_json, write_whole

if TYPE_CHECKING:
    from lgm_scale.evaluation.engine.stages import Engine
    from lgm_scale.evaluation.reconstructions.adaptive import AdaptiveSaving
    from lgm_scale.evaluation.reconstructions.plans import ReconstructionPlans
    from lgm_scale.protocols import ImageTokenizer

LPIPS_SIDE = 16  # VGG16 halves it four times


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = command_parser(
        "reconstruct", "PSNR, SSIM, LPIPS and rFID of reconstructed images at each token count."
    )
    add_tokenizer_options(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for the JSON and picture")
    parser.add_argument("--vgg16", metavar="FILE", help=f"for LPIPS: {PUBLISHED['vgg16'].path}")
    parser.add_argument(
        "--inception", metavar="FILE", help=f"for rFID: {PUBLISHED['inception'].path}"
    )
    parser.add_argument(
        "--fashion-mnist", action="store_true",
        help="also: class accuracy and distance by this package's classifier of Fashion-MNIST",
    )  # fmt: skip
    parser.add_argument(
        "--reference", metavar="FILE", help="also: rFID against these statistics, such as ADM's"
    )
    parser.add_argument(
        "--target-psnr", type=float, nargs="+", default=[], metavar="DB",
        help="also: the mean K saved by giving each image the smallest K that reaches this",
    )  # fmt: skip
    add_chunk_options(parser)
    return parser.parse_args(argv)


def refuse_missing(args: argparse.Namespace) -> None:
    """Raise MissingAssetError if a file of weights that was given is not there."""
    wrong = [
        f"--{asset.missing_line}, or leave --{asset.key} out"
        for asset in weights_of(vars(args))
        if not asset.present
    ]
    if wrong:
        raise MissingAssetError("\n".join(wrong))


def problems_of(args: argparse.Namespace, tokenizer: ImageTokenizer, least: int) -> Iterator[str]:
    """Everything that is wrong with the command line; `least` is the smallest K there is."""
    lengths, side = args.lengths or (), tokenizer.image_size
    manifest = read_manifest(args.images, "images")
    for text in (
        *outside_lengths(lengths, least, tokenizer.num_base_tokens),
        *repeated_lengths(lengths),
    ):
        yield f"--lengths: {text}"
    yield from (f"--{text}" for text in wrong_image_size(args.images, manifest, side))
    yield from not_positive(args, "batch_size", "chunk_size", "target_psnr")
    if args.inception is not None and manifest.num_samples < 2:
        yield f"--images: {args.images} holds {manifest.num_samples} image; rFID needs 2 or more"
    if args.fashion_mnist and (side, *manifest.classes) != (IMAGE_SIZE, *CLASSES):
        yield (
            f"--fashion-mnist: {args.images} holds images of {side} pixels in "
            f"{len(manifest.classes)} classes; the classifier knows the {len(CLASSES)} of "
            f"Fashion-MNIST at {IMAGE_SIZE} pixels; leave it out"
        )
    if args.vgg16 is not None and side < LPIPS_SIDE:
        yield f"--vgg16: LPIPS needs {LPIPS_SIDE} pixels per side, the bundle makes {side}"


def output_folder(out: str) -> Path:
    """Make the folder of results now, not after the work. Raises: ConfigError."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: {out} cannot be a folder ({error.strerror}); choose another"
        ) from error
    return Path(out)


def main() -> int:
    """Check, load, reconstruct at each K, write."""
    args = parse_args(sys.argv[1:])
    refuse_missing(args)
    args.bundle = bundle_folder(args.bundle)
    read_info(args.bundle)
    read_manifest(args.images, "images")
    # Late: what is wrong with a command line is told before.
    with heavy_imports():
        from composer.utils import dist

        from lgm_scale.evaluation.engine.parts import join_ranks
        from lgm_scale.evaluation.engine.stages import Engine
        from lgm_scale.evaluation.features.spaces import Spaces
        from lgm_scale.evaluation.images import ValidationImages
        from lgm_scale.evaluation.metrics.catalogue import FASHION
        from lgm_scale.evaluation.metrics.image_metrics import PerceptualDistance
        from lgm_scale.evaluation.reconstructions.adaptive import default_lengths
        from lgm_scale.evaluation.reconstructions.plans import ReconstructionPlans
        from lgm_scale.evaluation.references.files import check_reference, load_reference
        from lgm_scale.merging.tree import TREE_NAME, MergeTree
        from lgm_scale.pipeline import load_image_tokenizer

    tokenizer, files = load_image_tokenizer(args.bundle)
    has_tree = TREE_NAME in files  # truncation and per-image merging have none
    tree = MergeTree.load(args.bundle / TREE_NAME) if has_tree else None
    least = tree.num_blocks if tree else tokenizer.merging.min_tokens
    if problems := list(problems_of(args, tokenizer, least)):
        raise ConfigError(problems)
    out = output_folder(args.out)
    device, start = join_ranks(), time.perf_counter()
    images = ValidationImages(args.images, tokenizer.image_size)
    spaces = Spaces.load(device, images, inception=args.inception, fashion_mnist=args.fashion_mnist)
    reference = load_reference(args.reference) if args.reference else None
    check_reference(reference, spaces, tokenizer.image_size)
    lengths = set(args.lengths or default_lengths(tokenizer))
    if args.target_psnr:  # an image that never reaches the target keeps all its tokens
        lengths.add(tokenizer.num_base_tokens)
    plans = ReconstructionPlans(
        tokenizer=tokenizer.to(device),
        tree=tree,
        files=files,
        images=images,
        device=device,
        spaces=spaces,
        perceptual=PerceptualDistance(args.vgg16, device) if args.vgg16 else None,
        reference=reference,
        chunk_size=args.chunk_size,
        batch_size=args.batch_size,
        metrics=("fid", *FASHION),
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
    import numpy as np

    from lgm_scale.evaluation.engine.parts import Part
    from lgm_scale.evaluation.reconstructions.adaptive import adaptive_saving, saving_line
    from lgm_scale.evaluation.sweep.results import headline

    engine.make_chunks(plans.jobs(lengths), Part(), "reconstruct", may_compute=True)
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
    import torch

    from lgm_scale.evaluation.report.curves import metric_curves
    from lgm_scale.evaluation.report.drawing import LIGHT, to_png

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
