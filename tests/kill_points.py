"""Stops a function before any one of the changes that it makes on the disk, like a kill there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_CHANGES = (
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "unlink"),
    (shutil, "rmtree"),
)


class KillPoints:
    """Counts changes of the disk while `run` runs; further threads and processes do not count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._seen, self._fatal = 0, 0
        for owner, name in _CHANGES:
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self._seen += 1
            if self._seen == self._fatal:
                raise KeyboardInterrupt
            return change(*arguments, **options)

        return watched

    def run(self, action: Callable[[], Any], step: int) -> bool:
        """Run `action` up to its change number `step`, from 1; False if it ends before that."""
        self._seen, self._fatal = 0, step
        try:
            action()
        except KeyboardInterrupt:
            return True
        finally:
            self._fatal = 0
        return False
