"""Checksums of files. Standard library only."""

from __future__ import annotations

import hashlib
import os

__all__ = ["file_hash"]

_BLOCK = 1 << 20


def file_hash(path: str | os.PathLike[str], algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's content."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
