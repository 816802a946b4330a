"""Turn images into MDS shards: a folder per class, ILSVRC's tar files, or Parquet.

    python -m lgm_scale.data.preparation.convert SRC --out DST

SRC is a folder with one sub-folder of images per class; a tar file of one tar per class, of class
folders, or (with --labels) of images alone; a Parquet file, a folder of them, or a quoted pattern
such as 'data/train-*.parquet'. DST gets shards with columns image (JPEG bytes) and label, the
labels, an index with hashes, and manifest.json. Every image is decoded once, so a damaged one is
found now and not in the middle of a training. JPEGs keep their bytes; --image-size stores ADM
centre crops instead. Same input, same bytes, whatever the workers. An interrupted command, run
again, goes on after the shards that are finished.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from lgm_scale.data.decoding import center_crop, decode_image
from lgm_scale.data.manifest import MANIFEST_NAME, Manifest
from lgm_scale.data.preparation.image_folder import ImageFile, ImageListing
from lgm_scale.data.preparation.parquet_images import read_rows
from lgm_scale.data.preparation.parts import (
    DEFAULT_SHARD_SIZE,
    PartRecord,
    PartsFolder,
    check_shard_options,
)
from lgm_scale.data.preparation.sources import list_source, read_classes
from lgm_scale.errors import ConfigError, DataError, exit_on_user_error
from lgm_scale.storage.transfer import shown

COLUMNS = {"image": "bytes", "label": "int"}
JPEG_QUALITY = 95
# About what a crop takes as JPEG of that quality: shards are cut before the images are encoded.
BYTES_PER_PIXEL = 0.8
HEADER_BYTES = 600
NUM_LISTED = 10  # skipped files shown on the console


class Converted(NamedTuple):
    """JPEG bytes of one image and its (width, height), or None and what is wrong with it."""

    data: bytes | None
    size: tuple[int, int] = (0, 0)
    problem: str = ""


@dataclass(frozen=True)
class Settings:
    """How images are converted; the arguments of `convert_folder` that every part needs."""

    image_size: int | None
    skip_unreadable: bool
    shard_size: int
    compression: str | None
    image_column: str


def encode_jpeg(image: Image.Image) -> bytes:
    """Encode an RGB image as JPEG of quality 95 without chroma subsampling."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def convert_image(data: bytes, name: str, image_size: int | None) -> Converted:
    """Give the JPEG bytes of one image. An RGB JPEG of the right size keeps its bytes."""
    try:
        image = decode_image(data, name)
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
    source: str | Path,
    target: str | Path,
    image_size: int | None = None,
    num_workers: int = 0,
    skip_unreadable: bool = False,
    *,
    staging: str | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    compression: str | None = None,
    listing: ImageListing | None = None,
    image_column: str = "image",
) -> str:
    """Convert images to MDS shards, unless `target` is there already.

    `image_size` None keeps every size. `shard_size` is in bytes, about; `compression` such as
    `zstd:3`. `staging` is a local folder for unfinished work, if `target` is object storage;
    `listing` is what `list_source` says of `source`, if that is known. 0 workers decode in this
    process; the result does not depend on them.

    Returns: a summary to show to the user.
    Raises: DataError for a bad `source`, an unreadable image, or a `target` with other contents;
        ConfigError for impossible settings.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"--image-size is {image_size}: it must be positive")
    if num_workers < 0:
        raise ConfigError(f"--workers is {num_workers}: it must not be negative")
    check_shard_options(shard_size, compression)
    settings = Settings(image_size, skip_unreadable, shard_size, compression, image_column)
    images = listing or list_source(str(source))
    if "://" not in str(target) and Path(source).resolve() in Path(target).resolve().parents:
        raise DataError(f"--out {target} lies inside SRC {source}: it would look like a class")
    parts = plan_parts(images.files, settings)
    made_from: dict[str, Any] = {
        "command": "images_to_mds",
        "image_size": image_size,
        "shard_size": shard_size,
        "compression": compression,
        "fingerprint": images.fingerprint(),
    }
    work = PartsFolder(str(target), staging, "images", made_from, len(parts))
    if work.already_finished() is not None:
        return f"{shown(str(target))} is already there, made from the same files: nothing to do"
    work.open()
    _write_parts(work, parts, settings, num_workers)
    records = work.records()
    skipped = [problem for record in records for problem in record.facts["skipped"]]
    sizes = {tuple(size) for record in records for size in record.facts["sizes"]}
    counts = _count_classes(records, images, source)
    manifest = Manifest(
        kind="images",
        num_samples=sum(counts),
        classes=images.classes,
        class_counts=counts,
        image_size=_common_side(sizes),
        extra={"made_from": made_from, "skipped": skipped},
    )
    work.join(manifest, records, {})
    return _summary(str(target), manifest, skipped, images.num_ignored)


def plan_parts(files: Sequence[ImageFile], settings: Settings) -> list[tuple[ImageFile, ...]]:
    """Cut a listing into runs of about the size of a shard."""
    most = float("inf")
    if settings.image_size is not None:
        most = settings.image_size**2 * BYTES_PER_PIXEL + HEADER_BYTES
    parts: list[list[ImageFile]] = []
    room = 0.0
    for file in files:
        size = min(file.num_bytes, most)
        if not parts or size > room:
            parts.append([])
            room = settings.shard_size
        parts[-1].append(file)
        room -= size
    return [tuple(part) for part in parts]


def _write_parts(
    work: PartsFolder, parts: list[tuple[ImageFile, ...]], settings: Settings, num_workers: int
) -> None:
    """Make the parts that are not finished. The first problem ends it; what is finished stays."""
    finished = work.finished()
    waiting = [part for part in range(len(parts)) if part not in finished]
    total, before = sum(map(len, parts)), sum(len(parts[part]) for part in finished)
    with tqdm(total=total, initial=before, unit="image", desc="images to MDS") as progress:
        if num_workers == 0:
            for part in waiting:
                progress.update(_write_part(work, part, parts[part], settings))
            return
        pool = ProcessPoolExecutor(num_workers, initializer=_end_with_parent)
        try:
            made = [pool.submit(_write_part, work, i, parts[i], settings) for i in waiting]
            for future in as_completed(made):
                progress.update(future.result())
        except BrokenProcessPool as error:
            raise DataError(
                "a worker was killed, perhaps for its memory: run again with fewer --workers or a "
                "smaller --shard-size; finished shards are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Finish the part at hand after Ctrl-C, which every process gets; but outlive no parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_part(
    work: PartsFolder, part: int, files: tuple[ImageFile, ...], settings: Settings
) -> int:
    """Make one part and return how many images were read for it.

    Raises: DataError for an unreadable image, unless those are skipped.
    """
    labels: list[int] = []
    sizes: set[tuple[int, int]] = set()
    skipped: list[str] = []

    def samples() -> Iterator[dict[str, Any]]:
        for file, result in _convert(files, settings):
            if result.data is not None:
                labels.append(file.label)
                sizes.add(result.size)
                yield {"image": result.data, "label": file.label}
            elif settings.skip_unreadable:
                skipped.append(result.problem)
            else:
                raise DataError(
                    f"{result.problem} (in {file.path}). Replace or delete it, or leave such "
                    "images out with --skip-unreadable."
                )

    def record() -> PartRecord:
        # Two sizes are enough to know that they are not all the same.
        return PartRecord(labels, {"skipped": skipped, "sizes": sorted(sizes)[:2]})

    work.write(part, COLUMNS, samples(), record, settings.compression)
    return len(files)


def _convert(
    files: Sequence[ImageFile], settings: Settings
) -> Iterator[tuple[ImageFile, Converted]]:
    """Read and convert images, in order. An archive is opened once for all of its images."""
    for archive, group in groupby(files, lambda f: None if f.position is None else f.path):
        members = list(group)
        if archive is None:
            contents = map(_read_file, members)
        elif archive.suffix == ".parquet":
            rows = [file.position for file in members if file.position is not None]
            contents = (row or b"" for row in read_rows(archive, rows, settings.image_column))
        else:
            contents = _read_tar(archive, members)
        for file, data in zip(members, contents, strict=True):
            if isinstance(data, bytes):
                yield file, convert_image(data, file.name, settings.image_size)
            else:
                problem = f"{file.name} cannot be read: {data.strerror or data}"
                yield file, Converted(None, problem=problem)


def _read_file(file: ImageFile) -> bytes | OSError:
    try:
        return file.path.read_bytes()
    except OSError as error:
        return error


def _read_tar(path: Path, members: Sequence[ImageFile]) -> Iterator[bytes]:
    with open(path, "rb") as tar:
        for file in members:
            tar.seek(file.position or 0)
            yield tar.read(file.num_bytes)


def _count_classes(
    records: list[PartRecord], images: ImageListing, source: str | Path
) -> tuple[int, ...]:
    """Images of each class. Raises: DataError for a class of which no image could be read."""
    counts = [0] * len(images.classes)
    for record in records:
        for label in record.labels:
            counts[label] += 1
    listed = {file.label for file in images.files}
    for label, name in enumerate(images.classes):
        if counts[label] == 0 and label in listed:
            raise DataError(f"class {name!r} of {source} has no readable image: delete it")
    return tuple(counts)


def _common_side(sizes: set[tuple[int, ...]]) -> int | None:
    """Side of all images if they are square and equal."""
    if len(sizes) != 1:
        return None
    width, height = next(iter(sizes))
    return width if width == height else None


def _summary(target: str, manifest: Manifest, skipped: list[str], num_ignored: int) -> str:
    """Say in one line what was written, and list what was left out."""
    side = manifest.image_size
    size = f" of {side} x {side}" if side else ""
    line = f"{shown(target)}: {manifest.num_samples} images{size} in {manifest.num_classes} classes"
    if num_ignored:
        line += f"; ignored {num_ignored} files that are not images"
    if skipped:
        line += f"; skipped {len(skipped)} unreadable images:"
        line += "".join(f"\n  {problem}" for problem in skipped[:NUM_LISTED])
        if len(skipped) > NUM_LISTED:
            line += f"\n  ... all are listed in {shown(target)}/{MANIFEST_NAME}"
    return line


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        prog="python -m lgm_scale.data.preparation.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="folder, tar file, Parquet file or pattern of those")
    add("--out", metavar="DST", required=True, help="MDS folder to make, or s3://..., gs://...")
    add("--staging", metavar="DIR", help="local folder for unfinished work, for remote --out")
    add("--image-size", type=int, help="centre crop (ADM) to this side; default: keep every size")
    default_workers = min(8, os.cpu_count() or 1)
    workers_help = f"processes that decode, 0 for none (default: {default_workers})"
    add("--workers", type=int, default=default_workers, help=workers_help)
    shard_help = f"of a shard, about (default: {DEFAULT_SHARD_SIZE})"
    add("--shard-size", type=int, default=DEFAULT_SHARD_SIZE, metavar="BYTES", help=shard_help)
    add("--compression", metavar="ALGORITHM", help="of shards, such as zstd:3 (default: none)")
    add("--classes", type=Path, help="names of the classes: one per line, or an MDS folder's")
    add("--labels", type=Path, help="classes of a tar of images: `class` or `file class` lines")
    add("--image-column", default="image", help="of Parquet files (default: image)")
    add("--label-column", default="label", help="of Parquet files (default: label)")
    add("--skip-unreadable", action="store_true", help="leave damaged images out and list them")
    options = parser.parse_args()
    classes = None if options.classes is None else read_classes(options.classes)
    columns = (options.image_column, options.label_column)
    summary = convert_folder(
        options.source,
        options.out,
        options.image_size,
        options.workers,
        options.skip_unreadable,
        staging=options.staging,
        shard_size=options.shard_size,
        compression=options.compression,
        listing=list_source(options.source, classes, options.labels, *columns),
        image_column=options.image_column,
    )
    print(summary)


if __name__ == "__main__":
    exit_on_user_error(main)
