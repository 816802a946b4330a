"""Turn a folder of images, one sub-folder per class, into MDS shards.

SRC/<class>/<image> becomes DST/shard.*.mds with columns image (JPEG bytes) and label (index of
the class, in the order of the sorted names), and DST/manifest.json. DST is complete or absent: it
is written as DST.partial first. Every image is decoded once, so a damaged one is found now and not
in the middle of a training. Same input, same bytes.
"""

from __future__ import annotations

import argparse
import io
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from streaming import MDSWriter
from tqdm import tqdm

from data_tools.image_folder import ImageFile, ImageFolder, list_image_folder
from lgm_scale.data.images import center_crop, decode_image
from lgm_scale.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_shards,
    read_manifest,
    write_manifest,
    written_aside,
)
from lgm_scale.errors import ConfigError, DataError, exit_on_user_error

__all__ = ["convert_file", "convert_folder", "encode_jpeg"]

OWN_NAMES = ("shard.*.mds", "index.json", f"{MANIFEST_NAME}*")
JPEG_QUALITY = 95
QUEUED_PER_WORKER = 16
NUM_LISTED = 10  # skipped files shown on the console


class Converted(NamedTuple):
    """JPEG bytes and size of one image, or None and what is wrong with it."""

    data: bytes | None
    size: tuple[int, int] = (0, 0)
    problem: str = ""


@dataclass
class Tally:
    """What was written and what was left out."""

    counts: list[int]
    skipped: list[str] = field(default_factory=list)
    sizes: set[tuple[int, int]] = field(default_factory=set)

    def common_side(self) -> int | None:
        """Side of all images if they are square and equal."""
        if len(self.sizes) != 1:
            return None
        width, height = next(iter(self.sizes))
        return width if width == height else None


def encode_jpeg(image: Image.Image) -> bytes:
    """Encode an RGB image as JPEG of quality 95 without chroma subsampling."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def convert_file(path: Path, name: str, image_size: int | None) -> Converted:
    """Read one image and give its JPEG bytes. An RGB JPEG of the right size keeps its bytes."""
    try:
        data = path.read_bytes()
        image = decode_image(data, name)
    except OSError as error:
        return Converted(None, problem=f"{name} cannot be read: {error.strerror or error}")
    except DataError as error:
        return Converted(None, problem=str(error))
    if image_size is not None and image.size != (image_size, image_size):
        image = center_crop(image, image_size)
        return Converted(encode_jpeg(image), image.size)
    return Converted(data if _is_rgb_jpeg(data) else encode_jpeg(image), image.size)


def _is_rgb_jpeg(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return image.format == "JPEG" and image.mode == "RGB"


def convert_folder(
    source: Path,
    target: Path,
    image_size: int | None = None,
    num_workers: int = 0,
    skip_unreadable: bool = False,
) -> str:
    """Convert an image folder to MDS shards, unless `target` is there already.

    Args:
        source: folder with one sub-folder of images per class.
        target: MDS folder to make.
        image_size: side of the centre crop; None to keep every size.
        num_workers: processes that decode; 0 for this one. The result does not depend on it.
        skip_unreadable: leave damaged images out instead of stopping.

    Returns: a summary to show to the user.
    Raises: DataError for a bad `source`, an unreadable image, or a `target` with other contents.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"--image-size is {image_size}: it must be positive")
    if num_workers < 0:
        raise ConfigError(f"--workers is {num_workers}: it must not be negative")
    folder = list_image_folder(source)
    if source.resolve() in target.resolve().parents:
        raise DataError(f"DST {target} lies inside SRC {source}: it would look like a class there")
    made_from: dict[str, Any] = {
        "command": "images_to_mds",
        "image_size": image_size,
        "skip_unreadable": skip_unreadable,
        "fingerprint": folder.fingerprint(),
    }
    if (target / MANIFEST_NAME).is_file():
        manifest = read_manifest(target, "images")
        check_shards(target)
        if manifest.extra.get("made_from") == made_from:
            return f"{target} is already there, made from the same files: nothing to do"
    with written_aside(target, OWN_NAMES, "images_to_mds") as aside:
        tally = _write_shards(folder, aside, image_size, num_workers, skip_unreadable)
        for name, count in zip(folder.classes, tally.counts, strict=True):
            if count == 0:
                raise DataError(f"class {name!r} of {source} has no readable image: delete it")
        manifest = Manifest(
            kind="images",
            num_samples=sum(tally.counts),
            classes=folder.classes,
            class_counts=tuple(tally.counts),
            image_size=tally.common_side(),
            extra={"made_from": made_from, "skipped": tally.skipped},
        )
        write_manifest(aside, manifest)
    return _summary(target, manifest, tally.skipped, folder.num_ignored)


def _write_shards(
    folder: ImageFolder, aside: Path, image_size: int | None, num_workers: int, skip: bool
) -> Tally:
    """Write the shards and the index, and tell what went in."""
    tally = Tally([0] * len(folder.classes))
    results = _convert_in_order(folder.files, image_size, num_workers)
    with (
        MDSWriter(out=str(aside), columns={"image": "bytes", "label": "int"}) as writer,
        tqdm(results, total=len(folder.files), unit="image", desc="images to MDS") as progress,
    ):
        for file, result in progress:
            if result.data is not None:
                writer.write({"image": result.data, "label": file.label})
                tally.counts[file.label] += 1
                tally.sizes.add(result.size)
            elif skip:
                tally.skipped.append(result.problem)
            else:
                raise DataError(
                    f"{result.problem} (in {file.path}). Replace or delete it, or leave such "
                    "images out with --skip-unreadable."
                )
    return tally


def _convert_in_order(
    files: tuple[ImageFile, ...], image_size: int | None, num_workers: int
) -> Iterator[tuple[ImageFile, Converted]]:
    """Convert files in parallel, give results in order, and never run far ahead of the writer."""
    if num_workers == 0:
        for file in files:
            yield file, convert_file(file.path, file.name, image_size)
        return
    pending: deque[tuple[ImageFile, Future[Converted]]] = deque()
    with ProcessPoolExecutor(num_workers) as executor:
        try:
            for file in files:
                future = executor.submit(convert_file, file.path, file.name, image_size)
                pending.append((file, future))
                if len(pending) >= QUEUED_PER_WORKER * num_workers:
                    oldest, result = pending.popleft()
                    yield oldest, result.result()
            while pending:
                oldest, result = pending.popleft()
                yield oldest, result.result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _summary(target: Path, manifest: Manifest, skipped: list[str], num_ignored: int) -> str:
    """Say in one line what was written, and list what was left out."""
    side = manifest.image_size
    size = f" of {side} x {side}" if side else ""
    line = f"{target}: {manifest.num_samples} images{size} in {manifest.num_classes} classes"
    if num_ignored:
        line += f"; ignored {num_ignored} files that are not images"
    if skipped:
        line += f"; skipped {len(skipped)} unreadable images:"
        line += "".join(f"\n  {problem}" for problem in skipped[:NUM_LISTED])
        if len(skipped) > NUM_LISTED:
            line += f"\n  ... all are listed in {target / MANIFEST_NAME}"
    return line


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        prog="python data_tools/images_to_mds.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SRC", type=Path, help="folder with one sub-folder of images per class")
    add("target", metavar="DST", type=Path, help="MDS folder to make")
    add("--image-size", type=int, help="centre crop (ADM) to this side; default: keep every size")
    default_workers = min(8, os.cpu_count() or 1)
    workers_help = f"processes that decode, 0 for none (default: {default_workers})"
    add("--workers", type=int, default=default_workers, help=workers_help)
    add("--skip-unreadable", action="store_true", help="leave damaged images out and list them")
    options = parser.parse_args()
    summary = convert_folder(
        options.source,
        options.target,
        options.image_size,
        options.workers,
        options.skip_unreadable,
    )
    print(summary)


if __name__ == "__main__":
    exit_on_user_error(main)
