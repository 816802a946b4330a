"""Shards on their way from object storage to the cache of a node. No torch.

A cache belongs to one data set: the manifest is its sign, and the files beside the shards are
fetched and checked at the start. Shards come while training goes, whole and with the right hash.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.format.base.reader import FileInfo, Reader

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.manifest import INDEX_NAME, MANIFEST_NAME, parse_manifest
from lgm_scale.errors import DataError
from lgm_scale.storage.files import file_hash, write_whole
from lgm_scale.storage.transfer import (
    Expected,
    Patience,
    fetch,
    is_remote,
    join,
    read_remote,
    shown,
)

__all__ = ["ShardStream", "digest_files", "fill_cache", "local_folder"]


def local_folder(source: SourceConfig) -> Path:
    """Where the files of a source are on this machine."""
    return Path(source.cache if source.cache is not None else source.path)


def fill_cache(source: SourceConfig, patience: Patience) -> None:
    """Bring everything but the shards into the cache; nothing to do for a local source.

    Raises: DataError if the storage cannot be read or the cache is of another data set.
    """
    if not is_remote(source.path) and source.cache is None:
        return
    folder, where = local_folder(source), shown(source.path)
    data = read_remote(join(source.path, MANIFEST_NAME), patience)
    if data is None:
        raise DataError(
            f"{where} has no {MANIFEST_NAME}: no finished data set of data_tools/images_to_mds.py "
            "or data_tools/encode_latents.py is there. Check data.path, or finish writing it"
        )
    manifest = parse_manifest(data.decode(), f"{where}/{MANIFEST_NAME}")
    _claim(folder, data, where)
    for name, digest in {INDEX_NAME: "", **manifest.files}.items():
        path = folder / name
        hashes = {"sha256": digest} if digest else {}
        if path.is_file() and Expected(hashes=hashes).problem(path) is None:
            continue
        fetch(join(source.path, name), path, patience, Expected(hashes=hashes))


def _claim(folder: Path, manifest: bytes, where: str) -> None:
    """Make a folder the cache of the data set with this manifest."""
    path = folder / MANIFEST_NAME
    if path.is_file():
        if path.read_bytes() == manifest:
            return
        raise DataError(
            f"cache {folder} holds another data set than {where} (or an older one of that name): "
            "it is never overwritten. Choose another cache, or delete it"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"cache {folder} is neither empty nor a cache of ours: choose another, or delete it"
        )
    try:
        write_whole(path, manifest)
    except OSError as error:
        raise DataError(f"cache {folder} cannot be written: {error.strerror}") from error


class ShardStream(Stream):
    """A stream that fetches patiently, checks what it got, and says what went wrong.

    Args:
        source: where from, and where to.
        patience: how long to try.
    """

    def __init__(self, source: SourceConfig, patience: Patience) -> None:
        folder = local_folder(source)
        remote = source.path if source.cache is not None else None
        super().__init__(remote=remote, local=str(folder))
        self.patience = patience
        self._expected: dict[str, Expected] = {}

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Reader]:
        """Read the index, and note what each file must be."""
        shards = super().get_shards(world, allow_unsafe_types)
        for shard in shards:
            for pair in shard.file_pairs:
                for info in filter(None, pair):
                    self._expected[info.basename] = Expected(info.bytes, info.hashes)
        return shards

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Drop what another run left half done in the cache, then look what is there."""
        if self.remote is not None:
            for name, expected in self._expected.items():
                path = Path(self.local, name)
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_size != expected.num_bytes:
                        path.unlink()
        super().set_up_local(shards, cache_usage_per_shard)

    def prepare_shard(self, shard: Reader) -> int:
        """Have a shard in the cache. Raises: DataError naming it."""
        try:
            return super().prepare_shard(shard)
        except DataError:  # of the fetch, which names the file
            raise
        except OSError as error:  # while decompressing
            name = shard.file_pairs[0][0].basename
            raise DataError(f"{join(self.local, name)} cannot be written: {error}") from error

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        local = Path(self.local, to_basename or from_basename)
        if self.remote is None:
            raise DataError(f"{local} is missing, but {INDEX_NAME} lists it: copy it again")
        expected = self._expected.get(from_basename)
        fetch(join(self.remote, from_basename), local, self.patience, expected)
        return str(local)

    def name_of(self, info: FileInfo) -> str:
        """A shard's file for messages."""
        return shown(join(self.remote or self.local, info.basename))


def digest_files(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files of a folder, as the manifest keeps them."""
    return {name: file_hash(folder / name) for name in names}
