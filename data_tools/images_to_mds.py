"""Turn images into MDS shards: a folder per class, ILSVRC's tar files, or Parquet.

    python data_tools/images_to_mds.py SRC --out DST

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
import glob
import io
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from data_tools.image_folder import ImageFile, ImageFolder, list_image_folder
from data_tools.parquet_images import list_parquet, read_rows
from data_tools.parts import DEFAULT_SHARD_SIZE, PartRecord, PartsFolder, check_shard_options
from data_tools.tar_images import list_tar, read_labels_file
from lgm_scale.data.images import center_crop, decode_image
from lgm_scale.data.manifest import MANIFEST_NAME, Manifest, parse_manifest
from lgm_scale.errors import ConfigError, DataError, exit_on_user_error
from lgm_scale.storage.transfer import shown

__all__ = ["convert_file", "convert_folder", "encode_jpeg", "list_source", "plan_parts"]

COLUMNS = {"image": "bytes", "label": "int"}
JPEG_QUALITY = 95
# Of a crop stored as JPEG, about; for the size of shards.
BYTES_PER_PIXEL = 0.8
HEADER_BYTES = 600
NUM_LISTED = 10  # skipped files shown on the console


class Converted(NamedTuple):
    """JPEG bytes and size of one image, or None and what is wrong with it."""

    data: bytes | None
    size: tuple[int, int] = (0, 0)
    problem: str = ""


@dataclass(frozen=True)
class Settings:
    """How images are converted; see the command line."""

    image_size: int | None = None
    skip_unreadable: bool = False
    shard_size: int = DEFAULT_SHARD_SIZE
    compression: str | None = None
    image_column: str = "image"


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


def convert_file(path: Path, name: str, image_size: int | None) -> Converted:
    """Read one image file and convert it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return Converted(None, problem=f"{name} cannot be read: {error.strerror or error}")
    return convert_image(data, name, image_size)


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
    listing: ImageFolder | None = None,
    image_column: str = "image",
) -> str:
    """Convert images to MDS shards, unless `target` is there already.

    Args:
        source: folder, tar file or Parquet files.
        target: MDS folder to make, local or in object storage.
        image_size: side of the centre crop; None to keep every size.
        num_workers: processes that decode; 0 for this one. The result does not depend on it.
        skip_unreadable: leave damaged images out instead of stopping.
        staging: local folder for unfinished work, if `target` is object storage.
        shard_size: bytes of a shard, about.
        compression: of the shards, such as `zstd:3`.
        listing: what `list_source` says of `source`, if that is known.
        image_column: of Parquet files.

    Returns: a summary to show to the user.
    Raises: DataError for a bad `source`, an unreadable image, or a `target` with other contents.
    """
    settings = Settings(image_size, skip_unreadable, shard_size, compression, image_column)
    _check_settings(settings, num_workers)
    folder = listing or list_source(str(source))
    if "://" not in str(target) and Path(source).resolve() in Path(target).resolve().parents:
        raise DataError(f"--out {target} lies inside SRC {source}: it would look like a class")
    parts = plan_parts(folder.files, settings)
    made_from: dict[str, Any] = {
        "command": "images_to_mds",
        "image_size": image_size,
        "shard_size": shard_size,
        "compression": compression,
        "fingerprint": folder.fingerprint(),
    }
    work = PartsFolder(str(target), staging, "images", made_from, len(parts))
    if work.already_finished() is not None:
        return f"{shown(str(target))} is already there, made from the same files: nothing to do"
    work.open()
    records = _write_parts(work, parts, settings, num_workers)
    counts = [0] * len(folder.classes)
    for record in records:
        for label in record.labels:
            counts[label] += 1
    for name, count in zip(folder.classes, counts, strict=True):
        if count == 0 and any(folder.classes[file.label] == name for file in folder.files):
            raise DataError(f"class {name!r} of {source} has no readable image: delete it")
    skipped = [problem for record in records for problem in record.facts["skipped"]]
    sizes = {tuple(size) for record in records for size in record.facts["sizes"]}
    manifest = Manifest(
        kind="images",
        num_samples=sum(counts),
        classes=folder.classes,
        class_counts=tuple(counts),
        image_size=_common_side(sizes),
        extra={"made_from": made_from, "skipped": skipped},
    )
    work.join(manifest, records, {})
    return _summary(str(target), manifest, skipped, folder.num_ignored)


def _check_settings(settings: Settings, num_workers: int) -> None:
    if settings.image_size is not None and settings.image_size < 1:
        raise ConfigError(f"--image-size is {settings.image_size}: it must be positive")
    if num_workers < 0:
        raise ConfigError(f"--workers is {num_workers}: it must not be negative")
    check_shard_options(settings.shard_size, settings.compression)


def list_source(
    source: str,
    classes: tuple[str, ...] | None = None,
    labels: Path | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> ImageFolder:
    """List the images of whatever `source` is.

    Args:
        source: path, or a pattern of Parquet files.
        classes: their names, where the source does not say or has only some of them.
        labels: list of the classes of a flat tar.
        image_column: of Parquet files.
        label_column: of Parquet files.

    Raises: DataError.
    """
    path = Path(source)
    if path.suffix == ".tar" and path.is_file():
        return list_tar(
            path, None if labels is None else read_labels_file(labels, classes), classes
        )
    if labels is not None:
        raise DataError(f"--labels: goes with a tar file of images, which {source} is not; drop it")
    found = sorted(Path(name) for name in glob.glob(source)) if "*" in source else [path]
    if found == [path] and path.is_dir():
        found = sorted(path.glob("*.parquet"))
    if found and all(name.suffix == ".parquet" and name.is_file() for name in found):
        return list_parquet(found, classes, image_column, label_column)
    if "*" in source:
        raise DataError(f"no Parquet file matches {source}")
    folder = list_image_folder(path)
    return folder if classes is None else _relabelled(folder, classes, source)


def _relabelled(folder: ImageFolder, classes: tuple[str, ...], source: str) -> ImageFolder:
    unknown = sorted(set(folder.classes) - set(classes))
    if unknown:
        raise DataError(f"{source} has a class {unknown[0]!r} that --classes does not name")
    files = tuple(
        ImageFile(f.path, f.name, classes.index(folder.classes[f.label]), f.num_bytes)
        for f in folder.files
    )
    return ImageFolder(classes, files, folder.num_ignored)


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
) -> list[PartRecord]:
    """Make the parts that are not finished; all records, in order."""
    finished = work.finished()
    waiting = [part for part in range(len(parts)) if part not in finished]
    total, before = sum(map(len, parts)), sum(len(parts[part]) for part in finished)
    with tqdm(total=total, initial=before, unit="image", desc="images to MDS") as progress:
        if num_workers == 0:
            for part in waiting:
                _write_part(work, part, parts[part], settings, progress.update)
        else:
            _in_parallel(work, parts, waiting, settings, num_workers, progress)
    return work.records()


def _in_parallel(
    work: PartsFolder,
    parts: list[tuple[ImageFile, ...]],
    waiting: list[int],
    settings: Settings,
    num_workers: int,
    progress: tqdm,
) -> None:
    """Make parts in processes. The first problem ends it; what is finished stays."""
    counter = multiprocessing.Value("q", 0)
    seen = 0
    with ProcessPoolExecutor(num_workers, initializer=_count_in, initargs=(counter,)) as pool:
        running: set[Future[None]] = set()
        queue = iter(waiting)
        try:
            while True:
                while len(running) < 2 * num_workers and (part := next(queue, None)) is not None:
                    running.add(pool.submit(_write_counted, work, part, parts[part], settings))
                if not running:
                    break
                done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                now = counter.value
                progress.update(now - seen)
                seen = now
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker was killed, perhaps for its memory: run again with fewer --workers or a "
                "smaller --shard-size; finished shards are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_counter: Any = None


def _count_in(counter: Any) -> None:
    global _counter
    _counter = counter


def _write_counted(
    work: PartsFolder, part: int, files: tuple[ImageFile, ...], settings: Settings
) -> None:
    def count(number: int) -> None:
        with _counter.get_lock():
            _counter.value += number

    _write_part(work, part, files, settings, count)


def _write_part(
    work: PartsFolder, part: int, files: tuple[ImageFile, ...], settings: Settings, count: Any
) -> None:
    """Make one part. Raises: DataError for an unreadable image, unless those are skipped."""
    labels: list[int] = []
    sizes: set[tuple[int, int]] = set()
    skipped: list[str] = []

    def samples() -> Iterator[dict[str, Any]]:
        for file, result in _convert(files, settings):
            count(1)
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
        # Sizes only matter if they are all the same.
        return PartRecord(labels, {"skipped": skipped, "sizes": sorted(sizes)[:2]})

    work.write(part, COLUMNS, samples(), record, settings.compression)


def _archive(file: ImageFile) -> Path | None:
    return None if file.position is None else file.path


def _convert(
    files: Sequence[ImageFile], settings: Settings
) -> Iterator[tuple[ImageFile, Converted]]:
    """Read and convert images, in order; an archive is opened once."""
    for path, group in groupby(
        files, key=lambda file: file.path if file.position is not None else None
    ):
        members = list(group)
        if path is None:
            for file in members:
                yield file, convert_file(file.path, file.name, settings.image_size)
        elif path.suffix == ".parquet":
            rows = [file.position for file in members if file.position is not None]
            images = read_rows(path, rows, settings.image_column)
            for file, data in zip(members, images, strict=True):
                yield file, convert_image(data or b"", file.name, settings.image_size)
        else:
            with open(path, "rb") as tar:
                for file in members:
                    tar.seek(file.position or 0)
                    data = tar.read(file.num_bytes)
                    yield file, convert_image(data, file.name, settings.image_size)


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


def read_classes(path: Path) -> tuple[str, ...]:
    """Names of classes: of an MDS folder, or of a text file with one per line.

    Raises: DataError.
    """
    if (path / MANIFEST_NAME).is_file():
        return parse_manifest((path / MANIFEST_NAME).read_text(), str(path)).classes
    if not path.is_file():
        raise DataError(f"--classes: {path} is neither a text file nor a finished MDS folder")
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        what = f"names {twice[0]!r} twice" if twice else "is empty"
        raise DataError(f"--classes: {path} {what}: one name per line, each once")
    return tuple(names)


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        prog="python data_tools/images_to_mds.py",
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
