"""Stored images by index: a folder of pictures, an npz of ADM's form, or MDS shards.

All are read when they are asked for and none is kept, so that memory does not grow with the data
set. What identifies a source (`open_source`, `ValidationImages`) becomes part of the protocol of
every number made of it.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lgm_scale.data.decoding import center_crop, decode_image
from lgm_scale.data.images import ImageDataset, planes
from lgm_scale.data.manifest import read_manifest
from lgm_scale.errors import ConfigError, DataError
from lgm_scale.evaluation.engine.parts import from_rank_zero
from lgm_scale.storage.files import file_hash

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class ImageSource(Protocol):
    """Images by index, with labels (0 where there are none)."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, np.ndarray]:
        """Read a batch. Shapes: indices [B] -> uint8 [B, 3, S, S], labels int64 [B]."""
        ...


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` indices (at most all), evenly spaced: a folder is sorted by class."""
    wanted = min(wanted, count)
    return [i * count // wanted for i in range(wanted)]


# --- MDS shards -------------------------------------------------------------------------------


class StoredImages:
    """Images of an MDS folder."""

    def __init__(self, folder: str | Path, image_size: int) -> None:
        self.count = read_manifest(folder, "images").num_samples
        self.dataset = ImageDataset(
            folder, image_size=image_size, train=False, seed=0, batch_size=1
        )

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, np.ndarray]:
        """Read a batch. Shapes: indices [B] -> uint8 [B, 3, S, S], labels int64 [B]."""
        items = [self.dataset[int(index)] for index in indices]
        labels = np.array([int(item["labels"]) for item in items])
        return torch.stack([item["images"] for item in items]), labels

    def batches(self, num_images: int | None = None, batch_size: int = 64) -> Iterator[Tensor]:
        """All images in order, or `num_images` of them evenly spaced: uint8 [B, 3, S, S]."""
        indices = spread(len(self), len(self) if num_images is None else num_images)
        for start in range(0, len(indices), batch_size):
            yield self.read(indices[start : start + batch_size])[0]


class ValidationImages(StoredImages):
    """Images of an MDS folder, and what identifies them; rank 0 hashes the files for all."""

    def __init__(self, folder: str | Path, image_size: int) -> None:
        super().__init__(folder, image_size)
        self.description = {
            "name": "validation images",
            "num_images": len(self),
            "image_size": image_size,
            "files_sha256": from_rank_zero(lambda: _shards_hash(Path(folder))),
        }


def _shards_hash(folder: Path) -> str:
    """SHA-256 over index, manifest and every shard that the index names."""
    index = json.loads((folder / "index.json").read_text())
    names = [
        str((shard.get("zip_data") or shard["raw_data"])["basename"]) for shard in index["shards"]
    ]
    return _files_hash(folder, ["index.json", "manifest.json", *names])


def _files_hash(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 over names and contents of files of a folder, in this order."""
    total = hashlib.sha256()
    for name in names:
        total.update(f"{name} {file_hash(folder / name)}\n".encode())
    return total.hexdigest()


# --- folders and npz --------------------------------------------------------------------------


class FolderImages:
    """Every image below a folder, in the order of their paths, centre-cropped to S x S."""

    def __init__(self, folder: Path, image_size: int) -> None:
        self.folder, self.image_size = folder, image_size
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, np.ndarray]:
        """Read a batch. Raises: DataError naming a broken file.

        Shapes: indices [B] -> uint8 [B, 3, S, S], zeros [B].
        """
        images = []
        for index in indices:
            path = self.paths[int(index)]
            image = center_crop(decode_image(path.read_bytes(), str(path)), self.image_size)
            images.append(planes(image))
        return torch.stack(images), np.zeros(len(images), np.int64)

    def hash(self) -> str:
        """SHA-256 over names and contents of all files."""
        names = (str(path.relative_to(self.folder)) for path in self.paths)
        return _files_hash(self.folder, names)


class NpzImages:
    """`arr_0` of an npz, mapped into memory: ADM's references are larger than that.

    Raises: DataError if the npz holds no images, or holds them compressed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        shape = npz_images_shape(path)
        if shape is None:
            raise DataError(f"{path} holds no images (arr_0)")
        self.images = np.memmap(path, np.uint8, "r", _data_offset(path), shape)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, np.ndarray]:
        """Read a batch. Shapes: indices [B] -> uint8 [B, 3, S, S], zeros [B]."""
        rows = self.images[np.asarray([int(index) for index in indices])]
        pixels = np.ascontiguousarray(rows.transpose(0, 3, 1, 2))
        return torch.from_numpy(pixels), np.zeros(len(pixels), np.int64)


def npz_images_shape(path: Path) -> tuple[int, int, int, int] | None:
    """Shape of `arr_0` [M, S, S, 3] of an npz, without reading the images; None if it has none.

    Raises: ValueError if `arr_0` holds no square uint8 images.
    """
    with zipfile.ZipFile(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            return None
        with archive.open("arr_0.npy") as file:
            shape, order, dtype = _npy_header(file)
    if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or dtype != np.uint8 or order:
        raise ValueError(f"arr_0 is {dtype} {shape}, not uint8 images [M, S, S, 3]")
    return shape  # type: ignore[return-value]  # four entries, as checked


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of an npy: shape, whether it is in Fortran's order, dtype."""
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _data_offset(path: Path) -> int:
    """Where the pixels of `arr_0` begin in the file."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("arr_0.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise DataError(f"{path}: arr_0 is compressed; write it with numpy.savez instead")
        with archive.open(entry) as file:
            _npy_header(file)
            header = file.tell()
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)  # of the lengths of name and extra field
        name, extra = struct.unpack("<HH", file.read(4))
    return entry.header_offset + 30 + name + extra + header


def open_source(path: Path, image_size: int | None) -> tuple[ImageSource, dict[str, Any]]:
    """Open images of any of these forms, and describe what identifies them.

    Only a folder of pictures needs `image_size`, the pixels along a side.

    Raises: ConfigError, DataError.
    """
    if path.suffix == ".npz":
        source = NpzImages(path)
        side = source.images.shape[1]
        return source, {
            "kind": "npz", "file": path.name, "sha256": file_hash(path), "image_size": side,
            "crop": "as stored",
        }  # fmt: skip
    if (path / "index.json").is_file():
        manifest = read_manifest(path, "images")
        if manifest.image_size is None:
            raise ConfigError(f"{path} holds images of several sizes; convert them to one")
        return StoredImages(path, manifest.image_size), {
            "kind": "mds", "sha256": _shards_hash(path), "image_size": manifest.image_size,
            "crop": "as stored",
        }  # fmt: skip
    if not path.is_dir():
        raise DataError(f"{path} is neither a folder of images, nor MDS shards, nor an npz")
    if image_size is None:
        raise ConfigError(f"--image-size: missing; {path} is a folder of images, to which size?")
    folder = FolderImages(path, image_size)
    return folder, {
        "kind": "folder", "sha256": folder.hash(), "image_size": image_size,
        "crop": "ADM's centre crop: box halving, then bicubic",
    }  # fmt: skip
