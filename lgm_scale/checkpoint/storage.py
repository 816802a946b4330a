"""Where a run's state lies: a folder that all ranks share, or object storage. One small door."""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from lgm_scale.errors import CheckpointError

__all__ = ["Folder", "ObjectStorage", "Storage", "open_storage"]


class Storage(ABC):
    """Named files below one root. A name appears with its whole content, or not at all."""

    root: str
    remote: bool

    @abstractmethod
    def names(self, prefix: str = "") -> list[str]:
        """All names that begin with `prefix`, sorted."""

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

    def names(self, prefix: str = "") -> list[str]:
        """See `Storage`."""
        paths = (path for path in self.path.rglob("*") if path.is_file())
        found = (path.relative_to(self.path).as_posix() for path in paths)
        return sorted(n for n in found if n.startswith(prefix) and not n.startswith(".partial"))

    def read(self, name: str) -> bytes:
        """See `Storage`."""
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """See `Storage`."""
        workplace = self.workplace()
        try:
            aside = workplace / "file"
            aside.write_bytes(content)
            self.put(aside, name)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)

    def create(self, name: str, content: bytes) -> bool:
        """See `Storage`."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        workplace = self.workplace()
        try:
            aside = workplace / "file"
            aside.write_bytes(content)
            os.link(aside, path)  # fails, in one step, where the name is taken
        except FileExistsError:
            return False
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
        return True

    def put(self, path: Path, name: str) -> None:
        """See `Storage`. On the disk before it gets its name."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(path, target)
        handle = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def get(self, name: str, folder: Path) -> Path:
        """See `Storage`."""
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(path)
        return path

    def delete(self, prefix: str) -> None:
        """See `Storage`."""
        for name in self.names(prefix):
            (self.path / name).unlink(missing_ok=True)
        top = self.path / prefix.rstrip("/")
        if prefix.endswith("/") and top.is_dir():
            shutil.rmtree(top, ignore_errors=True)

    def workplace(self) -> Path:
        """See `Storage`. Below the root, so that a file gets its name without being copied."""
        self.path.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self.path, prefix=".partial-"))


class ObjectStorage(Storage):
    """A prefix of a bucket, through Composer's object stores, which try again by themselves.

    Credentials and endpoint come from the environment (`AWS_*`, `S3_ENDPOINT_URL`, ...).
    """

    remote = True

    def __init__(self, uri: str) -> None:
        from composer.utils import maybe_create_object_store_from_uri, parse_uri

        self.root = uri.rstrip("/")
        _, _, path = parse_uri(self.root)
        self.prefix = path.strip("/") + "/"
        try:
            self.store: Any = maybe_create_object_store_from_uri(self.root)
        except NotImplementedError as error:
            raise CheckpointError(
                f"checkpoint.folder: {uri}: {error}; use a folder, s3://, gs:// or oci://"
            ) from error

    def names(self, prefix: str = "") -> list[str]:
        """See `Storage`."""
        keys = self._call(self.store.list_objects, self.prefix + prefix)
        return sorted(key.removeprefix(self.prefix) for key in keys)

    def read(self, name: str) -> bytes:
        """See `Storage`."""
        with tempfile.TemporaryDirectory() as folder:
            return self.get(name, Path(folder)).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """See `Storage`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            path.write_bytes(content)
            self._call(self.store.upload_object, self.prefix + name, str(path))

    def create(self, name: str, content: bytes) -> bool:
        """See `Storage`. Not every store can refuse a taken name: look, write, look again."""
        if name in self.names(name):
            return False
        self.write(name, content)
        return self.read(name) == content

    def put(self, path: Path, name: str) -> None:
        """See `Storage`."""
        self._call(self.store.upload_object, self.prefix + name, str(path))
        path.unlink()

    def get(self, name: str, folder: Path) -> Path:
        """See `Storage`."""
        path = folder / name.replace("/", "--")
        self._call(self.store.download_object, self.prefix + name, str(path), overwrite=True)
        return path

    def delete(self, prefix: str) -> None:
        """See `Storage`. Composer's stores cannot delete; S3's client can."""
        delete = getattr(getattr(self.store, "client", None), "delete_object", None)
        if delete is None:
            return
        for name in self.names(prefix):
            self._call(delete, Bucket=self.store.bucket, Key=self.prefix + name)

    def workplace(self) -> Path:
        """See `Storage`."""
        return Path(tempfile.mkdtemp(prefix="lgm_scale-state-"))

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """One request; what the server refuses becomes an error of ours, without its headers."""
        try:
            return function(*args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:  # every store has its own kinds
            raise CheckpointError(
                f"checkpoint.folder: {self.root} does not answer as it should: "
                f"{type(error).__name__}: {error}; look at the credentials, the bucket's name and "
                "the network. Nothing that was saved before is lost: run the same command again"
            ) from error


def open_storage(folder: str) -> Storage:
    """The storage at a path or URI."""
    return ObjectStorage(folder) if "://" in folder else Folder(folder)
