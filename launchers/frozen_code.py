"""A copy of the code that a job runs, so that editing the checkout changes no requeued job."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

__all__ = ["CHECKOUT", "FrozenCode"]

CHECKOUT = Path(__file__).resolve().parents[1]
_PACKAGES = ("lgm_scale", "data_tools", "eval", "launchers")
_LEFT_OUT = ("__pycache__", ".pyc")


class FrozenCode:
    """The packages and a job's configuration, named by the hash of their contents.

    Args:
        folder: Where copies live; equal contents share one.
        config: The job's YAML file, copied too.
    """

    def __init__(self, folder: Path, config: Path | None) -> None:
        self._files = {
            str(path.relative_to(CHECKOUT)): path
            for package in _PACKAGES
            for path in sorted((CHECKOUT / package).rglob("*"))
            if path.is_file() and not any(part in str(path) for part in _LEFT_OUT)
        }
        if config is not None:
            self._files[f"config/{config.name}"] = config
        digest = hashlib.sha256()
        for name, path in self._files.items():
            contents = path.read_bytes()
            digest.update(f"{name}\0{len(contents)}\0".encode() + contents)
        self.path = folder.absolute() / f"code-{digest.hexdigest()[:12]}"
        self.config = self.path / "config" / config.name if config is not None else None

    def write(self) -> None:
        """Make the copy, unless it is there. It is complete or absent."""
        if self.path.is_dir():
            return
        aside = self.path.with_name(self.path.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        for name, path in self._files.items():
            target = aside / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        aside.rename(self.path)
