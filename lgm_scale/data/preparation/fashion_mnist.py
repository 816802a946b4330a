"""Turn Fashion-MNIST into MDS shards, ready for training.

    python -m lgm_scale.data.preparation.fashion_mnist --out DATA [--source DIR | --download]
        [--train-images N] [--val-images N]

Its four files come from DIR; without it from where the package dataset-fashion-mnist of Debian and
Ubuntu has them (/usr/share/datasets/fashion-mnist); with --download torchvision gets them, into
DATA/download, where the next command finds them, and compares them with their published checksums.
DATA/train gets 60,000 images, DATA/val 10,000, or the first N of either, padded with black to
32 x 32 and stored without loss (PNG), class by class. An interrupted command, run again, goes on
after the finished shards.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lgm_scale.data.fashion_mnist import (
    CLASSES,
    DEBIAN_FOLDER,
    IMAGE_SIZE,
    SPLITS,
    LabelledImages,
    read_split,
)
from lgm_scale.data.manifest import Manifest
from lgm_scale.data.preparation.parts import PartRecord, PartsFolder
from lgm_scale.errors import DataError, exit_on_user_error

IMAGES_PER_PART = 10_000


def download(folder: Path) -> Path:
    """Get the four files, unless they are there; return where they lie.

    torchvision compares them with their published checksums.

    Raises: DataError if they cannot be had, or are not what was published.
    """
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"--download: {error}; or `apt-get install dataset-fashion-mnist` as root (Debian, "
            "Ubuntu), or name a folder with the four files with --source"
        ) from error
    return downloaded(folder)


def downloaded(folder: Path) -> Path:
    """Where torchvision leaves the four files."""
    return folder / "FashionMNIST" / "raw"


def convert_split(found: LabelledImages, target: Path) -> str:
    """Write one split, unless `target` is there already.

    Returns: one line to show to the user.
    Raises: DataError if `target` holds something else.
    """
    made_from = {"command": "fashion_mnist", "image_size": IMAGE_SIZE, "sha256": found.sha256}
    order = np.argsort(found.labels, kind="stable")
    parts = [order[i : i + IMAGES_PER_PART] for i in range(0, len(order), IMAGES_PER_PART)]
    work = PartsFolder(str(target), None, "images", made_from, len(parts))
    if work.already_finished() is not None:
        return f"{target} is already there, made from the same files: nothing to do"
    work.open()
    for part in sorted(set(range(len(parts))) - work.finished()):
        labels = found.labels[parts[part]].tolist()
        samples = _samples(found.images[parts[part]], labels)
        record = PartRecord(labels, {})
        work.write(part, {"image": "bytes", "label": "int"}, samples, lambda: record)  # noqa: B023
    counts = np.bincount(found.labels, minlength=len(CLASSES)).tolist()
    manifest = Manifest(
        kind="images",
        num_samples=len(order),
        classes=CLASSES,
        class_counts=tuple(counts),
        image_size=IMAGE_SIZE,
        extra={"made_from": made_from},
    )
    work.join(manifest, work.records(), {})
    return f"{target}: {len(order)} images of {IMAGE_SIZE} x {IMAGE_SIZE} in {len(CLASSES)} classes"


def _first(found: LabelledImages, count: int | None, option: str) -> LabelledImages:
    """The first `count` images, under a hash of their own. Raises: DataError."""
    total = len(found.labels)
    if count is None or count == total:
        return found
    if not 1 <= count <= total:
        raise DataError(
            f"{option}: {count} must be 1 to {total}, the images of the files; leave the option "
            "out for all"
        )
    images, labels = found.images[:count], found.labels[:count]
    return LabelledImages(
        images, labels, hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    )


def _samples(images: np.ndarray, labels: list[int]) -> Iterator[dict[str, Any]]:
    for pixels, label in zip(images, labels, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        yield {"image": buffer.getvalue(), "label": label}


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and convert both splits."""
    parser = argparse.ArgumentParser(
        prog="python -m lgm_scale.data.preparation.fashion_mnist",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder that gets train/ and val/")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--source", type=Path, help="folder of the files")
    files.add_argument("--download", action="store_true", help="get the files (30 MB)")
    for split in SPLITS:
        add(f"--{split}-images", type=int, metavar="N", help="only the first N (default: all)")
    options = parser.parse_args(argv)
    folder = options.out / "download"
    source = download(folder) if options.download else options.source
    if source is None:
        source = downloaded(folder) if downloaded(folder).is_dir() else DEBIAN_FOLDER
    found = {
        split: _first(
            read_split(source, split), getattr(options, f"{split}_images"), f"--{split}-images"
        )
        for split in SPLITS
    }
    for split, images in found.items():
        print(convert_split(images, options.out / split))


if __name__ == "__main__":
    exit_on_user_error(main)
