"""Where the shards of a source lie on a machine: in its folder, or in a cache of its own.

A cache belongs to one data set: the manifest is its sign, and the files beside the shards are
fetched and checked at the start. Shards come while training goes, whole and with the right hash
(`streaming_internals.ShardStream`). No torch.
"""

from __future__ import annotations

import os
from pathlib import Path

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.manifest import INDEX_NAME, MANIFEST_NAME, parse_manifest
from lgm_scale.errors import DataError
from lgm_scale.storage.clients import is_remote
from lgm_scale.storage.files import is_partial, write_whole
from lgm_scale.storage.transfer import Expected, Patience, fetch, join, read_remote, shown


def local_folder(source: SourceConfig) -> Path:
    """Where the files of a source are on this machine."""
    return Path(source.cache if source.cache is not None else source.path)


def fill_cache(source: SourceConfig, patience: Patience) -> None:
    """Bring everything but the shards into the cache of a source, if it has one.

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
    """Make a folder the cache of the data set with this manifest, whose name is `where`."""
    path = folder / MANIFEST_NAME
    if path.is_file():
        if path.read_bytes() == manifest:
            return
        raise DataError(
            f"cache {folder} holds another data set than {where} (or an older one of that name): "
            "it is never overwritten. Choose another cache, or delete it"
        )
    # What a killed process left while it claimed the folder is nobody's data.
    if folder.exists() and not (folder.is_dir() and all(map(is_partial, os.listdir(folder)))):
        raise DataError(
            f"cache {folder} is neither empty nor a cache of ours: choose another, or delete it"
        )
    try:
        write_whole(path, manifest)
    except OSError as error:
        raise DataError(f"cache {folder} cannot be written: {error.strerror}") from error
