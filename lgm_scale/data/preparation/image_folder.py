"""The listing of a source of images, and how a folder SRC/<class>/<image> is listed.

Only names and sizes are looked at here. The order of a listing decides which shard an image lands
in, so it must not depend on the disk: names are compared in one Unicode form and sorted.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lgm_scale.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


@dataclass(frozen=True)
class ImageFile:
    """One image of a source.

    Args:
        path: File of the image, or the archive that holds it.
        name: Name of the image relative to the source.
        num_bytes: Size of the encoded image; for a row of a Parquet file an estimate.
        position: Byte of a tar file where the image begins, or its row in a Parquet file; None for
            a file of its own.
    """

    path: Path
    name: str
    label: int
    num_bytes: int
    position: int | None = None


@dataclass(frozen=True)
class ImageListing:
    """The images of a source, in the order in which shards will hold them.

    Args:
        classes: Names of the classes; label i is `classes[i]`.
        num_ignored: Files of the source that are not images.
    """

    classes: tuple[str, ...]
    files: tuple[ImageFile, ...]
    num_ignored: int

    def fingerprint(self) -> str:
        """Hash the class names and every image's relative name, size and label.

        It tells whether a source has changed without reading an image.
        """
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for file in self.files:
            line = f"{file.name}\0{file.num_bytes}\0{file.label}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()


def class_index(found: Sequence[str], classes: Sequence[str], source: str | Path) -> dict[str, int]:
    """Label of each class name. Raises: DataError if the source has a class not in `classes`."""
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DataError(f"{source} has a class {unknown[0]!r} that --classes does not name")
    return {name: label for label, name in enumerate(classes)}


def list_image_folder(source: Path) -> ImageListing:
    """List SRC/<class>/<image> in sorted order.

    Hidden files are passed over; other files that are no images are counted.

    Raises: DataError for anything that is not such a folder.
    """
    if not source.is_dir():
        what = "is not a folder" if source.exists() else "does not exist"
        raise DataError(f"{source} {what}: give a folder with one sub-folder of images per class")
    entries = _visible(source)
    loose = [name for name, entry in entries if entry.is_file()]
    loose_images = [name for name in loose if is_image_name(name)]
    if loose_images:
        raise DataError(
            f"{source} holds {len(loose_images)} images directly (such as {loose_images[0]}): "
            "every image must lie in the sub-folder of its class, SRC/<class>/<image>"
        )
    folders = [(name, entry) for name, entry in entries if entry.is_dir()]
    if not folders:
        found = f"only files such as {loose[0]}" if loose else "nothing"
        raise DataError(f"{source} holds {found}: one sub-folder of images per class is needed")
    _check_class_names(source, [name for name, _ in folders])
    files: list[ImageFile] = []
    num_ignored = len(loose)
    for label, (class_name, folder) in enumerate(folders):
        found_files, ignored = _list_class(Path(folder.path), class_name, label)
        files.extend(found_files)
        num_ignored += ignored
    return ImageListing(tuple(name for name, _ in folders), tuple(files), num_ignored)


def _visible(folder: Path) -> list[tuple[str, os.DirEntry[str]]]:
    """List (NFC name, entry) of what is not hidden, sorted by name."""
    with os.scandir(folder) as entries:
        named = [(unicodedata.normalize("NFC", entry.name), entry) for entry in entries]
    return sorted(
        (pair for pair in named if not pair[0].startswith(".")),
        key=lambda pair: (pair[0], pair[1].name),
    )


def is_image_name(name: str) -> bool:
    """Whether a file name ends like that of an image."""
    return name.lower().endswith(SUFFIXES)


def _check_class_names(source: Path, names: list[str]) -> None:
    """Raise DataError if two class names differ only in case or Unicode form."""
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name.casefold())
        if key in seen:
            raise DataError(
                f"{source} holds two class folders of one name, {seen[key]!r} and {name!r} (equal "
                "up to case or Unicode form): rename one or put their images together"
            )
        seen[key] = name


def _list_class(folder: Path, class_name: str, label: int) -> tuple[list[ImageFile], int]:
    """List the images of one class, and count what is not an image."""
    files = []
    num_ignored = 0
    nested = None
    for name, entry in _visible(folder):
        if entry.is_dir():
            nested = nested or name
        elif is_image_name(name):
            relative = f"{class_name}/{name}"
            size = os.stat(entry.path).st_size if os.path.exists(entry.path) else 0
            files.append(ImageFile(Path(entry.path), relative, label, size))
        else:
            num_ignored += 1
    if nested is not None:
        raise DataError(
            f"class folder {folder} holds another folder, {nested!r}: images must lie at "
            "SRC/<class>/<image>. Is SRC the folder above the one with the classes "
            "(give SRC/train, for instance)?"
        )
    if not files:
        raise DataError(
            f"class folder {folder} holds no image ({', '.join(SUFFIXES)}): delete it, or put the "
            "images of its class there"
        )
    return files, num_ignored
