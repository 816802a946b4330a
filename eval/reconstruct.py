"""Validation images through the tokenizer at each K: PSNR, SSIM, LPIPS and rFID.

    composer eval/reconstruct.py --bundle BUNDLE --images MDS --out FOLDER [--lengths 8 16 ...]
        [--vgg16 FILE] [--inception FILE]

Writes reconstruction.json (numbers with their whole protocol) and reconstruction.png. The numbers
do not depend on how many ranks work. LPIPS and rFID need weights that are never downloaded: without
its file a metric is off. Exit status: 0 done, 2 for anything the user must mend.
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
from tqdm import tqdm

from eval.adaptive import AdaptiveSaving, adaptive_saving, saving_line
from eval.cells import write_json
from eval.chunks import join_ranks, own_chunks
from eval.image_metrics import PerceptualDistance
from eval.inception import WEIGHTS_URL, InceptionFeatures
from eval.metric_curves import metric_curves
from eval.reconstruction_metrics import Measurement, describe_metrics
from eval.reconstructor import Reconstructor, StoredImages
from eval.sweep_config import outside_lengths, repeated_lengths, wrong_image_size
from eval.theme import LIGHT, to_png
from lgm_scale import __version__
from lgm_scale.bundle import TOKENIZER_NAME, load_tokenizer, read_bundle
from lgm_scale.data.latents import TREE_NAME
from lgm_scale.data.manifest import read_manifest
from lgm_scale.errors import ConfigError, MissingAssetError, exit_on_user_error
from lgm_scale.merging import MergeTree
from lgm_scale.models.assets import VGG16_URL, Asset
from lgm_scale.models.tokenizer import Tokenizer

__all__ = ["switched_off"]

LPIPS_SIDE = 16  # VGG16 halves it four times
PIXELS = "(x + 1) / 2, clipped to [0, 1], rounded to 8 bits"


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
        "--target-psnr",
        type=float,
        nargs="+",
        default=[],
        metavar="DB",
        help="also: the mean K saved by giving each image the smallest K that reaches this",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per step and rank")
    return parser.parse_args(argv)


def refuse_problems(args: argparse.Namespace, net: Tokenizer, least: int) -> None:
    """Raise ConfigError with everything that is wrong with the command line."""
    image_size = net.image_size
    manifest = read_manifest(args.images, "images")
    tokenizer = {
        "num_codebooks": least,
        "num_base_tokens": net.num_base_tokens,
        "image_size": image_size,
    }
    problems = [
        f"--{problem}"
        for found in (
            outside_lengths(args.lengths or (), tokenizer),
            repeated_lengths(args.lengths or ()),
            wrong_image_size(args.images, manifest, tokenizer),
            _other_problems(args, manifest.num_samples, image_size),
        )
        for problem in found
    ]
    if not problems:
        try:  # now, not after the work
            Path(args.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problems = [f"--out: {args.out} cannot be a folder ({error.strerror}); choose another"]
    if problems:
        raise ConfigError(problems)


def _other_problems(args: argparse.Namespace, count: int, image_size: int) -> Iterator[str]:
    if args.batch_size < 1:
        yield f"batch-size: {args.batch_size} must be 1 or more"
    if args.inception is not None and count < 2:
        yield f"images: {args.images} holds {count} image; rFID needs 2 or more"
    if args.vgg16 is not None and image_size < LPIPS_SIDE:
        yield f"vgg16: LPIPS needs {LPIPS_SIDE} pixels per side, the bundle makes {image_size}"


def switched_off(vgg16: str | None, inception: str | None) -> dict[str, str]:
    """Metric -> the line that says why it is off, for every metric without its file.

    Raises: MissingAssetError if a path that was given is no file.
    """
    files = {
        "lpips": Asset("--vgg16", vgg16, VGG16_URL, "528 MB", "LPIPS"),
        "rfid_val": Asset("--inception", inception, WEIGHTS_URL, "96 MB", "rFID"),
    }
    wrong = [
        f"{file.key}: {file.path} is not a file; {file.unlocks} needs it (about {file.size}, from "
        f"{file.url}), or leave {file.key} out"
        for file in files.values()
        if file.path is not None and not file.present
    ]
    if wrong:
        raise MissingAssetError("\n".join(wrong))
    return {
        name: f"{file.unlocks} is off: give {file.key} the file {file.url.rsplit('/', 1)[-1]} "
        f"(about {file.size}, from {file.url}) to switch it on"
        for name, file in files.items()
        if file.path is None
    }


def main() -> int:
    """Check, load, reconstruct at each K, write."""
    args = parse_args(sys.argv[1:])
    off = switched_off(args.vgg16, args.inception)
    tokenizer = load_tokenizer(args.bundle)
    files = read_bundle(args.bundle, "tokenizer")["files"]
    has_tree = TREE_NAME in files  # truncation and per-image merging have none
    tree = MergeTree.load(Path(args.bundle) / TREE_NAME) if has_tree else None
    least = tree.num_blocks if tree is not None else tokenizer.merging.min_tokens
    refuse_problems(args, tokenizer, least)
    device = join_ranks()
    tokenizer = tokenizer.to(device)
    perceptual = PerceptualDistance(args.vgg16, device) if args.vgg16 else None
    features = (
        InceptionFeatures(args.inception, device, args.batch_size) if args.inception else None
    )
    images = StoredImages(args.images, tokenizer.image_size)
    size, first = tokenizer.num_base_tokens, dist.get_global_rank() == 0
    lengths = sorted(args.lengths or default_lengths(least, size))
    if args.target_psnr:  # an image that never reaches the target keeps all its tokens
        lengths = sorted({*lengths, size})
    own = sum(stop - start for start, stop in own_chunks(len(images), args.batch_size))
    start = time.perf_counter()
    with tqdm(
        total=own * (len(lengths) + 1), desc="reconstruct", unit="img", disable=not first
    ) as bar:
        for line in off.values() if first else ():
            bar.write(line)
        reconstruct = Reconstructor(tokenizer, tree, images, args.batch_size)
        measurement = Measurement(reconstruct, perceptual, features, bar.update)
        pixels_hash, reference = measurement.originals()
        rows = []
        for k in lengths:
            rows.append(measurement.at(k, reference))
            if first:
                bar.write(headline(rows[-1]))
    if first:
        used = (TOKENIZER_NAME, TREE_NAME)
        protocol = {
            "bundle_files": {name: files[name] for name in used if name in files},
            "num_images": len(images),
            "image_size": tokenizer.image_size,
            "image_hashes_sha256": pixels_hash,
            "pixels": PIXELS,
            "precision": "float32, no TF32",
            "batch_size": args.batch_size,
            "device": device.type,
            "metrics": describe_metrics(len(images), perceptual, features),
            "off": off,
        }
        savings = _savings(measurement, lengths, args.target_psnr)
        seconds = time.perf_counter() - start
        write_results(Path(args.out), protocol, rows, savings, seconds)
    dist.barrier()
    return 0


def _savings(
    measurement: Measurement, lengths: list[int], targets: list[float]
) -> list[AdaptiveSaving]:
    """What choosing K per image saves at each target; printed, too."""
    table = np.stack([measurement.psnr_of[k] for k in lengths], axis=1)  # [M, L]
    savings = [adaptive_saving(table, lengths, target) for target in targets]
    for saving in savings:
        print(saving_line(saving))
    return savings


def default_lengths(least: int, size: int) -> list[int]:
    """N, N / 2, ... as far as the length control goes."""
    lengths = [size]
    while lengths[-1] // 2 >= max(least, 1):
        lengths.append(lengths[-1] // 2)
    return lengths


def headline(row: dict[str, Any]) -> str:
    """A row for the console."""
    parts = [f"K = {row['num_tokens']:4d}", f"PSNR {row['psnr_db']:.2f} dB"]
    names = {"ssim": "SSIM", "lpips": "LPIPS", "rfid_val": "rFID"}
    return "   ".join(
        parts + [f"{text} {row[key]:.4f}" for key, text in names.items() if key in row]
    )


def write_results(
    out: Path,
    protocol: dict[str, Any],
    rows: list[dict[str, Any]],
    savings: list[AdaptiveSaving],
    seconds: float,
) -> None:
    """reconstruction.json and reconstruction.png."""
    results = {
        "format": "lgm_scale.reconstruction",
        "version": 1,
        "versions": {"lgm_scale": __version__, "torch": torch.__version__},
        "protocol": protocol,
        "rows": rows,
        "adaptive": [asdict(saving) for saving in savings],
        "run": {"ranks": dist.get_world_size(), "seconds": seconds},
    }
    write_json(out / "reconstruction.json", results)
    labels = {name: metric["label"] for name, metric in protocol["metrics"].items()}
    title = f"Reconstructions of {protocol['num_images']} validation images"
    picture = to_png(metric_curves(rows, labels, title, LIGHT), LIGHT)
    (out / "reconstruction.png").write_bytes(picture)
    print(f"results: {out / 'reconstruction.json'}, {out / 'reconstruction.png'}")


if __name__ == "__main__":
    exit_on_user_error(main)
