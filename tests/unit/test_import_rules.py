"""The doors between the rooms: who may import whom, file lengths and file names.

Read from the source, nothing is imported. A new module of `lgm_scale` gets its place in `ORDER`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A module or package of lgm_scale may import those that come later. Some are yet to be written.
ORDER = [
    "train",
    "plan",
    "build",
    "build_data",
    "sample",
    "pipeline",
    "release_import",
    "checkpoint",
    "run_folder",
    "config_rules",
    "spatial_rules",
    "config",
    "config_loading",
    "training",
    "parallel",
    "spatial_bundle",
    "bundle",
    "bundle_files",
    "flops",
    "sampling",
    "objectives",
    "models",
    "pixels",
    "data",
    "first_failure",
    "nesting",
    "merging",
    "linkage",
    "randomness",
    "storage",
    "errors",
]
FROM_ANYWHERE = {"config", "config_loading", "errors"}

OUTER_ROOMS = {"eval", "data_tools", "launchers", "benchmarks", "tests"}
# The one door outwards: a run that names `evaluation` gets the sweep's evaluator as a callback.
# Lazy, so that the package stands without eval/; one implementation serves training and command.
DOORS_OUT = {"lgm_scale/build.py": {"lgm_scale.evaluation.sweep.during_training"}}
# These know neither the trainer nor the data stream nor other processes ...
PURE = (
    "lgm_scale/models/",
    "lgm_scale/objectives/",
    "lgm_scale/merging/tree.py",
    "lgm_scale/merging/linkage.py",
    "lgm_scale/merging/nesting.py",
    "lgm_scale/pixels.py",
)
PURE_MAY_NOT = ("composer", "torch.distributed", "streaming")
# ... and these are read before the slow import of torch, to report a wrong config at once. The
# command itself imports torch, but only after that, inside a function.
TORCH_FREE = (
    "lgm_scale/bundle.py",
    "lgm_scale/config",
    "lgm_scale/errors.py",
    "lgm_scale/parallel/first_failure.py",
    "lgm_scale/checkpoint/run_folder.py",
    "lgm_scale/families/elit/rules.py",
    "lgm_scale/data/config.py",
    "lgm_scale/data/manifest.py",
    "lgm_scale/data/mixture.py",
    "lgm_scale/parallel/rules.py",
    "lgm_scale/checkpoint/attempts.py",
    "lgm_scale/checkpoint/manifest.py",
    "lgm_scale/storage/",
)
TORCH_LATER = ("lgm_scale/train.py",)

MAX_LINES = 500
BANNED_NAMES = {"util", "utils", "misc", "helper", "helpers", "tmp"}
NOT_OURS = {"build", "dist", "runs", "shared", "node_modules"}


def python_files() -> dict[str, str]:
    """Path from the root, with forward slashes -> source, of every Python file of ours."""
    files = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") or part.endswith(".egg-info") for part in parts)
        if not hidden and parts[0] not in NOT_OURS:
            files["/".join(parts)] = path.read_text(encoding="utf-8")
    return files


FILES = python_files()
PACKAGE = [path for path in FILES if path.startswith("lgm_scale/")]


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Absolute dotted names; `from a import b` gives both a and a.b, for b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def room(path: str) -> str | None:
    """The entry of ORDER that a file of lgm_scale belongs to; None for lgm_scale/__init__.py."""
    first = path.split("/")[1].removesuffix(".py")
    return None if first == "__init__" else first


def outward_imports(source: str) -> list[str]:
    names = set(imported_names(ast.parse(source)))
    return sorted(name for name in names if name.split(".")[0] in OUTER_ROOMS)


def is_allowed(name: str, allowed: set[str]) -> bool:
    return any(is_within(name, door) for door in allowed)


def upward_imports(path: str, source: str) -> list[str]:
    """Rooms that this file may not import, and does."""
    own, found = room(path), set()
    for name in imported_names(ast.parse(source)):
        parts = name.split(".")
        if parts[0] != "lgm_scale" or len(parts) == 1 or parts[1] not in ORDER:
            continue
        target = parts[1]
        if own == target or target in FROM_ANYWHERE:
            continue
        if own not in ORDER or ORDER.index(target) < ORDER.index(own):
            found.add(target)
    return sorted(found)


def forbidden_imports(source: str, forbidden: tuple[str, ...]) -> list[str]:
    names = set(imported_names(ast.parse(source)))
    return sorted(name for name in names if any(is_within(name, bad) for bad in forbidden))


def relative_imports(source: str) -> list[int]:
    """Lines of relative imports."""
    tree = ast.parse(source)
    return [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level
    ]


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
            stem = name.replace(".", "/")
            ours = [f for f in (f"{stem}.py", f"{stem}/__init__.py") if f in files]
            waiting += ours
            if not name.startswith("lgm_scale"):
                outside.setdefault(name, current)
    return outside


# --- the rules, on the tree as it is ----------------------------------------------------------


def test_there_is_something_to_check():
    assert {"lgm_scale/merging/tree.py", "lgm_scale/families/lgm/network.py"} <= set(PACKAGE)
    assert "tests/unit/test_import_rules.py" in FILES
    assert set(ORDER) >= FROM_ANYWHERE
    assert len(ORDER) == len(set(ORDER))


def test_every_module_has_its_place_in_the_order():
    missing = {room(path) for path in PACKAGE} - {None} - set(ORDER)
    assert not missing, f"not in ORDER: {sorted(missing)}; give each its place"


@pytest.mark.parametrize("path", PACKAGE)
def test_the_package_imports_no_outer_room(path):
    allowed = DOORS_OUT.get(path, set())
    outward = [name for name in outward_imports(FILES[path]) if not is_allowed(name, allowed)]
    assert outward == []
    assert not {name.split(".")[0] for name in load_time_names(FILES[path])} & OUTER_ROOMS


@pytest.mark.parametrize("path", PACKAGE)
def test_imports_go_down_the_order(path):
    assert upward_imports(path, FILES[path]) == []


@pytest.mark.parametrize("path", [path for path in PACKAGE if path.startswith(PURE)])
def test_networks_and_mathematics_know_no_trainer(path):
    assert forbidden_imports(FILES[path], PURE_MAY_NOT) == []


@pytest.mark.parametrize("path", [path for path in PACKAGE if path.startswith(TORCH_FREE)])
def test_configs_errors_and_manifests_import_no_torch(path):
    assert forbidden_imports(FILES[path], ("torch",)) == []


@pytest.mark.parametrize(
    "path", [path for path in PACKAGE if path.startswith(TORCH_FREE + TORCH_LATER)]
)
def test_torch_is_not_imported_through_other_modules(path):
    outside = load_time_closure(path, FILES)
    asked_by = {name: by for name, by in outside.items() if is_within(name, "torch")}
    assert asked_by == {}


@pytest.mark.parametrize("path", list(FILES))
def test_imports_are_absolute_and_files_short(path):
    assert relative_imports(FILES[path]) == []
    assert len(FILES[path].splitlines()) <= MAX_LINES


def test_no_module_is_named_after_nothing():
    named = [path for path in FILES if BANNED_NAMES & set(path.removesuffix(".py").split("/"))]
    assert named == []


# --- the checks can fail ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    ["import eval.sweep", "from tests.unit import conftest", "def f():\n    import launchers"],
)
def test_an_import_of_an_outer_room_is_seen(line):
    assert len(outward_imports(line)) > 0
    assert outward_imports("import evaluate\nfrom lgm_scale import data") == []


@pytest.mark.parametrize(
    ("path", "line", "found"),
    [
        (
            "lgm_scale/merging/tree.py",
            "from lgm_scale.families.lgm.network import MergeDiT",
            ["models"],
        ),
        ("lgm_scale/families/lgm/network.py", "from lgm_scale import sampling", ["sampling"]),
        ("lgm_scale/data/images.py", "import lgm_scale.training.ema", ["training"]),
        ("lgm_scale/flops.py", "def f():\n    import lgm_scale.train", ["train"]),
        ("lgm_scale/__init__.py", "from lgm_scale.pipeline import LGMPipeline", ["pipeline"]),
        ("lgm_scale/not_listed.py", "import lgm_scale.merging.tree", ["merging"]),
        ("lgm_scale/families/lgm/network.py", "from lgm_scale.layers import Attention", []),
        (
            "lgm_scale/families/lgm/network.py",
            "from lgm_scale.config.loading import load_config",
            [],
        ),
        ("lgm_scale/randomness.py", "from lgm_scale import __version__, errors", []),
    ],
)
def test_an_upward_import_is_seen(path, line, found):
    assert upward_imports(path, line) == found


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.fsdp import FullyShardedDataParallel",
        "from composer.models import ComposerModel",
        "def f():\n    import streaming",
    ],
)
def test_a_forbidden_import_is_seen(line):
    assert forbidden_imports(line, PURE_MAY_NOT)
    assert not forbidden_imports("import torch\nimport torch.nn.functional", PURE_MAY_NOT)
    assert not forbidden_imports("import torchvision", ("torch",))


def test_torch_is_seen_through_other_modules():
    files = {
        "lgm_scale/__init__.py": "",
        "lgm_scale/data/__init__.py": "import torch",
        "lgm_scale/data/manifest.py": "import json",
        "lgm_scale/flops.py": "from lgm_scale import merging",
        "lgm_scale/merging/tree.py": "try:\n    import torch\nexcept ImportError:\n    pass",
        "lgm_scale/config/schema.py": "from lgm_scale.flops import dit_flops",
        "lgm_scale/errors.py": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
            "def f():\n    import torch"
        ),
    }
    closures = {path: load_time_closure(path, files).get("torch") for path in files}
    assert closures["lgm_scale/config/schema.py"] == "lgm_scale/merging/tree.py"
    assert closures["lgm_scale/data/manifest.py"] == "lgm_scale/data/__init__.py"
    assert closures["lgm_scale/errors.py"] is None


def test_a_relative_import_is_seen():
    assert relative_imports("import json\nfrom . import dit\nfrom ..errors import LGMError") == [
        2,
        3,
    ]
