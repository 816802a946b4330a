"""The Python files of the repository as text, and what they import."""

from __future__ import annotations

import ast
import io
import os
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_OURS = {"build", "dist", "runs", "shared", "node_modules"}


def python_files() -> dict[str, str]:
    """Path from the root, with forward slashes -> source, of every Python file of ours."""
    found = []
    for folder, inner, names in os.walk(ROOT):  # not into environments: 42,000 files each
        not_ours = NOT_OURS if Path(folder) == ROOT else ()
        inner[:] = (n for n in inner if not n.startswith(".") and not n.endswith(".egg-info"))
        inner[:] = (n for n in inner if n not in not_ours)
        found += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith(".")]
    paths = {path.relative_to(ROOT).as_posix(): path for path in sorted(found)}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Absolute dotted names; `from a import b` gives both a and a.b, for b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def all_imports(source: str) -> frozenset[str]:
    """What a file imports, wherever in it: in functions and for types as well."""
    return frozenset(imported_names(ast.parse(source)))


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def file_of(name: str, files: dict[str, str]) -> str | None:
    """The file of ours that a dotted name is."""
    stem = name.replace(".", "/")
    return next((f for f in (f"{stem}.py", f"{stem}/__init__.py") if f in files), None)


def imported_files(path: str, files: dict[str, str]) -> set[str]:
    """Files of ours that a file imports, wherever in it."""
    names = all_imports(files[path])
    found = {file_of(name, files) for name in names} - {None, path}
    # `from a.b import c` with a module c reads b's __init__ only to reach c.
    inner = {name.rpartition(".")[0] for name in names if file_of(name, files)}
    passed = {file_of(name, files) for name in inner if f"{name.replace('.', '/')}.py" not in files}
    return {
        f for f in found if f is not None and (f not in passed or not f.endswith("__init__.py"))
    }


def circles(files: dict[str, str]) -> list[tuple[str, ...]]:
    """Groups of files that import each other, directly or through others."""
    arrows = {path: imported_files(path, files) for path in files}
    reach = {path: set(ends) for path, ends in arrows.items()}
    for middle in files:
        for start in files:
            if middle in reach[start]:
                reach[start] |= reach[middle]
    inside = [path for path in files if path in reach[path]]
    groups = (tuple(p for p in inside if p in reach[s] and s in reach[p]) for s in inside)
    return sorted({tuple(sorted(group)) for group in groups})


def forbidden_imports(source: str, forbidden: tuple[str, ...]) -> list[str]:
    names = all_imports(source)
    return sorted(name for name in names if any(is_within(name, bad) for bad in forbidden))


def relative_imports(source: str) -> list[int]:
    """Lines of relative imports."""
    if not re.search(r"^\s*from\s*\.", source, re.MULTILINE):
        return []
    tree = ast.parse(source)
    return [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level
    ]


@cache
def load_time_names(source: str) -> set[str]:
    """What importing a file imports: not the bodies of functions, nor the type checker's part."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(imported_names(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting.extend(ast.iter_child_nodes(node))
    return names


def load_time_closure(path: str, files: dict[str, str]) -> dict[str, str]:
    """Every outside name that importing `path` imports -> the file of ours that asks for it."""
    outside: dict[str, str] = {}
    waiting, seen = [path], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        parents = [str(parent) + "/__init__.py" for parent in Path(current).parents]
        waiting += [parent for parent in parents if parent in files]
        for name in load_time_names(files[current]):
            ours = file_of(name, files)
            waiting += [ours] if ours else []
            if not name.startswith("lgm_scale"):
                outside.setdefault(name, current)
    return outside


def code_of(source: str) -> str:
    """A source without comments and without docstrings, which may name whatever explains."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            docstrings.update(lines if isinstance(node.value.value, str) else ())
    words = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type != tokenize.COMMENT and token.start[0] not in docstrings
    ]
    return re.sub(r"\s*\.\s*", ".", " ".join(words))
