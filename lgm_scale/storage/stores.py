"""Many files under one root: a folder that all ranks share, or a prefix in object storage."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from typing_extensions import override

from lgm_scale.storage.clients import bucket_and_key, is_remote, s3_client
from lgm_scale.storage.files import is_partial, partial_path, place, write_whole
from lgm_scale.storage.transfer import Patience, StorageError, fetch, join, persist, shown, store


class Storage:
    """Named files below one folder. A name appears with its whole content, or not at all."""

    remote = False

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self.path = Path(root)

    def names(self, prefix: str = "") -> list[str]:
        """All names that begin with `prefix`, sorted; none of a file that is being written."""
        found = []
        # Another process may be deleting here: os.walk leaves out what is gone.
        for folder, below, files in os.walk(self.path):
            below[:] = [name for name in below if not name.startswith(".partial")]  # workplaces
            top = Path(folder).relative_to(self.path)
            found += [(top / name).as_posix() for name in files if not is_partial(name)]
        return sorted(name for name in found if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        """Content of a small file. Raises: FileNotFoundError."""
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Make or replace a small file."""
        write_whole(self.path / name, content)

    def create(self, name: str, content: bytes) -> bool:
        """Make a small file; False if it is there already."""
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

    def put(self, path: Path, name: str) -> None:
        """Move a file of this machine, large or not, to `name`."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        place(path, target)

    def get(self, name: str, folder: Path) -> Path:
        """A path on this machine with the content, below `folder` if it had to be fetched.

        Raises: FileNotFoundError.
        """
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(path)
        return path

    def delete(self, prefix: str) -> None:
        """Delete every file that begins with `prefix`."""
        for name in self.names(prefix):
            (self.path / name).unlink(missing_ok=True)
        top = self.path / prefix.rstrip("/")
        if prefix.endswith("/") and top.is_dir():
            shutil.rmtree(top, ignore_errors=True)

    def workplace(self) -> tempfile.TemporaryDirectory[str]:
        """A new folder of this rank for files that are to be `put`, as a context.

        It goes when the process ends, too, even if a thread is in it then; not after a kill.
        """
        # Below the root, so that a file gets its name without being copied.
        self.path.mkdir(parents=True, exist_ok=True)
        return _folder(".partial-", self.path)


def _folder(prefix: str, parent: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)


class ObjectStorage(Storage):
    """Named files below a prefix of a bucket, with the credentials of the environment.

    Args:
        uri: `s3://bucket/prefix`, `gs://...` or `oci://...`.
        setting: The configuration's key that names it; every message begins with it.

    Raises: StorageError, like every method.
    """

    remote = True

    def __init__(self, uri: str, setting: str, patience: Patience) -> None:
        self.root, self.setting, self.patience = uri.rstrip("/"), setting, patience
        scheme = urlsplit(uri).scheme
        if scheme not in ("s3", "gs", "oci"):
            raise StorageError(
                f"{setting}: {shown(uri)} cannot be listed; use a folder, s3://, gs:// or oci://"
            )
        self.is_s3 = scheme == "s3"
        self.bucket, self.top = bucket_and_key(join(uri, ""))

    @override
    def names(self, prefix: str = "") -> list[str]:
        list_keys = self._s3_keys if self.is_s3 else self._other_keys
        with self._told():
            keys = persist(lambda: list_keys(prefix), shown(self.root), "listed", self.patience)
        return sorted(key.removeprefix(self.top) for key in keys)

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
            key = {"Bucket": self.bucket, "Key": self.top + name}
            with self._told(), suppress(FileNotFoundError):
                persist(
                    lambda key=key: client.delete_object(**key),
                    *(shown(join(self.root, name)), "deleted", self.patience),
                )

    @override
    def workplace(self) -> tempfile.TemporaryDirectory[str]:
        return _folder("lgm_scale-state-")

    def _s3_keys(self, prefix: str) -> list[str]:
        pages = s3_client(self.patience.timeout).get_paginator("list_objects_v2")
        answers = pages.paginate(Bucket=self.bucket, Prefix=self.top + prefix)
        return [item["Key"] for answer in answers for item in answer.get("Contents", [])]

    def _other_keys(self, prefix: str) -> list[str]:
        from streaming.base.storage import CloudUploader

        with tempfile.TemporaryDirectory() as folder:
            uploader = CloudUploader.get((folder, self.root), keep_local=True, exist_ok=True)
            return uploader.list_objects(prefix) or []

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            raise type(error)(f"{self.setting}: {error}") from error


def open_storage(location: str, setting: str, patience: Patience) -> Storage:
    """The storage at a path or URI, which the configuration names under the key `setting`."""
    if is_remote(location):
        return ObjectStorage(location, setting, patience)
    return Storage(location)
