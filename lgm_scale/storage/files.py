"""Files and folders that are there whole or not at all, and their hashes. Standard library only.

What is new is written aside and renamed: whenever a process is killed, the old content is there or
the new one. A file is on the disk before it gets its name, so that a machine that loses power
leaves no empty file either.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20
_PARTIAL = ".partial"


def write_whole(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Make or replace a file; its folders are made.

    `content` is bytes, text (UTF-8), or a function that writes a file at the path it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = partial_path(path)
    try:
        if callable(content):
            content(aside)
        else:
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
        place(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Any) -> None:
    """Make or replace a file of indented JSON.

    Raises: ValueError for numbers that are not finite, which are a bug of the caller.
    """
    write_whole(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def follow_umask(path: Path) -> None:
    """Give a file the mode of any new file there: safetensors makes them for their owner alone."""
    probe = partial_path(path)
    probe.touch()
    try:
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink()


def partial_path(path: Path) -> Path:
    """A name beside `path` to write at, that no other process of any machine chooses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_PARTIAL}")


def is_partial(name: str) -> bool:
    """Whether a file of this name was being written when its process was killed."""
    return name.startswith(".") and name.endswith(_PARTIAL)


def place(aside: Path, path: Path) -> None:
    """Give a finished file its name, once its content is on the disk."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(handle)
    finally:
        os.close(handle)


def folder_aside(folder: Path) -> Path:
    """An empty folder to fill, for `replace_folder`. What a killed process left there goes."""
    aside = folder.with_name(folder.name + _PARTIAL)
    for scrap in (aside, _replaced(folder)):
        shutil.rmtree(scrap, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def replace_folder(folder: Path, aside: Path) -> None:
    """Put the folder `aside` in the place of `folder`, which may be there already.

    At no moment does `folder` hold half of anything. A kill may leave none there, and the new one
    aside.
    """
    old = _replaced(folder)
    if folder.exists():
        folder.rename(old)  # a kill while it is deleted must not leave half of it here
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    """Where a folder goes that a new one replaces, until it is deleted."""
    return folder.with_name(folder.name + ".replaced")


def file_hash(path: str | os.PathLike[str], algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's content."""
    found = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def digest(values: Any) -> str:
    """Hexadecimal SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
