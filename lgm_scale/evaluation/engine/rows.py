"""Finished numbers: one JSON file per row, with the whole protocol that it was measured under.

A row is `<name>-<id>.json`, and pictures beside it as safetensors; the id is a hash of everything
that the numbers depend on. So a row counts only under its own protocol, and is the same file
whoever writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from lgm_scale.errors import DataError
from lgm_scale.storage.files import digest, write_json, write_whole

FORMAT, VERSION = "lgm_scale.sweep", 2
"""Of the file results.json, which has all rows of a sweep."""


class RowStore:
    """The rows in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, name: str, protocol: dict[str, Any]) -> str:
        """Name of a row's files."""
        return f"{name}-{digest(protocol)[:12]}"

    def find(self, name: str, protocol: dict[str, Any]) -> dict[str, Any] | None:
        """A finished row, or None if it is missing, damaged or of another protocol."""
        key = self.key(name, protocol)
        try:
            row = json.loads((self.folder / f"{key}.json").read_text())
            same = row["protocol"] == json.loads(json.dumps(protocol))
            return row if same and self._pictures(key).is_file() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(
        self, name: str, protocol: dict[str, Any], row: dict[str, Any], pictures: dict[str, Any]
    ) -> dict[str, Any]:
        """Keep a row and its pictures; the JSON comes last. Returns the complete row."""
        key = self.key(name, protocol)
        arrays = {name: np.ascontiguousarray(values) for name, values in pictures.items()}
        write_whole(self._pictures(key), save(arrays))
        complete = {"key": key, **row, "protocol": protocol}
        write_json(self.folder / f"{key}.json", complete)
        return json.loads(json.dumps(complete))

    def pictures(self, key: str) -> dict[str, np.ndarray]:
        """Pictures of a row. Raises: DataError if they cannot be read."""
        try:
            return load_file(self._pictures(key))
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{self._pictures(key)} cannot be read ({error}); run the sweep again"
            ) from error

    def _pictures(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def read_results(out: Path) -> dict[str, Any]:
    """Results of a finished sweep. Raises: DataError if the folder holds none."""
    path = out / "results.json"
    if not path.is_file():
        raise DataError(f"{path} is missing: give the `out` folder of a finished sweep")
    try:
        results = json.loads(path.read_text())
        found = results["format"], results["version"]
        if found != (FORMAT, VERSION):
            raise ValueError(f"it is {found[0]!r} version {found[1]!r}, not version {VERSION}")
        if not {"rows", "searched", "reconstructions"} <= results.keys():
            raise ValueError("its rows are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); run the sweep again") from error
    return results
