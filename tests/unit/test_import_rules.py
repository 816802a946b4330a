"""The doors between the rooms: who may import whom, who may name a family, lengths of files.

Read from the source, nothing is imported. A new room gets its place in `ORDER`.
"""

from __future__ import annotations

import ast
import re

import pytest
from source_tree import (
    ROOT,
    circles,
    code_of,
    file_of,
    forbidden_imports,
    imported_files,
    is_within,
    load_time_closure,
    load_time_names,
    python_files,
    relative_imports,
)

# A room may import those that come later, and no other. A room is a folder or a file; the longest
# entry that fits a file is its room. (What `config/rules.py` hears comes from every room that has a
# section in the configuration, and those rooms read `config/schema.py`: hence two entries.)
ORDER = [
    "benchmarks",
    "eval",
    "data_tools",
    "launchers",
    "experiments",
    "lgm_scale/train.py",
    "lgm_scale/planning",
    "lgm_scale/build.py",
    "lgm_scale/sample.py",
    "lgm_scale/web.py",
    "lgm_scale/publish.py",
    "lgm_scale/assets.py",
    "lgm_scale/evaluation/commands",
    "lgm_scale/evaluation/during_training",
    "lgm_scale/evaluation/report",
    "lgm_scale/evaluation/sweep",
    "lgm_scale/evaluation/reconstructions",
    "lgm_scale/evaluation/metrics",
    "lgm_scale/evaluation/references",
    "lgm_scale/evaluation/features",
    "lgm_scale/evaluation/images.py",
    "lgm_scale/evaluation/engine",
    "lgm_scale/checkpoint",
    "lgm_scale/config/rules.py",
    "lgm_scale/config/inputs.py",
    "lgm_scale/families/elit",
    "lgm_scale/families/lgm",
    "lgm_scale/families/tokenizer",
    "lgm_scale/release_import",
    "lgm_scale/data/preparation",
    "lgm_scale/initial_weights.py",
    "lgm_scale/pipeline.py",
    "lgm_scale/bundle.py",
    "lgm_scale/families/generator.py",
    "lgm_scale/families/base.py",
    "lgm_scale/hub.py",
    "lgm_scale/training",
    "lgm_scale/parallel",
    "lgm_scale/frozen.py",
    "lgm_scale/weights.py",
    "lgm_scale/protocols.py",
    "lgm_scale/mean_flow.py",
    "lgm_scale/flow.py",
    "lgm_scale/layers.py",
    "lgm_scale/packing.py",
    "lgm_scale/merging",
    "lgm_scale/pixels.py",
    "lgm_scale/sampling",
    "lgm_scale/data",
    "lgm_scale/config",
    "lgm_scale/data/config.py",
    "lgm_scale/storage",
    "lgm_scale/randomness.py",
    "lgm_scale/published.py",
    "lgm_scale/start.py",
    "lgm_scale/errors.py",
]
ROOTS = {entry.split("/")[0] for entry in ORDER}

# These know neither the trainer nor the data stream nor other processes ...
PURE = (
    "lgm_scale/merging/",
    "lgm_scale/layers.py",
    "lgm_scale/packing.py",
    "lgm_scale/mean_flow.py",
    "lgm_scale/flow.py",
    "lgm_scale/pixels.py",
    "lgm_scale/frozen.py",
    "lgm_scale/sampling/",
    *(f"lgm_scale/families/{name}/network.py" for name in ("tokenizer", "lgm", "elit")),
    *(f"lgm_scale/families/tokenizer/{name}.py" for name in ("critic", "losses", "quantizer")),
    "lgm_scale/families/lgm/guidance.py",
    "lgm_scale/families/lgm/feature_alignment.py",
    "lgm_scale/families/elit/interface.py",
)
PURE_MAY_NOT = ("composer", "torch.distributed", "streaming")
# ... and these are read before the slow import of torch, to report a wrong config at once. A
# command imports torch only after that, inside a function.
TORCH_FREE = (
    "lgm_scale/bundle.py",
    "lgm_scale/config/",
    "lgm_scale/errors.py",
    "lgm_scale/families/base.py",
    "lgm_scale/families/generator.py",
    "lgm_scale/hub.py",
    *(f"lgm_scale/families/{name}/config.py" for name in ("tokenizer", "lgm", "elit")),
    "lgm_scale/families/lgm/importers.py",
    "lgm_scale/sampling/config.py",
    "lgm_scale/start.py",
    "lgm_scale/storage/",
    "lgm_scale/data/config.py",
    "lgm_scale/data/manifest.py",
    "lgm_scale/data/mixture.py",
    "lgm_scale/parallel/first_failure.py",
    "lgm_scale/published.py",
    "lgm_scale/parallel/rules.py",
    "lgm_scale/planning/hardware.py",
    "lgm_scale/planning/options.py",
    "lgm_scale/checkpoint/attempts.py",
    "lgm_scale/checkpoint/manifest.py",
    "lgm_scale/checkpoint/run_folder.py",
    "lgm_scale/assets.py",
    "lgm_scale/evaluation/features/files.py",
    "lgm_scale/evaluation/sweep/config.py",
    "lgm_scale/evaluation/sweep/rules.py",
)
TORCH_LATER = (
    "lgm_scale/train.py",
    "lgm_scale/initial_weights.py",
    *(f"lgm_scale/families/{name}/family.py" for name in ("tokenizer", "lgm", "elit")),
    *(f"lgm_scale/families/{name}/initial_weights.py" for name in ("tokenizer", "lgm", "elit")),
)

# Words of one family: its module, its networks, and whatever is called after it.
FAMILY_WORDS = re.compile(
    r"lgm_scale\.families\.(?!(base|generator)\b)\w+|\b(MergeDiT|SiT|ELIT\w*|Spatial\w+|(?!LGMError\b)LGM\w+)\b"
    r"|\b(Tokenizer(Run|TrainingModel|ModelConfig|Bundle))\b"
)
# Benchmarks time particular networks, and say which.
NAMES_NO_FAMILY = ("lgm_scale/", "eval/", "data_tools/", "launchers/", "experiments/")

MAX_LINES = 400
SMALL_LINES = 50
BANNED_NAMES = {"util", "utils", "misc", "helper", "helpers", "tmp"}


FILES = python_files()
SOURCE = {path: text for path, text in FILES.items() if path.split("/")[0] in ROOTS}
PACKAGE = [path for path in SOURCE if path.startswith("lgm_scale/")]


def room(path: str) -> str | None:
    """The entry of ORDER that a file belongs to; None for lgm_scale/__init__.py, and if none."""
    fitting = [entry for entry in ORDER if path == entry or path.startswith(f"{entry}/")]
    return max(fitting, key=len, default=None)


def upward_imports(path: str, files: dict[str, str]) -> list[str]:
    """Rooms that this file may not import, and does."""
    own, found = room(path), set()
    for other in imported_files(path, files):
        target = room(other)
        if target is None or target == own:
            continue
        if own is None or ORDER.index(target) < ORDER.index(own):
            found.add(target)
    return sorted(found)


# --- the rules, on the tree as it is ----------------------------------------------------------


def test_there_is_something_to_check():
    assert {"lgm_scale/merging/tree.py", "lgm_scale/families/lgm/network.py"} <= set(PACKAGE)
    assert "tests/unit/test_import_rules.py" in FILES
    assert len(ORDER) == len(set(ORDER))
    assert all((ROOT / entry).exists() for entry in ORDER)


def test_every_file_has_its_place_in_the_order():
    """Besides the first lines of folders that are several rooms."""
    strays = [path for path in SOURCE if room(path) is None]
    assert [path for path in strays if not path.endswith("__init__.py")] == []


def test_imports_go_down_the_order():
    upward = {path: upward_imports(path, SOURCE) for path in SOURCE if room(path) is not None}
    assert {path: rooms for path, rooms in upward.items() if rooms} == {}
    assert [path for path in SOURCE if forbidden_imports(SOURCE[path], ("tests",))] == []


def test_there_are_no_circles():
    assert circles(SOURCE) == []


def test_only_families_know_families():
    """Nothing outside names a family, its run, its network, its data set or its bundle."""
    named = {}
    for path, source in SOURCE.items():
        if path.startswith(NAMES_NO_FAMILY) and not path.startswith("lgm_scale/families/"):
            code = code_of(source) if FAMILY_WORDS.search(source) else ""
            found = {match.group(0) for match in FAMILY_WORDS.finditer(code)}
            if found:
                named[path] = sorted(found)
    assert named == {}


def test_nothing_outside_families_asks_for_a_type_of_one():
    """No `isinstance` on run, model, network or data set types."""
    asked = [
        f"{path}: {match.group(0)}"
        for path, source in SOURCE.items()
        if not path.startswith("lgm_scale/families/")
        for match in re.finditer(
            r"isinstance\([^()]*,[^()]*\b\w*(Run|Model|Bundle|Pipeline|Dataset|Network|DiT)\b",
            source,
        )
    ]
    assert asked == []


def test_networks_and_mathematics_know_no_trainer():
    pure = [path for path in PACKAGE if path.startswith(PURE)]
    assert {path for path in pure if forbidden_imports(FILES[path], PURE_MAY_NOT)} == set()


def test_torch_is_imported_neither_here_nor_through_other_modules():
    asked_by = [
        (path, name, by)
        for path in PACKAGE
        if path.startswith(TORCH_FREE + TORCH_LATER)
        for name, by in load_time_closure(path, FILES).items()
        if is_within(name, "torch")
    ]
    assert asked_by == []


def brings_composer(body: list[ast.stmt]) -> bool:
    """Whether these statements, run outside their function, would import Composer."""
    names = load_time_names("\n".join(map(ast.unparse, body)))
    paths = [path for path in (file_of(name, FILES) for name in names) if path is not None]
    names = names.union(*(load_time_closure(path, FILES) for path in paths))
    return any(is_within(name, "composer") for name in names)


def test_commands_import_composer_while_the_collector_rests():
    commands = [path for path in PACKAGE if "exit_on_user_error(main)" in SOURCE[path]]
    late, rests = set(), set()
    for path in commands:
        for node in ast.walk(ast.parse(SOURCE[path])):
            if isinstance(node, ast.FunctionDef) and brings_composer(node.body):
                late.add(path)
            resting = isinstance(node, ast.With) and ast.unparse(node.items[0]) == "heavy_imports()"
            if resting and brings_composer(node.body):
                rests.add(path)
    assert "lgm_scale/train.py" in late
    assert late == rests


def test_imports_are_absolute_and_files_short():
    assert [path for path in FILES if relative_imports(FILES[path])] == []
    assert [path for path in FILES if len(FILES[path].splitlines()) > MAX_LINES] == []


def test_no_small_file_serves_one_other_file():
    """A command serves people; whatever else is small belongs to the file that uses it."""
    users: dict[str, set[str]] = {}
    for path in SOURCE:
        for other in imported_files(path, SOURCE):
            users.setdefault(other, set()).add(path)
    lonely = [
        path
        for path, source in SOURCE.items()
        if len(source.splitlines()) <= SMALL_LINES
        and len(users.get(path, ())) == 1
        and not path.endswith("__init__.py")
        and '__name__ == "__main__"' not in source
    ]
    assert lonely == []


def test_no_module_is_named_after_nothing():
    named = [path for path in FILES if BANNED_NAMES & set(path.removesuffix(".py").split("/"))]
    assert named == []


# --- the checks can fail ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "line", "found"),
    [
        ("lgm_scale/merging/tree.py", "from lgm_scale.layers import x", ["lgm_scale/layers.py"]),
        ("lgm_scale/data/epochs.py", "import lgm_scale.training.ema", ["lgm_scale/training"]),
        ("lgm_scale/flow.py", "def f():\n    import lgm_scale.train", ["lgm_scale/train.py"]),
        ("lgm_scale/build.py", "import eval.sweep", ["eval"]),
        ("lgm_scale/families/lgm/network.py", "from lgm_scale.layers import Attention", []),
        ("lgm_scale/families/lgm/network.py", "from lgm_scale.config.loading import to_dict", []),
        ("lgm_scale/config/schema.py", "from lgm_scale.families import base",
         ["lgm_scale/families/base.py"]),
        ("lgm_scale/randomness.py", "from lgm_scale import __version__, errors", []),
    ],
)  # fmt: skip
def test_an_upward_import_is_seen(path, line, found):
    assert upward_imports(path, SOURCE | {path: line}) == found


def test_a_circle_is_seen():
    files = {
        "lgm_scale/a.py": "from lgm_scale.b import x",
        "lgm_scale/b.py": "def f():\n    from lgm_scale import c",
        "lgm_scale/c.py": "import lgm_scale.a",
        "lgm_scale/d.py": "import lgm_scale.a",
    }
    assert circles(files) == [("lgm_scale/a.py", "lgm_scale/b.py", "lgm_scale/c.py")]


@pytest.mark.parametrize(
    "line",
    [
        "from lgm_scale.families.lgm.network import x",
        "import lgm_scale.families.tokenizer.bundle",
        "x = isinstance(net, MergeDiT)",
        "def f(run: ELITRun): ...",
        "dataset: LGMLatentDataset",
    ],
)
def test_a_family_that_is_named_is_seen(line):
    assert FAMILY_WORDS.search(code_of(line))
    assert not FAMILY_WORDS.search(code_of("from lgm_scale.families.base import family_of"))
    assert not FAMILY_WORDS.search(code_of('"""MergeDiT."""\nraise LGMError("x")  # ELIT'))


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.fsdp import fully_shard",
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
        "lgm_scale/flow.py": "from lgm_scale import merging",
        "lgm_scale/merging.py": "try:\n    import torch\nexcept ImportError:\n    pass",
        "lgm_scale/config.py": "from lgm_scale.flow import interpolate",
        "lgm_scale/errors.py": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
            "def f():\n    import torch"
        ),
    }
    closures = {path: load_time_closure(path, files).get("torch") for path in files}
    assert closures["lgm_scale/config.py"] == "lgm_scale/merging.py"
    assert closures["lgm_scale/data/manifest.py"] == "lgm_scale/data/__init__.py"
    assert closures["lgm_scale/errors.py"] is None


def test_a_relative_import_is_seen():
    assert relative_imports("import json\nfrom . import dit\nfrom ..errors import LGMError") == [
        2,
        3,
    ]
