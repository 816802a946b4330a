"""A folder that stands for object storage."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import override

from lgm_scale.storage.stores import Storage


class FarStorage(Storage):
    """Files are fetched, and nothing of the machine that wrote them is left behind.

    `written` has the names of small files in the order in which they came.
    """

    remote = True

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self.written: list[str] = []

    @override
    def write(self, name: str, content: bytes) -> None:
        self.written.append(name)
        super().write(name, content)

    @override
    def get(self, name: str, folder: Path) -> Path:
        path = folder / name.replace("/", "--")
        path.write_bytes(self.read(name))
        return path
