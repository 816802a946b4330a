"""One listing for whatever holds images: a folder, a tar file or Parquet files.

Which it is follows from the path alone; each form has its own reader beside this file.
"""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path

from lgm_scale.data.manifest import MANIFEST_NAME, parse_manifest
from lgm_scale.data.preparation.image_folder import ImageListing, class_index, list_image_folder
from lgm_scale.data.preparation.parquet_images import list_parquet
from lgm_scale.data.preparation.tar_images import list_tar, read_labels_file
from lgm_scale.errors import DataError


def list_source(
    source: str,
    classes: tuple[str, ...] | None = None,
    labels: Path | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> ImageListing:
    """List the images of whatever `source` is, without opening them.

    `classes` names all, where the source has only some of them or only numbers; `labels` is a file
    that lists the classes of a tar file without class folders.

    Raises: DataError naming what the source lacks, or the option that does not go with it.
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
    if classes is None:
        return folder
    index = class_index(folder.classes, classes, source)
    files = (replace(file, label=index[folder.classes[file.label]]) for file in folder.files)
    return ImageListing(classes, tuple(files), folder.num_ignored)


def read_classes(path: Path) -> tuple[str, ...]:
    """Read the names of classes from a finished MDS folder, or from a text file, one per line.

    Raises: DataError if `path` is neither, or names no class, or one twice.
    """
    if (path / MANIFEST_NAME).is_file():
        return parse_manifest((path / MANIFEST_NAME).read_text(errors="replace"), str(path)).classes
    if not path.is_file():
        raise DataError(f"--classes: {path} is neither a text file nor a finished MDS folder")
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"--classes: {path} is no text file; one name per line") from None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        what = f"names {twice[0]!r} twice" if twice else "is empty"
        raise DataError(f"--classes: {path} {what}: one name per line, each once")
    return tuple(names)
