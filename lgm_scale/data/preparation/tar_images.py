"""Images in tar files, read where they lie: nothing is unpacked.

Three forms: a tar of one tar per class (ILSVRC's training set), a tar with a folder per class, and
a flat tar (ILSVRC's validation set), whose classes come from a list.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from lgm_scale.data.preparation.image_folder import (
    ImageFile,
    ImageListing,
    class_index,
    is_image_name,
)
from lgm_scale.errors import DataError


def list_tar(
    path: Path, labels: dict[str, str] | list[str] | None, classes: tuple[str, ...] | None
) -> ImageListing:
    """List the images of a tar file: by class, and by name within a class or a flat file.

    `labels` are, for a flat tar, the class of each file by its name without suffix, or the classes
    of all files in sorted order. `classes` are in the order of the labels; None for those found,
    sorted.

    Raises: DataError for a file that is damaged or compressed, mixes both forms or holds no image.
    """
    try:
        found, num_ignored = _scan(path)
    except tarfile.TarError as error:
        raise DataError(
            f"{path} cannot be read as an uncompressed tar file ({error}): it is damaged or "
            "compressed. Compare it with its published checksum, or unpack the compression"
        ) from error
    flat = [entry for entry in found if entry[0] is None]
    if flat and len(flat) < len(found):
        raise DataError(
            f"{path} holds images with and without a class folder (such as {flat[0][1]}): pack "
            "every image in the folder of its class"
        )
    if not found:
        raise DataError(f"{path} holds no image")
    if flat:
        found = _with_classes(path, found, labels)
    elif labels is not None:
        raise DataError(f"--labels: has no effect, {path} has classes of its own; drop it")
    names = tuple(sorted({str(entry[0]) for entry in found}))
    known = classes or names
    index = class_index(names, known, path)
    files = [
        ImageFile(path, name, index[str(group)], size, offset)
        for group, name, offset, size in found
    ]
    if not flat:
        files.sort(key=lambda file: (file.label, file.name))
    return ImageListing(known, tuple(files), num_ignored)


Entry = tuple[str | None, str, int, int]  # class, name, offset, bytes


def _scan(path: Path) -> tuple[list[Entry], int]:
    found: list[Entry] = []
    num_ignored = 0
    with tarfile.open(path, "r:") as outer:
        for member in tqdm(outer, desc=f"list {path.name}", unit="entry", leave=False):
            if not member.isfile():
                continue
            if member.name.endswith(".tar"):
                group = Path(member.name).stem
                inner = list(_scan_inner(outer, member, group))
                if not inner:
                    raise DataError(f"{path}: {member.name} holds no image")
                found += inner
            elif is_image_name(member.name):
                parts = member.name.removeprefix("./").split("/")
                group = parts[-2] if len(parts) > 1 else None
                name = "/".join(parts[-2:])
                found.append((group, name, member.offset_data, member.size))
            else:
                num_ignored += 1
    if all(group is None for group, *_ in found):
        found.sort(key=lambda entry: entry[1])
    return found, num_ignored


def _scan_inner(outer: tarfile.TarFile, member: tarfile.TarInfo, group: str) -> Iterator[Entry]:
    with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
        for image in inner:
            if image.isfile() and is_image_name(image.name):
                name = f"{group}/{Path(image.name).name}"
                yield group, name, member.offset_data + image.offset_data, image.size


def _with_classes(
    path: Path, found: list[Entry], labels: dict[str, str] | list[str] | None
) -> list[Entry]:
    """Give the images of a flat tar their classes."""
    if labels is None:
        raise DataError(
            f"{path} holds images without class folders (such as {found[0][1]}): name the list of "
            "their classes with --labels"
        )
    if isinstance(labels, list):
        if len(labels) != len(found):
            raise DataError(
                f"--labels lists {len(labels):,} classes, but {path} holds {len(found):,} images: "
                "one class for each is needed, in the order of the images' names"
            )
        return [(group, *rest) for group, (_, *rest) in zip(labels, found, strict=True)]  # type: ignore[misc]
    missing = [name for _, name, *_ in found if Path(name).stem not in labels]
    if missing:
        raise DataError(f"--labels has no class for {missing[0]} of {path}")
    return [(labels[Path(name).stem], name, *rest) for _, name, *rest in found]  # type: ignore[misc]


def read_labels_file(path: Path, classes: tuple[str, ...] | None) -> dict[str, str] | list[str]:
    """Read a list of classes: `class` per line, or `file class` (also `file,class ...`).

    A number is an index of `classes`, from 0.

    Raises: DataError for a number outside of the classes, or without any.
    """
    if not path.is_file():
        raise DataError(f"--labels: {path} is no file")
    rows = [
        re.split(r"[,\s]+", line.strip())
        for line in path.read_text(errors="replace").splitlines()
        if line
    ]
    if rows and rows[0][0].lower() in ("imageid", "file", "filename"):
        rows = rows[1:]
    if not rows:
        raise DataError(f"--labels: {path} is empty")
    if all(len(row) == 1 for row in rows):
        return [_class_name(path, row[0], classes) for row in rows]
    short = [i for i, row in enumerate(rows) if len(row) < 2]
    if short:
        raise DataError(f"--labels: line {short[0] + 1} of {path} has no class")
    return {Path(row[0]).stem: _class_name(path, row[1], classes) for row in rows}


def _class_name(path: Path, text: str, classes: tuple[str, ...] | None) -> str:
    if not re.fullmatch(r"-?\d+", text) or (classes is not None and text in classes):
        return text
    if classes is None:
        raise DataError(
            f"--labels: {path} has numbers ({text}): name the classes that they count, from 0, "
            "with --classes. (ILSVRC's own ground truth counts from 1, in another order than "
            "that of the names; use a list with names such as n01440764)"
        )
    if not 0 <= int(text) < len(classes):
        raise DataError(
            f"--labels: {path} has label {text}, outside of the {len(classes)} classes of "
            f"--classes (0 to {len(classes) - 1})"
        )
    return classes[int(text)]
