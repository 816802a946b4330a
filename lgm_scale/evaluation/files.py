"""Files that are there whole or not at all: written aside, synced, renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["digest", "write_aside", "write_json"]


def write_aside(path: Path, data: bytes) -> None:
    """Write `data` under another name and rename it to `path`; folders are made.

    The other name holds the process, so that two processes never write into one file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """`write_aside` of JSON. Numbers that are not finite are a bug and raise ValueError."""
    write_aside(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def digest(values: Any) -> str:
    """SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
