"""Make a reference: statistics and features that samples are compared with.

    python -m eval.reference SOURCE --out FILE.safetensors [--inception FILE] [--dinov2 FILE]
    composer -n 8 eval/reference.py data/imagenet256/images/train --out refs/train.safetensors ...

SOURCE is a folder of images, MDS shards, ADM's npz (statistics and 10 000 images), another npz
with mu and sigma, or EDM2's pkl. Statistics that a file has are kept as they are; images are put
through the networks whose weights are given, for what is missing: features (KID, precision,
recall) and statistics. The same command again goes on where it was interrupted. Exit status: 0
done, 2 for anything the user must mend.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from composer.utils import dist

from lgm_scale import __version__
from lgm_scale.errors import ConfigError, DataError, exit_on_user_error
from lgm_scale.evaluation.engine.chunks import Job
from lgm_scale.evaluation.engine.parts import Part, join_ranks
from lgm_scale.evaluation.engine.stages import Engine
from lgm_scale.evaluation.features.spaces import Spaces, network_spaces
from lgm_scale.evaluation.reconstructions.images import OriginalsWork, spread
from lgm_scale.evaluation.references.files import (
    Reference,
    load_reference,
    npz_images_shape,
    save_reference,
)
from lgm_scale.evaluation.references.sources import open_source

__all__ = ["make_reference"]

STATISTICS = ("inception_pool", "inception_spatial", "dinov2")
FEATURES = ("inception_pool",)
"""Kept vector by vector: what KID, precision and recall read."""


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.reference",
        description="Statistics and features of reference images, in one file.",
    )
    parser.add_argument("source", help="folder of images, MDS shards, .npz or .pkl")
    parser.add_argument("--out", required=True, metavar="FILE", help="ends in .safetensors")
    parser.add_argument("--inception", metavar="FILE", help="Inception's weights")
    parser.add_argument("--dinov2", metavar="FILE", help="DINOv2's weights")
    parser.add_argument("--image-size", type=int, help="for a folder of images: centre crop")
    parser.add_argument(
        "--keep-features", type=int, default=10_000, metavar="M",
        help="images whose features are kept, evenly spaced (10000, as ADM's)",
    )  # fmt: skip
    parser.add_argument("--name", help="of the reference in results; default: that of the source")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--chunk-size", type=int, default=250)
    return parser.parse_args(argv)


def make_reference(args: argparse.Namespace) -> Reference:
    """The reference, on every rank."""
    path = Path(args.source)
    known = Reference(name=args.name or path.stem)
    has_images = path.suffix not in (".npz", ".pkl")
    if not has_images:
        has_images = path.suffix == ".npz" and path.is_file() and npz_images_shape(path) is not None
        stored = _statistics_of(path, has_images)
        known = stored or known
    if not has_images or not (args.inception or args.dinov2):
        if not known.moments:
            raise ConfigError(
                f"--inception: missing, and so is --dinov2; {path} holds images and no "
                "statistics, so a network must look at them"
            )
        return known
    return _with_images(args, path, known)


def _statistics_of(path: Path, has_images: bool) -> Reference | None:
    try:
        return load_reference(path)
    except DataError:
        if has_images:  # an npz of samples, say: its images will do
            return None
        raise


def _with_images(args: argparse.Namespace, path: Path, known: Reference) -> Reference:
    device = join_ranks()
    source, identity = open_source(path, args.image_size)
    if len(source) < 2:
        raise DataError(f"{path} holds {len(source)} images; needs 2 or more")
    spaces = Spaces(network_spaces(args.inception, args.dinov2, device), None)
    protocol = {
        "kind": "images",
        "lgm_scale": __version__,
        "images": identity,
        "features": spaces.describe(),
    }
    work = OriginalsWork(source, spaces.all, device, args.batch_size)
    job = Job("reference", protocol, len(source), args.chunk_size, work)
    engine = Engine(work_folder(args.out), device)
    engine.make_chunks([job], Part(), "reference", may_work=True)
    features = tuple(name for name in STATISTICS if name in spaces.outputs)
    engine.make_sums([(job, features)])
    own = engine.moments(job, features)
    kept = np.array(spread(len(source), args.keep_features))
    names = [name for name in FEATURES if name in spaces.outputs] if len(kept) else []
    whole = {name: engine.features(job, [name])[name][kept] for name in names}
    weights = {s["space"]: s["weights_sha256"] for s in spaces.describe()}
    return Reference(
        name=args.name or known.name,
        moments=own | known.moments,  # what a file says of its own statistics is kept
        features=whole,
        image_size=identity["image_size"],
        weights=weights,
        description=known.description
        | {
            "images": identity,
            "num_images": len(source),
            "num_features": len(kept) if names else 0,
            "measured_here": sorted(set(features) - known.moments.keys()),
            "features": spaces.describe(),
        },
    )


def work_folder(out: str) -> Path:
    """Where unfinished work is kept."""
    return Path(f"{out}.work")


def main() -> int:
    """Make, write, say what it unlocks."""
    args = parse_args(sys.argv[1:])
    out = Path(args.out)
    problems = []
    if out.suffix != ".safetensors":
        problems.append(f"--out: {out} must end in .safetensors")
    for key in ("batch_size", "chunk_size"):
        if getattr(args, key) < 1:
            problems.append(f"--{key.replace('_', '-')}: {getattr(args, key)} must be 1 or more")
    if args.keep_features < 0:
        problems.append(f"--keep-features: {args.keep_features} must be 0 or more")
    for key in ("inception", "dinov2"):
        value = getattr(args, key)
        if value is not None and not Path(value).is_file():
            problems.append(f"--{key}: {value} is not a file; see `python -m eval.preflight`")
    if problems:
        raise ConfigError(problems)
    reference = make_reference(args)
    if dist.get_global_rank() == 0:
        save_reference(out, reference)
        shutil.rmtree(work_folder(args.out), ignore_errors=True)
        held = [f"statistics of {name}" for name in reference.moments]
        held += [f"{len(rows)} vectors of {name}" for name, rows in reference.features.items()]
        print(f"{out}: {reference.name}; {', '.join(held)}")
    dist.barrier()
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
