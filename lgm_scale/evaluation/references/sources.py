"""Images to make a reference of: a folder, an npz of ADM's form, or MDS shards."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lgm_scale.data.images import center_crop, decode_image
from lgm_scale.data.manifest import read_manifest
from lgm_scale.errors import ConfigError, DataError
from lgm_scale.evaluation.features.spaces import folder_hash
from lgm_scale.evaluation.reconstructions.images import StoredImages
from lgm_scale.evaluation.references.files import npy_header, npz_images_shape
from lgm_scale.storage.files import file_hash

__all__ = ["FolderImages", "ImageSource", "NpzImages", "open_source"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class ImageSource(Protocol):
    """Images by index, with labels (0 where there are none)."""

    def __len__(self) -> int:
        """How many."""
        ...

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, np.ndarray]:
        """Shapes: [B] -> uint8 [B, 3, S, S], labels int64 [B]."""
        ...


class FolderImages:
    """Every image below a folder, in the order of their paths, centre-cropped to S x S."""

    def __init__(self, folder: Path, image_size: int) -> None:
        self.folder, self.image_size = folder, image_size
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)

    def __len__(self) -> int:
        """How many."""
        return len(self.paths)

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, np.ndarray]:
        """Shapes: [B] -> uint8 [B, 3, S, S], zeros [B]. Raises: DataError naming a broken file."""
        images = []
        for index in indices:
            path = self.paths[int(index)]
            image = center_crop(decode_image(path.read_bytes(), str(path)), self.image_size)
            images.append(torch.from_numpy(np.array(image).transpose(2, 0, 1).copy()))
        return torch.stack(images), np.zeros(len(images), np.int64)

    def hash(self) -> str:
        """SHA-256 over names and contents."""
        total = hashlib.sha256()
        for path in self.paths:
            total.update(f"{path.relative_to(self.folder)} {file_hash(path)}\n".encode())
        return total.hexdigest()


class NpzImages:
    """`arr_0` of an npz, mapped into memory: what is read is read from the file.

    Raises: DataError if the npz holds no images, or holds them compressed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        shape = npz_images_shape(path)
        if shape is None:
            raise DataError(f"{path} holds no images (arr_0)")
        self.images = np.memmap(path, np.uint8, "r", _data_offset(path), shape)

    def __len__(self) -> int:
        """How many."""
        return len(self.images)

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, np.ndarray]:
        """Shapes: [B] -> uint8 [B, 3, S, S], zeros [B]."""
        rows = self.images[np.asarray([int(index) for index in indices])]
        pixels = np.ascontiguousarray(rows.transpose(0, 3, 1, 2))
        return torch.from_numpy(pixels), np.zeros(len(pixels), np.int64)


def _data_offset(path: Path) -> int:
    """Where the pixels of `arr_0` begin in the file."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("arr_0.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise DataError(f"{path}: arr_0 is compressed; write it with numpy.savez instead")
        with archive.open(entry) as file:
            npy_header(file)
            header = file.tell()
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)  # of the lengths of name and extra field
        name, extra = struct.unpack("<HH", file.read(4))
    return entry.header_offset + 30 + name + extra + header


def open_source(path: Path, image_size: int | None) -> tuple[ImageSource, dict[str, Any]]:
    """Images and what identifies them.

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
        return StoredImages(str(path), manifest.image_size), {
            "kind": "mds", "sha256": folder_hash(path), "image_size": manifest.image_size,
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
