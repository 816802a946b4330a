"""What README, documents and the commands' own words name exists: files, modules, keys."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from lgm_scale.families.base import families

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    path
    for folder in ("lgm_scale", "launchers", "data_tools", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "exit_on_user_error(main)" in path.read_text()
]
FOLDERS = "yamls|docs|eval|data_tools|launchers|experiments|benchmarks|tests|lgm_scale"
PATH = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*\w")
MODULE = re.compile(r"-m ((?:lgm_scale|eval|data_tools|launchers|experiments|benchmarks)[\w.]*)")
SECTIONS = "data|train|optimizer|parallel|lengths|objective|logging|checkpoint|ema|evaluation|lora"
KEY = re.compile(rf"(?<![\w/.])(?:{SECTIONS})\.[a-z_]+(?:\.[a-z_]+)*(?![\w/(]|\.py)")
YOURS = {"yamls/my_training_sweep.yaml", "yamls/cluster/mine.yaml"}
"""Files that a page tells the reader to write."""
NO_KEYS = re.compile(
    r"data\.(epochs|preparation|npy)\b.*|evaluation\.commands\b.*|(train|data)\.py"
)


def missing_paths(text: str) -> list[str]:
    """Files of the checkout that a text names and that are not there."""
    named = {name for name in PATH.findall(text) if "..." not in name} - YOURS
    named -= {name for name in named if name.endswith("_")}  # the beginning of several
    return sorted(name for name in named if not (ROOT / name).exists())


def missing_modules(text: str) -> list[str]:
    """Modules that `-m` names and that are not there."""
    named = {name.rstrip(".") for name in MODULE.findall(text) if not name.endswith(".NAME")}
    return sorted(name for name in named if importlib.util.find_spec(name) is None)


def keys_of(schema: type, before: str = "") -> Iterator[str]:
    """Every key of a configuration, sections included."""
    hints = typing.get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        yield f"{before}{entry.name}"
        hint = hints[entry.name]
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from keys_of(typing.cast(type, inner), f"{before}{entry.name}.")


KEYS = {key for family in families().values() for key in keys_of(family.schema)}


def missing_keys(text: str) -> list[str]:
    """Keys in code spans of a text that no family's configuration has."""
    spans = " ".join(re.findall(r"`([^`\n]+)`", text))
    named = {key for key in KEY.findall(spans) if not NO_KEYS.fullmatch(key)}
    return sorted(named - KEYS)


@pytest.mark.parametrize("page", [*PAGES, *COMMANDS], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_modules_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    assert missing_paths(text) == []
    assert missing_modules(text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_are_named_exist(page):
    assert missing_keys(page.read_text(encoding="utf-8")) == []


def test_something_wrong_is_seen():
    assert missing_paths("see yamls/nothing.yaml and yamls/dit_xl.yaml") == ["yamls/nothing.yaml"]
    assert missing_modules("python -m lgm_scale.nothing") == ["lgm_scale.nothing"]
    assert missing_keys("`train.durations` and `train.max_duration`") == ["train.durations"]
    assert sum(len(PATH.findall(page.read_text())) for page in PAGES) > 100
    assert sum(len(KEY.findall(page.read_text())) for page in PAGES) > 20
