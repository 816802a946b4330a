"""Check a data set of MDS shards, local or in object storage, against what its manifest says.

    python data_tools/verify_mds.py FOLDER

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from streaming.base.compression import decompress
from streaming.base.format import reader_from_json
from tqdm import tqdm

from lgm_scale.data.images import decode_image
from lgm_scale.data.manifest import (
    COLUMNS,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    parse_manifest,
    read_index,
    read_labels,
)
from lgm_scale.errors import ConfigError, DataError, exit_on_user_error
from lgm_scale.storage.clients import is_remote
from lgm_scale.storage.files import file_hash
from lgm_scale.storage.transfer import (
    Expected,
    MissingFileError,
    Patience,
    fetch,
    join,
    shown,
)

__all__ = ["Report", "verify"]

MAX_PER_SHARD = 5  # problems listed of one shard


@dataclass
class Report:
    """What a verification found."""

    manifest: Manifest
    counts: np.ndarray
    num_shards: int
    num_bytes: int
    problems: list[str] = field(default_factory=list)


@dataclass
class _ShardResult:
    labels: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify(location: str, decode: bool = False, num_workers: int = 0) -> Report:
    """Check a data set.

    Args:
        location: a folder, or object storage.
        decode: decode every image, not only its header.
        num_workers: processes; 0 for this one.

    Raises: DataError if there is nothing to check: no manifest, no index.
    """
    with tempfile.TemporaryDirectory(prefix="lgm_scale-verify-") as folder:
        local = Path(folder) if is_remote(location) else Path(location)
        manifest, problems = _beside(location, local)
        shards = read_index(local)
        labels: list[int] = []
        check = partial(_check_shard, location, manifest, decode)
        with (
            _mapper(num_workers) as run,
            tqdm(total=len(shards), desc="verify", unit="shard") as bar,
        ):
            for result in run(check, shards):
                labels += result.labels
                problems += result.problems
                bar.update()
        problems += _check_whole(local, manifest, shards, labels)
    counts = _histogram(labels, manifest)
    size = sum((shard["zip_data"] or shard["raw_data"])["bytes"] for shard in shards)
    return Report(manifest, counts, len(shards), size, problems)


@contextmanager
def _mapper(num_workers: int) -> Iterator[Any]:
    if num_workers == 0:
        yield map
        return
    with ProcessPoolExecutor(num_workers) as pool:
        yield pool.map


def _beside(location: str, local: Path) -> tuple[Manifest, list[str]]:
    """Fetch and check the files beside the shards."""
    patience, problems = Patience(), []
    if is_remote(location):
        fetch(join(location, MANIFEST_NAME), local / MANIFEST_NAME, patience)
    elif not (local / MANIFEST_NAME).is_file():
        raise DataError(f"{local} has no {MANIFEST_NAME}: give a finished MDS folder")
    where = f"{shown(location)}/{MANIFEST_NAME}"
    manifest = parse_manifest((local / MANIFEST_NAME).read_text(), where)
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
) -> _ShardResult:
    """Check one shard, which is fetched and dropped again if it is remote."""
    stored = info["zip_data"] or info["raw_data"]
    name, result = stored["basename"], _ShardResult()
    with tempfile.TemporaryDirectory(prefix="lgm_scale-verify-") as folder:
        path = Path(location, name)
        if is_remote(location):
            path = Path(folder, name)
            try:
                fetch(join(location, name), path, Patience())
            except DataError as error:
                result.problems.append(str(error))
                return result
        if not path.is_file():
            result.problems.append(f"{name} is missing")
            return result
        problem = Expected(stored["bytes"], stored["hashes"]).problem(path)
        if problem is not None:
            result.problems.append(f"{name} {problem}")
        elif "sha256" not in stored["hashes"]:
            result.problems.append(f"{name} has no sha256 in {INDEX_NAME}")
        try:
            _read_samples(path, Path(folder), info, manifest, decode, result)
        except Exception as error:  # damaged bytes raise nearly anything
            result.problems.append(f"{name} cannot be read: {type(error).__name__}: {error}")
    listed = result.problems[:MAX_PER_SHARD]
    if len(result.problems) > len(listed):
        listed.append(f"{name}: and {len(result.problems) - len(listed)} more problems")
    return _ShardResult(result.labels, listed)


def _read_samples(
    path: Path,
    folder: Path,
    info: dict[str, Any],
    manifest: Manifest,
    decode: bool,
    result: _ShardResult,
) -> None:
    name = info["raw_data"]["basename"]
    if info["compression"]:
        raw = folder / name
        raw.write_bytes(decompress(info["compression"], path.read_bytes()))
        problem = Expected(info["raw_data"]["bytes"], info["raw_data"]["hashes"]).problem(raw)
        if problem is not None:
            result.problems.append(f"{name}, decompressed, {problem}")
        path = raw
    columns = set(info["column_names"])
    if columns != COLUMNS[manifest.kind]:
        result.problems.append(f"{name} has columns {sorted(columns)}")
        return
    reader = reader_from_json(str(path.parent), None, info)
    for index in range(len(reader)):
        sample = reader[index]
        label = int(sample["label"])
        result.labels.append(label)
        if not 0 <= label < manifest.num_classes:
            result.problems.append(
                f"{name}, sample {index}: label {label} outside of {manifest.num_classes} classes"
            )
        problem = _CHECKS[manifest.kind](sample, manifest, decode)
        if problem is not None:
            result.problems.append(f"{name}, sample {index}: {problem}")


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


def _check_latents(sample: dict[str, Any], manifest: Manifest, decode: bool) -> str | None:
    shape = (manifest.extra.get("num_base_tokens"), manifest.extra.get("latent_dim"))
    return _check_arrays({name: sample[name] for name in ("latents", "latents_flipped")}, shape)


def _check_grids(sample: dict[str, Any], manifest: Manifest, decode: bool) -> str | None:
    side = manifest.extra.get("side")
    shape = (manifest.extra.get("channels"), side, side)
    grids = {name: value for name, value in sample.items() if name != "label"}
    problem = _check_arrays(grids, shape)
    if problem is not None:
        return problem
    for name in ("std", "std_flipped"):
        if (grids[name] < 0).any():
            return f"{name} has {int((grids[name] < 0).sum())} values below 0"
    return None


def _check_arrays(arrays: dict[str, np.ndarray], shape: tuple[Any, ...]) -> str | None:
    for name, value in arrays.items():
        if value.dtype != np.float16 or value.shape != shape:
            return f"{name} is {value.dtype} {value.shape}, the manifest says float16 {shape}"
        if not np.isfinite(value).all():
            return f"{name} has {int((~np.isfinite(value)).sum())} values that are not finite"
    return None


_CHECKS = {"images": _check_image, "latents": _check_latents, "spatial_latents": _check_grids}


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
    for name, found, wanted in zip(
        manifest.classes, counts.tolist(), manifest.class_counts, strict=False
    ):
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
        prog="python data_tools/verify_mds.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default_workers = min(8, os.cpu_count() or 1)
    parser.add_argument("folder", metavar="FOLDER", help="MDS folder, local or s3://..., gs://...")
    parser.add_argument("--decode", action="store_true", help="decode every image")
    parser.add_argument("--histogram", action="store_true", help="print the count of every class")
    parser.add_argument(
        "--workers",
        type=int,
        default=default_workers,
        help=f"processes, 0 for none (default: {default_workers})",
    )
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
