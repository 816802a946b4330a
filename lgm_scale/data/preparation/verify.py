"""Check a data set of MDS shards, local or in object storage, against what its manifest says.

    python -m lgm_scale.data.preparation.verify FOLDER

Every shard: size and hash, the number of its samples, types, shapes, labels; latents for values
that are not finite; images for their size, with --decode for every pixel. The whole: counts,
labels, the histogram of the classes, the hashes of the files beside the shards, and for latents
that every image is there once. Nothing is changed. Exit status 1 and a list if anything is wrong.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from lgm_scale.data.decoding import decode_image
from lgm_scale.data.manifest import (
    FEATURE_DIM,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    columns_of,
    parse_manifest,
    read_index,
    read_labels,
)
from lgm_scale.errors import ConfigError, DataError, exit_on_user_error
from lgm_scale.storage.clients import is_remote
from lgm_scale.storage.files import file_hash
from lgm_scale.storage.transfer import Expected, MissingFileError, Patience, fetch, join, shown

MAX_PER_SHARD = 5  # problems listed of one shard
# Entries of the manifest that say the shape of an array, by the kind of the data set.
_SHAPES = {
    "latents": ("num_base_tokens", "latent_dim"),
    "spatial_latents": ("channels", "side", "side"),
}


@dataclass
class Report:
    """What a verification found.

    Args:
        counts: Samples of each class that were found: [num_classes] int64.
        num_bytes: Bytes of these shards as they are stored.
    """

    manifest: Manifest
    counts: np.ndarray
    num_shards: int
    num_bytes: int
    problems: list[str] = field(default_factory=list)


def verify(location: str, decode: bool = False, num_workers: int = 0) -> Report:
    """Check a data set in a folder or in object storage.

    0 workers read in this process. `decode` decodes every image, not only its header.

    Raises: DataError if there is nothing to check: no manifest, no index.
    """
    pool = ProcessPoolExecutor(num_workers) if num_workers else None
    with pool or nullcontext(), tempfile.TemporaryDirectory(prefix="lgm_scale-verify-") as folder:
        local = Path(folder) if is_remote(location) else Path(location)
        manifest, problems = _beside(location, local)
        shards = read_index(local)
        labels: list[int] = []
        check = partial(_check_shard, location, manifest, decode)
        run = map if pool is None else pool.map
        for found, wrong in tqdm(run(check, shards), "verify", len(shards), unit="shard"):
            labels += found
            problems += wrong
        problems += _check_whole(local, manifest, shards, labels)
    counts = _histogram(labels, manifest)
    size = sum((shard["zip_data"] or shard["raw_data"])["bytes"] for shard in shards)
    return Report(manifest, counts, len(shards), size, problems)


def _beside(location: str, local: Path) -> tuple[Manifest, list[str]]:
    """Fetch and check the files beside the shards."""
    patience, problems = Patience(), []
    if is_remote(location):
        fetch(join(location, MANIFEST_NAME), local / MANIFEST_NAME, patience)
    elif not (local / MANIFEST_NAME).is_file():
        raise DataError(f"{local} has no {MANIFEST_NAME}: give a finished MDS folder")
    where = f"{shown(location)}/{MANIFEST_NAME}"
    manifest = parse_manifest((local / MANIFEST_NAME).read_text(errors="replace"), where)
    for name in {INDEX_NAME: None, **manifest.files}:
        try:
            if is_remote(location):
                fetch(join(location, name), local / name, patience)
        except MissingFileError as error:
            problems.append(str(error))
            continue
        if not (local / name).is_file():
            problems.append(f"{name} is missing")
        elif name in manifest.files and file_hash(local / name) != manifest.files[name]:
            problems.append(f"{name} has another sha256 than the manifest says")
    if not manifest.files:
        problems.append(f"{MANIFEST_NAME} keeps no hashes: made by an older version, make it anew")
    return manifest, problems


def _check_shard(
    location: str, manifest: Manifest, decode: bool, info: dict[str, Any]
) -> tuple[list[int], list[str]]:
    """Labels and problems of one shard, which is fetched and dropped again if it is remote."""
    stored = info["zip_data"] or info["raw_data"]
    name = stored["basename"]
    labels: list[int] = []
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="lgm_scale-verify-") as folder:
        path = Path(location, name)
        if is_remote(location):
            path = Path(folder, name)
            try:
                fetch(join(location, name), path, Patience())
            except DataError as error:
                return labels, [str(error)]
        if not path.is_file():
            return labels, [f"{name} is missing"]
        problem = Expected(stored["bytes"], stored["hashes"]).problem(path)
        if problem is not None:
            problems.append(f"{name} {problem}")
        elif "sha256" not in stored["hashes"]:
            problems.append(f"{name} has no sha256 in {INDEX_NAME}")
        try:
            for problem in _check_samples(path, Path(folder), info, manifest, decode, labels):
                problems.append(problem)  # one by one: those before an exception count as well
        except Exception as error:  # damaged bytes raise nearly anything
            problems.append(f"{name} cannot be read: {type(error).__name__}: {error}")
    if len(problems) > MAX_PER_SHARD:
        more = f"{name}: and {len(problems) - MAX_PER_SHARD} more problems"
        problems = [*problems[:MAX_PER_SHARD], more]
    return labels, problems


def _check_samples(
    path: Path,
    folder: Path,
    info: dict[str, Any],
    manifest: Manifest,
    decode: bool,
    labels: list[int],
) -> Iterator[str]:
    """Problems of the samples of a shard; their labels are added to `labels`."""
    from streaming.base.compression import decompress  # late: importing it takes five seconds
    from streaming.base.format import reader_from_json

    name = info["raw_data"]["basename"]
    if info["compression"]:
        raw = folder / name
        raw.write_bytes(decompress(info["compression"], path.read_bytes()))
        problem = Expected(info["raw_data"]["bytes"], info["raw_data"]["hashes"]).problem(raw)
        if problem is not None:
            yield f"{name}, decompressed, {problem}"
        path = raw
    columns = set(info["column_names"])
    if columns != columns_of(manifest):
        yield f"{name} has columns {sorted(columns)}"
        return
    reader = reader_from_json(str(path.parent), None, info)
    for index in range(len(reader)):
        sample = reader[index]
        label = int(sample.pop("label"))
        labels.append(label)
        where = f"{name}, sample {index}"
        if not 0 <= label < manifest.num_classes:
            yield f"{where}: label {label} outside of {manifest.num_classes} classes"
        if manifest.kind == "images":
            problem = _check_image(sample, manifest, decode)
        else:
            problem = _check_arrays(sample, manifest)
        if problem is not None:
            yield f"{where}: {problem}"


def _check_image(sample: dict[str, Any], manifest: Manifest, decode: bool) -> str | None:
    try:
        if decode:
            size = decode_image(sample["image"], "image").size
        else:
            with Image.open(io.BytesIO(sample["image"])) as image:
                size = image.size
    except (DataError, OSError) as error:
        return str(error)
    side = manifest.image_size
    if side is not None and size != (side, side):
        return f"image of {size[0]} x {size[1]}, the manifest says {side} x {side}"
    return None


def _check_arrays(arrays: dict[str, np.ndarray], manifest: Manifest) -> str | None:
    keys = _SHAPES[manifest.kind]
    for name, value in arrays.items():
        own = (keys[0], FEATURE_DIM) if name.startswith("features") else keys
        shape = tuple(manifest.extra.get(key) for key in own)
        if value.dtype != np.float16 or value.shape != shape:
            return f"{name} is {value.dtype} {value.shape}, the manifest says float16 {shape}"
        if not np.isfinite(value).all():
            return f"{name} has {int((~np.isfinite(value)).sum())} values that are not finite"
    for name, value in arrays.items():
        if name.startswith("std") and (value < 0).any():
            return f"{name} has {int((value < 0).sum())} values below 0"
    return None


def _check_whole(
    folder: Path, manifest: Manifest, shards: list[dict[str, Any]], labels: list[int]
) -> Iterator[str]:
    indexed = sum(shard["samples"] for shard in shards)
    if not len(labels) == indexed == manifest.num_samples:
        yield (
            f"{len(labels):,} samples were read, {INDEX_NAME} counts {indexed:,}, "
            f"{MANIFEST_NAME} {manifest.num_samples:,}"
        )
    counts = _histogram(labels, manifest)
    counted = zip(manifest.classes, counts.tolist(), manifest.class_counts, strict=False)
    for name, found, wanted in counted:
        if found != wanted:
            yield f"class {name!r} has {found:,} samples, {MANIFEST_NAME} says {wanted:,}"
    try:
        if manifest.files and not np.array_equal(read_labels(folder, manifest), labels):
            yield "labels.npy has other labels than the shards"
    except DataError as error:
        yield str(error)
    coverage = manifest.extra.get("coverage")
    if coverage is not None:
        yield from _check_coverage(coverage, manifest, shards)


def _histogram(labels: list[int], manifest: Manifest) -> np.ndarray:
    """Samples of each class; labels that are no class have been reported."""
    valid = [label for label in labels if 0 <= label < manifest.num_classes]
    return np.bincount(np.asarray(valid, np.int64), minlength=manifest.num_classes)


def _check_coverage(
    coverage: list[list[int]], manifest: Manifest, shards: list[dict[str, Any]]
) -> Iterator[str]:
    """Every image once: the shards' ranges follow each other from 0 to the end."""
    end = 0
    for (start, stop), shard in zip(coverage, shards, strict=False):
        if start != end or stop - start != shard["samples"]:
            yield (
                f"{shard['raw_data']['basename']} holds {shard['samples']} samples, "
                f"{MANIFEST_NAME} says images {start} to {stop} after {end}"
            )
        end = stop
    wanted = manifest.extra.get("images", {}).get("num_samples", manifest.num_samples)
    if len(coverage) != len(shards) or end != wanted:
        yield f"{len(shards)} shards hold images up to {end:,} of {wanted:,}"


def describe(location: str, report: Report) -> str:
    """One line on what is there."""
    counts = report.counts
    spread = f"{counts.min():,} to {counts.max():,} of each (median {int(np.median(counts)):,})"
    found = len(report.problems)
    verdict = f"{found} problem{'s' if found > 1 else ''}" if found else "no problem"
    return (
        f"{shown(location)}: {int(counts.sum()):,} {report.manifest.kind} in {len(counts)} "
        f"classes, {spread}; {report.num_shards} shards, {report.num_bytes / 1e9:.2f} GB; {verdict}"
    )


def main() -> int:
    """Parse the command line and verify."""
    parser = argparse.ArgumentParser(
        prog="python -m lgm_scale.data.preparation.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    workers = min(8, os.cpu_count() or 1)
    workers_help = f"processes, 0 for none (default: {workers})"
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="MDS folder, local or s3://..., gs://...")
    add("--decode", action="store_true", help="decode every image")
    add("--histogram", action="store_true", help="print the count of every class")
    add("--workers", type=int, default=workers, help=workers_help)
    args = parser.parse_args()
    if args.workers < 0:
        raise ConfigError(f"--workers is {args.workers}: it must not be negative")
    report = verify(args.folder, args.decode, args.workers)
    if args.histogram:
        for name, count in zip(report.manifest.classes, report.counts.tolist(), strict=False):
            print(f"{count:>10,}  {name}")
    for problem in report.problems:
        print(problem)
    print(describe(args.folder, report))
    return 1 if report.problems else 0


if __name__ == "__main__":
    exit_on_user_error(main)
