"""Fashion-MNIST as its authors publish it: four IDX files, found on this machine and read.

60,000 training and 10,000 validation images of 28 x 28 pixels, ten classes, MIT licence. Each is
padded with black to 32 x 32. Nothing is downloaded here. No torch.

Source: Xiao, Rasul and Vollgraf 2017, Fashion-MNIST.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lgm_scale.errors import DataError

PUBLISHED = (
    "t_shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle_boot",
)  # fmt: skip
"""The classes by their numbers in the files."""
CLASSES = tuple(sorted(PUBLISHED))
"""The classes in the order of our labels: that of a folder per class."""
IMAGE_SIZE = 32
SPLITS = {"train": "train", "val": "t10k"}
"""What we call a split, and what its files begin with."""
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where the package dataset-fashion-mnist of Debian and Ubuntu puts the four files."""
_UINT8 = 8  # an IDX file's third byte


class LabelledImages(NamedTuple):
    """One split, in the order of its files.

    Shapes: images uint8 [M, 32, 32], labels int64 [M], indices of CLASSES. `sha256` is over the
    contents of both files, however they are compressed.
    """

    images: np.ndarray
    labels: np.ndarray
    sha256: str


def read_split(folder: Path, split: str) -> LabelledImages:
    """Read the images and labels of "train" or "val", padded and with our labels.

    Raises: DataError if a file is missing or damaged, or both do not belong together.
    """
    stem = SPLITS[split]
    images_path = _find(folder, f"{stem}-images-idx3-ubyte")
    labels_path = _find(folder, f"{stem}-labels-idx1-ubyte")
    total = hashlib.sha256()
    pixels, published = _read_idx(images_path, 3, total), _read_idx(labels_path, 1, total)
    if len(pixels) != len(published):
        raise DataError(
            f"{images_path} holds {len(pixels)} images and {labels_path} {len(published)} labels: "
            "they do not belong together; get both again"
        )
    if not len(published) or published.max() >= len(PUBLISHED):
        found = f"label {published.max()}" if len(published) else "no label"
        raise DataError(f"{labels_path} has {found}: 0 to {len(PUBLISHED) - 1} are needed")
    height, width = pixels.shape[1:]
    if max(height, width) > IMAGE_SIZE:
        raise DataError(
            f"{images_path} holds images of {width} x {height}, which do not fit into {IMAGE_SIZE} "
            f"x {IMAGE_SIZE}: these are not Fashion-MNIST's"
        )
    room = [IMAGE_SIZE - side for side in (height, width)]
    pixels = np.pad(pixels, [(0, 0), *((r // 2, r - r // 2) for r in room)])
    ours = np.array([CLASSES.index(name) for name in PUBLISHED])
    return LabelledImages(pixels, ours[published], total.hexdigest())


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise DataError(
        f"{folder / name}.gz is missing: as root `apt-get install dataset-fashion-mnist` (Debian, "
        "Ubuntu) puts Fashion-MNIST where it is looked for; else name a folder with the four files "
        "with --source, or let --download get them"
    )


def _read_idx(path: Path, num_dims: int, total: hashlib._Hash) -> np.ndarray:
    """Read an IDX file of bytes, and hash its contents. Raises: DataError."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): get it again") from error
    total.update(data)
    start = 4 + 4 * num_dims
    shape = np.frombuffer(data[4:start], ">u4").tolist()
    if data[:4] != bytes([0, 0, _UINT8, num_dims]) or len(data) != start + np.prod(shape):
        raise DataError(f"{path} is no IDX file of {num_dims} dimensions, or is cut: get it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
