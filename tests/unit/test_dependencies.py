"""docs/dependencies.md names every part of Composer and streaming that is used, and how often."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "dependencies.md").read_text()
ROW = re.compile(r"^\| `((?:composer|streaming)[\w.]*)` \| (\d+) \|", re.MULTILINE)


def used(library: str) -> dict[str, int]:
    """Dotted names that the package's files import of a library -> the number of these files."""
    files: dict[str, set[Path]] = defaultdict(set)
    for path in (ROOT / "lgm_scale").rglob("*.py"):
        for name in _names(ast.parse(path.read_text())):
            if name.split(".")[0] == library:
                files[name].add(path)
    return {name: len(paths) for name, paths in files.items()}


def _names(tree: ast.Module) -> Iterator[str]:
    """What a file imports, and of a module that it imports the attributes that it reads."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name == "composer.utils.dist":
                    modules[alias.asname or alias.name] = name
                else:
                    yield name
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None:
                yield f"{module}.{node.attr}"


@pytest.mark.parametrize("library", ["composer", "streaming"])
def test_the_page_has_every_name_and_how_many_files_use_it(library):
    found = used(library)
    told = {name: int(count) for name, count in ROW.findall(PAGE) if name.split(".")[0] == library}
    assert told == found, "\n".join(f"| `{name}` | {n} |" for name, n in sorted(found.items()))
    assert f"{len(found)} names of {library.capitalize()}" in PAGE
