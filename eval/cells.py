"""What a sweep keeps: one cell per finished piece of work, with the protocol it was done under.

A cell is `NAME.safetensors` (pictures) and `NAME.json` (numbers and protocol), the latter written
last and renamed into place. A cell counts only under the very same protocol.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lgm_scale.errors import DataError

__all__ = ["Cells", "write_json"]


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write aside, then rename. Numbers that are not finite are a bug and raise ValueError."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    aside.replace(path)


class Cells:
    """The cells in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, name: str, protocol: dict[str, Any]) -> dict[str, Any] | None:
        """Numbers of a cell, or None if it is missing, damaged or of another protocol."""
        try:
            cell = json.loads((self.folder / f"{name}.json").read_text())
            same = cell["protocol"] == json.loads(json.dumps(protocol))
            return cell["numbers"] if same and self._tensors(name).is_file() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(
        self,
        name: str,
        protocol: dict[str, Any],
        numbers: dict[str, Any],
        images: dict[str, np.ndarray],
    ) -> None:
        """Keep a finished cell, in place of another of its name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{name}.json").unlink(missing_ok=True)
        aside = self._tensors(name).with_suffix(".partial")
        save_file({key: np.ascontiguousarray(value) for key, value in images.items()}, aside)
        aside.replace(self._tensors(name))
        write_json(self.folder / f"{name}.json", {"protocol": protocol, "numbers": numbers})

    def images(self, name: str) -> dict[str, np.ndarray]:
        """Pictures of a cell. Raises: DataError if they cannot be read."""
        try:
            return load_file(self._tensors(name))
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{self._tensors(name)} cannot be read ({error}); run the sweep again"
            ) from error

    def _tensors(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
