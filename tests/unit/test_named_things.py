"""What README, documents and the commands' own words name exists: files, modules, keys, options."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import shlex
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from typed_commands import typed

from lgm_scale.families.base import families, release_importers

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
ROOMS = "config|families|merging|sampling|storage|training|parallel|checkpoint|evaluation"
INNER = re.compile(rf"`((?:{ROOMS})/[\w/]+\.py)`")
PLACE = re.compile(r"`(\w+)`\s+in\s+`([\w/]+\.py)`")
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
    inner = {name for name in INNER.findall(text) if not (ROOT / "lgm_scale" / name).exists()}
    return sorted({name for name in named if not (ROOT / name).exists()} | inner)


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
def test_functions_are_where_a_page_says(page):
    for name, path in PLACE.findall(page.read_text(encoding="utf-8")):
        places = [folder / path for folder in (ROOT, ROOT / "lgm_scale")]
        source = next(place for place in places if place.exists()).read_text()
        assert re.search(rf"\b(?:def|class) {name}\b|^{name} = ", source, re.M), (name, path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_are_named_exist(page):
    assert missing_keys(page.read_text(encoding="utf-8")) == []


# --- options ----------------------------------------------------------------------------------

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")
SCRIPT = re.compile(r"(?:lgm_scale|eval|data_tools|launchers)/\w+\.py")
WORD = re.compile(r"[a-z_]+")
OTHERS = {"--shm-size", "--no-build-isolation"}
"""Of docker and of pip."""


def code_of(text: str) -> list[str]:
    """Lines of code blocks, continued ones joined, indented commands, and code spans."""
    blocks = re.findall(r"^    ((?:python|composer) .*(?:\\\n.*)*\n)", text, re.MULTILINE)
    blocks += re.findall(r"^```\w*.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [*lines, *(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))]


def command_in(line: str) -> tuple[str, list[str]] | None:
    """The module of ours that a line starts, and the words behind it."""
    words = shlex.split(line.replace("'", "") if line.count("'") % 2 else line, comments=True)
    for number, word in enumerate(words):
        before = words[number - 1] if number else ""
        if before == "-m" and MODULE.fullmatch(f"-m {word}") and not word.endswith(".NAME"):
            return word, words[number + 1 :]
        if SCRIPT.fullmatch(word) and words[0] in ("python", "composer", "torchrun", "watch"):
            return word.removesuffix(".py").replace("/", "."), words[number + 1 :]
    return None


@cache
def options_of(module: str, part: str = "") -> frozenset[str]:
    """Options that a command has, or a part of it (`release_import lora`): its own parser's."""
    if importlib.util.find_spec(f"{module}.__main__" if _is_package(module) else module) is None:
        return frozenset()
    name = f"{module}.__main__" if _is_package(module) else module
    main = importlib.import_module(name).main
    found: set[str] = set()

    def note(parser: argparse.ArgumentParser, file: object = None) -> None:
        found.update(parser._option_string_actions)

    with mock.patch.object(argparse.ArgumentParser, "print_help", note):
        said = typed(main, *filter(None, [part, "--help"]))
    assert said.status == 0, (module, part, said)
    return frozenset(found)


def _is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def unknown_options(text: str) -> list[str]:
    """Options in the code of a text that the command of their line does not have.

    Where a line has no command of ours, that none of ours has.
    """
    wrong = []
    for line in code_of(text):
        command = command_in(line)
        if command is None:
            foreign = re.match(r"(composer|torchrun|pip|kubectl|sky|py-spy|tensorboard) ", line)
            named = set() if foreign else {*OPTION.findall(line)} - OTHERS
            wrong += [f"{option} of no command" for option in named - every_option()]
            continue
        module, rest = command
        parts = [rest[0]] if _has_parts(module) and rest and WORD.fullmatch(rest[0]) else []
        has = options_of(module, *parts)
        given = {match[0] for word in rest if (match := OPTION.match(word))}
        wrong += [f"{option} of {' '.join([module, *parts])}" for option in given - has]
    return sorted(wrong)


def _has_parts(module: str) -> bool:
    return module == "lgm_scale.release_import"


@cache
def every_option() -> frozenset[str]:
    """Options of all commands that pages name."""
    modules = {
        command for page in PAGES for line in code_of(page.read_text(encoding="utf-8"))
        if (found := command_in(line)) for command in [found[0]]
    }  # fmt: skip
    parts = [options_of("lgm_scale.release_import", part) for part in release_importers()]
    return frozenset().union(*map(options_of, sorted(modules)), *parts)


@pytest.mark.parametrize("page", [*PAGES, *COMMANDS], ids=lambda page: str(page.relative_to(ROOT)))
def test_options_that_are_named_exist(page):
    assert unknown_options(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_make_that_are_named_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = code_of(page.read_text(encoding="utf-8"))
    named = {word for line in lines for word in re.findall(r"^make ([a-z-]+)", line)}
    assert named - targets == set()


def test_the_facts_under_the_name_are_those_of_the_project():
    facts = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[2].split(" \u00b7 ")
    project = (ROOT / "pyproject.toml").read_text()
    low, high = re.findall(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', project)[0]
    torch = re.findall(r'"torch==(\d+\.\d+)\.', project)[0]
    others = [path.stem.removeprefix("torch-") for path in (ROOT / "constraints").glob("torch-*")]
    assert facts[:4] == [
        f"Python 3.{low} to 3.{int(high) - 1}",
        f"torch {torch} (or {', '.join(others)})",
        f"Composer {re.findall(r'mosaicml==([0-9.]+)', project)[0]}",
        re.findall(r'license = "(.+)"', project)[0],
    ]


def test_something_wrong_is_seen():
    assert missing_paths("see yamls/nothing.yaml and yamls/dit_xl.yaml") == ["yamls/nothing.yaml"]
    assert missing_paths("`merging/nothing.py` and `merging/tree.py`") == ["merging/nothing.py"]
    assert missing_modules("python -m lgm_scale.nothing") == ["lgm_scale.nothing"]
    assert missing_keys("`train.durations` and `train.max_duration`") == ["train.durations"]
    assert sum(len(PATH.findall(page.read_text())) for page in PAGES) > 100
    assert sum(len(KEY.findall(page.read_text())) for page in PAGES) > 20
    assert len(PLACE.findall((ROOT / "docs" / "method.md").read_text())) > 3
    wrong = unknown_options(
        "`composer lgm_scale/train.py a.yaml --dryrun`, `--num-token`, `--num-tokens`\n"
        "```sh\npython -m lgm_scale.release_import lora a b \\\n    --merge-trees c\n```\n"
    )
    assert wrong == [
        "--dryrun of lgm_scale.train",
        "--merge-trees of lgm_scale.release_import lora",
        "--num-token of no command",
    ]
    assert sum(len(OPTION.findall(" ".join(code_of(p.read_text())))) for p in PAGES) > 100
