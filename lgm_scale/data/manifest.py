"""What an MDS folder holds: `manifest.json` beside the shards, and the checks made with it.

The manifest says what the shards cannot: which of our kinds of data they are, the names of the
classes and how many samples each has, and the hashes of the files beside the shards; the shards'
own are in `index.json`. `labels.npy` has the label of every sample, in order, so that a class
can be chosen without reading the shards. What does not fit is refused with a way out. No torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from lgm_scale.errors import DataError
from lgm_scale.storage.files import folder_aside, write_whole

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.json"
LABELS_NAME = "labels.npy"
COLUMNS = {
    "images": frozenset({"image", "label"}),
    "latents": frozenset({"latents", "latents_flipped", "label"}),
    "spatial_latents": frozenset({"mean", "std", "mean_flipped", "std_flipped", "label"}),
}
MORE_COLUMNS = {"latents": frozenset({"features", "features_flipped"})}
"""Columns that data of a kind may have besides: all of them or none."""
FEATURE_DIM = "feature_dim"
"""Entry of a manifest's `extra`: channels of the features, where there are any."""
_MAKE = {
    "images": "python data_tools/images_to_mds.py SRC --out {folder}",
    "latents": "composer data_tools/encode_latents.py --tokenizer BUNDLE --images MDS "
    "--out {folder} (and --features, for objective.feature_alignment)",
    "spatial_latents": "composer data_tools/encode_latents.py --encoder sd-vae --vae FOLDER "
    "--images MDS --out {folder}",
}
# What to do about one kind (second) where another one (first) is needed.
_INSTEAD = {
    ("latents", "images"): (
        "Encode training images first: composer data_tools/encode_latents.py (see --help)."
    ),
    ("latents", "spatial_latents"): (
        "These are latents on a grid, of an autoencoder; a sequence of latents is needed: encode "
        "with --encoder lgm and a tokenizer."
    ),
    ("spatial_latents", "images"): (
        "Encode training images first: composer data_tools/encode_latents.py --encoder sd-vae "
        "(see --help)."
    ),
    ("spatial_latents", "latents"): (
        "These are sequences of latents, of a tokenizer; latents on a grid are needed: encode with "
        "--encoder sd-vae."
    ),
}


@dataclass(frozen=True)
class Manifest:
    """Contents of an MDS folder.

    Args:
        kind: "images", "latents" (a sequence each) or "spatial_latents" (a grid each).
        classes: Names of the classes; label i is `classes[i]`.
        class_counts: How many samples each class has, in the same order.
        image_size: Side of every (square) image in pixels; None where sizes differ.
        extra: Whatever the command that wrote the folder wants to remember (JSON values).
        files: SHA-256 of every file of the folder that is no shard; empty in an old folder.
    """

    kind: str
    num_samples: int
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    image_size: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def columns_of(manifest: Manifest) -> frozenset[str]:
    """Names of the columns that the shards of a folder have, as its manifest says."""
    more = MORE_COLUMNS.get(manifest.kind, frozenset()) if FEATURE_DIM in manifest.extra else ()
    return COLUMNS[manifest.kind].union(more)


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> Path:
    """Write `manifest.json` into `folder`; it is whole or absent. Returns its path."""
    path = Path(folder) / MANIFEST_NAME
    write_whole(path, json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n")
    return path


def read_manifest(folder: str | os.PathLike[str], kind: str) -> Manifest:
    """Read and check the manifest of an MDS folder, which must be of `kind`, a key of COLUMNS.

    Raises: DataError if the folder is missing, empty, damaged, of another kind, or if its
        manifest and its shards disagree.
    """
    folder = Path(folder)
    fix = f"Make it with: {_MAKE[kind].format(folder=folder)}"
    shards = read_index(folder, kind, fix)
    for shard in shards:
        check_columns(shard.get("column_names", ()), kind, str(folder))
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DataError(
            f"{path} is missing: the folder holds MDS shards of {kind} but not the names of their "
            f"classes. {fix}"
        )
    manifest = parse_manifest(path.read_text(errors="replace"), str(path), fix)
    if manifest.kind != kind:
        raise DataError(f"{path} says kind {manifest.kind!r}, but {kind!r} is needed here. {fix}")
    wanted = columns_of(manifest)
    if any(set(shard.get("column_names", ())) != wanted for shard in shards):
        raise DataError(
            f"{path} and {folder / INDEX_NAME} do not belong together: shards have other columns "
            f"than {sorted(wanted)}. Delete the folder. {fix}"
        )
    num_indexed = sum(int(shard["samples"]) for shard in shards)
    if num_indexed != manifest.num_samples or sum(manifest.class_counts) != num_indexed:
        raise DataError(
            f"{path} counts {manifest.num_samples} samples ({sum(manifest.class_counts)} over its "
            f"classes), but {folder / 'index.json'} counts {num_indexed}: they do not belong "
            f"together. Delete the folder. {fix}"
        )
    if num_indexed == 0:
        raise DataError(f"{folder} holds 0 samples: at least 1 is needed. {fix}")
    return manifest


def check_columns(columns: Any, kind: str, where: str) -> None:
    """Raise DataError unless MDS shards have the columns of `kind`."""
    if set(columns) - MORE_COLUMNS.get(kind, frozenset()) == COLUMNS[kind]:
        return
    found = next((name for name, known in COLUMNS.items() if known == set(columns)), None)
    what = found or f"columns {sorted(columns)}"
    hint = _INSTEAD.get((kind, found or ""), f"Make it with: {_MAKE[kind].format(folder='OUT')}")
    raise DataError(
        f"{where} holds {what}, but {kind} (columns {sorted(COLUMNS[kind])}) are needed here. "
        f"{hint}"
    )


def check_shards(folder: str | os.PathLike[str]) -> None:
    """Raise DataError for a shard file that is missing or has the wrong size.

    The streaming library would end an epoch early, and silently, at such a shard. Only for
    folders that are complete on this machine, not for a cache that fills up as training goes.
    """
    folder = Path(folder)
    for shard in read_index(folder):
        files = [info for info in (shard.get("raw_data"), shard.get("zip_data")) if info]
        sizes = [
            (folder / info["basename"]).stat().st_size
            if (folder / info["basename"]).is_file()
            else None
            for info in files
        ]
        if any(size == info["bytes"] for size, info in zip(sizes, files, strict=True)):
            continue
        name, wanted = files[0]["basename"], files[0]["bytes"]
        found = "is missing" if sizes[0] is None else f"has {sizes[0]} bytes instead of {wanted}"
        raise DataError(
            f"{folder / name} {found}, but index.json lists it: the copy is incomplete. "
            f"Copy {folder.name} again or make it anew."
        )


@contextmanager
def written_aside(
    folder: str | os.PathLike[str], own_names: tuple[str, ...], command: str
) -> Iterator[Path]:
    """Yield an empty folder to write into; it becomes `folder` if nothing goes wrong.

    `folder` must be absent or empty. What an interrupted run of the command left aside is deleted
    only if all its names match `own_names`, patterns of those that the command itself writes.

    Raises: DataError if either folder holds something else.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder} exists and is not a finished result of {command} with these arguments: it "
            "is never overwritten. Choose another folder, or delete this one."
        )
    aside = folder.with_name(f"{folder.name}.partial")
    if aside.exists():
        names = sorted(os.listdir(aside)) if aside.is_dir() else [aside.name]
        foreign = [name for name in names if not any(fnmatch(name, own) for own in own_names)]
        if foreign:
            raise DataError(
                f"{aside} is where {command} writes first, but it holds {foreign[0]!r}, which is "
                "not from there. Move it away."
            )
    yield folder_aside(folder)
    aside.replace(folder)


def read_index(folder: Path, kind: str = "images", fix: str = "") -> list[dict[str, Any]]:
    """List the shards of an MDS folder, as its index describes them.

    `kind` and `fix`, what to do about a bad folder, are for messages.

    Raises: DataError if there is no index, or a damaged one.
    """
    if not folder.exists():
        raise DataError(f"{folder} does not exist: an MDS folder of {kind} is needed. {fix}")
    path = folder / INDEX_NAME
    if not path.is_file():
        nested = sorted(child.parent.name for child in folder.glob("*/index.json"))
        hint = f"Did you mean {folder / nested[0]}?" if nested else fix
        what = "is not a folder" if not folder.is_dir() else "has no index.json"
        raise DataError(f"{folder} {what}: an MDS folder of {kind} is needed. {hint}")
    try:
        shards = json.loads(path.read_text())["shards"]
        return [{**shard, "samples": int(shard["samples"])} for shard in shards]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not an index of MDS shards ({error}). Delete the folder. {fix}"
        ) from error


def read_labels(folder: str | os.PathLike[str], manifest: Manifest) -> np.ndarray:
    """Label of every sample, in order: [num_samples] int64.

    Raises: DataError if they are missing or do not fit the manifest.
    """
    path = Path(folder) / LABELS_NAME
    fix = f"Make it anew: {_MAKE[manifest.kind].format(folder=folder)}"
    if not path.is_file():
        raise DataError(f"{path} is missing: without it no class can be chosen. {fix}")
    try:
        labels = np.load(path, allow_pickle=False).astype(np.int64)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}). {fix}") from error
    if (
        labels.ndim == 1
        and len(labels)
        and 0 <= labels.min() <= labels.max() < len(manifest.classes)
    ):
        counts = np.bincount(labels, minlength=len(manifest.classes))
        if counts.tolist() == list(manifest.class_counts):
            return labels
    raise DataError(f"{path} does not fit {MANIFEST_NAME}: other counts of the classes. {fix}")


def parse_manifest(text: str, path: str, fix: str = "") -> Manifest:
    """Parse the contents of a `manifest.json`; `path` is for messages. Raises: DataError."""
    try:
        values = json.loads(text)
        size = values["image_size"]
        manifest = Manifest(
            kind=str(values["kind"]),
            num_samples=int(values["num_samples"]),
            classes=tuple(str(name) for name in values["classes"]),
            class_counts=tuple(int(count) for count in values["class_counts"]),
            image_size=None if size is None else int(size),
            extra=dict(values["extra"]),
            files={str(k): str(v) for k, v in values.get("files", {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete the folder. {fix}"
        ) from error
    if manifest.kind not in COLUMNS:
        raise DataError(
            f"{path} says kind {manifest.kind!r}, which this version does not know (it knows "
            f"{', '.join(COLUMNS)}). Update lgm_scale, or make the data set anew"
        )
    if len(manifest.classes) != len(manifest.class_counts):
        raise DataError(
            f"{path} names {len(manifest.classes)} classes but counts "
            f"{len(manifest.class_counts)}: one count per class. Delete the folder. {fix}"
        )
    return manifest
