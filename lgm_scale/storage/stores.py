"""Many files under one root: a folder that all ranks share, or a prefix in object storage."""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from typing_extensions import override

from lgm_scale.storage.files import is_partial, partial_path, place, write_whole
from lgm_scale.storage.transfer import (
    Patience,
    StorageError,
    bucket_and_key,
    fetch,
    is_remote,
    join,
    persist,
    s3_client,
    shown,
    store,
)

__all__ = ["Folder", "ObjectStorage", "Storage", "open_storage"]


class Storage(ABC):
    """Named files below one root. A name appears with its whole content, or not at all."""

    root: str
    remote: bool

    @abstractmethod
    def names(self, prefix: str = "") -> list[str]:
        """All names that begin with `prefix`, sorted; none of a file that is being written."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Content of a small file. Raises: FileNotFoundError."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Make or replace a small file."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Make a small file; False if it is there already."""

    @abstractmethod
    def put(self, path: Path, name: str) -> None:
        """Move a file of this machine to `name`."""

    @abstractmethod
    def get(self, name: str, folder: Path) -> Path:
        """A path on this machine with the content, below `folder` if it had to be fetched.

        Raises: FileNotFoundError.
        """

    @abstractmethod
    def delete(self, prefix: str) -> None:
        """Delete every file that begins with `prefix`."""

    @abstractmethod
    def workplace(self) -> Path:
        """A new folder of this rank for files that are to be `put`; the caller deletes it."""


class Folder(Storage):
    """A local folder, or one on a file system that all nodes share."""

    remote = False

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self.path = Path(root)

    @override
    def names(self, prefix: str = "") -> list[str]:
        found = []
        # Another process may be deleting here: os.walk leaves out what is gone.
        for folder, below, files in os.walk(self.path):
            below[:] = [name for name in below if not name.startswith(".partial")]  # workplaces
            top = Path(folder).relative_to(self.path)
            found += [(top / name).as_posix() for name in files if not is_partial(name)]
        return sorted(name for name in found if name.startswith(prefix))

    @override
    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    @override
    def write(self, name: str, content: bytes) -> None:
        write_whole(self.path / name, content)

    @override
    def create(self, name: str, content: bytes) -> bool:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = partial_path(path)
        try:
            aside.write_bytes(content)
            os.link(aside, path)  # fails, in one step, where the name is taken
        except FileExistsError:
            return False
        finally:
            aside.unlink(missing_ok=True)
        return True

    @override
    def put(self, path: Path, name: str) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        place(path, target)

    @override
    def get(self, name: str, folder: Path) -> Path:
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(path)
        return path

    @override
    def delete(self, prefix: str) -> None:
        for name in self.names(prefix):
            (self.path / name).unlink(missing_ok=True)
        top = self.path / prefix.rstrip("/")
        if prefix.endswith("/") and top.is_dir():
            shutil.rmtree(top, ignore_errors=True)

    @override
    def workplace(self) -> Path:
        # Below the root, so that a file gets its name without being copied.
        self.path.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self.path, prefix=".partial-"))


class ObjectStorage(Storage):
    """A prefix of a bucket. Credentials and endpoint come from the environment.

    Args:
        uri: `s3://bucket/prefix`, `gs://...` or `oci://...`.
        setting: The configuration's key that names it, for messages.
        patience: How long to try each request.

    Raises: StorageError, like every method; its message begins with the setting.
    """

    remote = True

    def __init__(self, uri: str, setting: str, patience: Patience) -> None:
        self.root = uri.rstrip("/")
        self.setting = setting
        self.patience = patience
        self.is_s3 = urlsplit(uri).scheme == "s3"
        if urlsplit(uri).scheme not in ("s3", "gs", "oci"):
            raise StorageError(
                f"{setting}: {shown(uri)} is of a kind that holds no resume states; use a folder, "
                "s3://, gs:// or oci://"
            )

    @override
    def names(self, prefix: str = "") -> list[str]:
        list_keys = self._s3_keys if self.is_s3 else self._other_keys
        _, top = bucket_and_key(join(self.root, ""))
        with self._told():
            keys = persist(lambda: list_keys(top, prefix), *self._request("listed"))
        return sorted(key.removeprefix(top) for key in keys)

    @override
    def read(self, name: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder, self._told():
            path = Path(folder) / "file"
            fetch(join(self.root, name), path, self.patience)
            return path.read_bytes()

    @override
    def write(self, name: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder, self._told():
            path = Path(folder) / Path(name).name
            path.write_bytes(content)
            store(path, join(self.root, name), self.patience)

    @override
    def create(self, name: str, content: bytes) -> bool:
        # Not every store can refuse a taken name: look, write, look again.
        if name in self.names(name):
            return False
        self.write(name, content)
        return self.read(name) == content

    @override
    def put(self, path: Path, name: str) -> None:
        with self._told():
            store(path, join(self.root, name), self.patience, large=True)
        path.unlink()

    @override
    def get(self, name: str, folder: Path) -> Path:
        path = folder / name.replace("/", "--")
        with self._told():
            fetch(join(self.root, name), path, self.patience, large=True)
        return path

    @override
    def delete(self, prefix: str) -> None:
        if not self.is_s3:  # the streaming library's clients cannot delete; old states stay
            return
        client = s3_client(self.patience.timeout)
        for name in self.names(prefix):
            bucket, key = bucket_and_key(join(self.root, name))
            with self._told(), suppress(FileNotFoundError):
                persist(
                    lambda bucket=bucket, key=key: client.delete_object(Bucket=bucket, Key=key),
                    *self._request("deleted", name),
                )

    @override
    def workplace(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="lgm_scale-state-"))

    def _s3_keys(self, top: str, prefix: str) -> list[str]:
        bucket, _ = bucket_and_key(self.root)
        pages = s3_client(self.patience.timeout).get_paginator("list_objects_v2")
        answers = pages.paginate(Bucket=bucket, Prefix=top + prefix)
        return [item["Key"] for answer in answers for item in answer.get("Contents", [])]

    def _other_keys(self, top: str, prefix: str) -> list[str]:
        from streaming.base.storage import CloudUploader

        with tempfile.TemporaryDirectory() as folder:
            uploader = CloudUploader.get((folder, self.root), keep_local=True, exist_ok=True)
            return uploader.list_objects(prefix) or []

    def _request(self, done: str, name: str = "") -> tuple[str, str, Patience]:
        return shown(join(self.root, name) if name else self.root), done, self.patience

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Let errors begin with the configuration's key."""
        try:
            yield
        except StorageError as error:
            raise type(error)(f"{self.setting}: {error}") from error


def open_storage(location: str, setting: str, patience: Patience) -> Storage:
    """The storage at a path or URI, which the configuration names under the key `setting`."""
    if is_remote(location):
        return ObjectStorage(location, setting, patience)
    return Folder(location)
