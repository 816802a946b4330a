"""Every key of every YAML file in tables, made from the schemas: `python docs/reference.py`.

What a key is comes from its dataclass: type, default, docstring. What its values may be is asked
of the rules themselves: each key gets impossible values in a recipe, and what the rules say of
them stands in the table. `mkdocs.yml` names this file as a hook, which puts the tables into
configuration.md while the site is built: there is no copy that could grow old.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launchers.cluster import SBATCH_OPTIONS, Cluster, load_cluster
from launchers.pipeline import Stage
from lgm_scale.config.loading import RECIPES, check_config, read_yaml
from lgm_scale.config.rules import broken_rules
from lgm_scale.config.schema import TrainingRun
from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.sweep import rules as sweep_rules
from lgm_scale.evaluation.sweep.config import SweepConfig
from lgm_scale.families.base import families
from lgm_scale.sampling.config import SamplerConfig

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- keys -->"
PROBES = {int: (-1, 0), float: (-1.0, 0.0, 2.0), str: ("?",)}
"""Values that rules are likely to refuse, by type; 2 for shares."""
WRONG = re.compile(r"^(?:-?[\d.]+|'?\?'?|[\[(][-\d., ]+[\])])[, ]*")
"""The impossible value, at the beginning of what is said of it."""

Refusals = Callable[[str, Any], list[str]]
"""Key and value -> what the rules say of that key, without its name."""


def docstrings(schema: type) -> dict[str, str]:
    """What stands below each field in the source, those of base classes included; "" is its own."""
    said: dict[str, str] = {}
    for owner in reversed(schema.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except (OSError, TypeError):  # made by make_dataclass
            continue
        (node,) = ast.parse(source).body
        assert isinstance(node, ast.ClassDef)
        said[""] = inspect.getdoc(owner) or ""
        for field, text in zip(node.body, node.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            said.pop(field.target.id, None)
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                said[field.target.id] = " ".join(str(text.value.value).split())
    return said


def section_of(hint: Any) -> type | None:
    """The dataclass in a type: itself, or what a list or an optional holds."""
    for inner in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(inner):
            return typing.cast(type, inner)
    return None


def type_name(hint: Any) -> str:
    """A type in YAML's words."""
    args, origin = typing.get_args(hint), typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return "keys below"
    if origin is typing.Literal:
        texts = (json.dumps(value) if isinstance(value, bool) else value for value in args)
        return " or ".join(f"`{text}`" for text in texts)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(f"`{member.value}`" for member in hint)
    if origin is types.UnionType or origin is typing.Union:
        return " or ".join("null" if each is types.NoneType else type_name(each) for each in args)
    if origin is tuple:
        entries = ", ".join(map(type_name, args))
        return f"list of {type_name(args[0])}" if args[-1] is ... else f"[{entries}]"
    if origin is dict:
        return f"{type_name(args[0])}: {type_name(args[1])}, any number"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}.get(hint, "any")


def default_of(entry: dataclasses.Field[Any]) -> str:
    """A default as YAML, or that there is none."""
    if entry.default is not dataclasses.MISSING:
        value = entry.default.value if isinstance(entry.default, Enum) else entry.default
        return f"`{json.dumps(value)}`"
    if entry.default_factory is not dataclasses.MISSING:
        value = entry.default_factory()
        return "of each key" if dataclasses.is_dataclass(value) else f"`{json.dumps(value)}`"
    example = entry.metadata.get("example")
    return "needed" if example is None else f"needed, such as `{json.dumps(example)}`"


def probes(hint: Any) -> Iterator[Any]:
    """Values of the right type that may be impossible."""
    listed = typing.get_origin(hint) is tuple
    inner = () if typing.get_origin(hint) is dict else typing.get_args(hint)
    kinds = [each for each in (hint, *inner) if each in PROBES]
    for value in PROBES[kinds[0]] if kinds else ():
        yield (value, value) if listed else value


def table(
    schema: type,
    before: str,
    refusals: Refusals,
    leave_out: Collection[str] = (),
    closed: Collection[str] = (),
) -> Iterator[str]:
    """Tables of one section and of those in it.

    Args:
        schema: Its dataclass.
        before: Its name with a dot at the end; "" for a file.
        refusals: What the rules say.
        leave_out: Keys that are not in it.
        closed: Sections of which nothing but their key is in it.
    """
    hints, said, inner = typing.get_type_hints(schema), docstrings(schema), []
    if before:
        yield f"\n#### `{before.removesuffix('.')}`\n"
    yield f"{said.get('', '')}\n"
    lines = [
        "| key | type | default | what it is | said of a wrong value |",
        "| --- |" + " --- |" * 4,
    ]
    for entry in dataclasses.fields(schema):
        if entry.name in leave_out:
            continue
        key, hint = f"{before}{entry.name}", hints[entry.name]
        section = section_of(hint)
        if section is not None and entry.name not in closed:
            each = "[]" if typing.get_origin(hint) is tuple else ""
            inner.append((section, f"{key}{each}."))
            if not each and type(None) not in typing.get_args(hint):
                continue
        kind = type_name(hint)
        default = default_of(entry)
        what = said.get(entry.name) or entry.metadata.get("help") or instead(entry.name, section)
        rules = "; ".join(dict.fromkeys(r for p in probes(hint) for r in refusals(key, p)))
        lines.append("| " + " | ".join(
            text.replace("|", "\\|") for text in (f"`{key}`", kind, default, what, rules)
        ) + " |")  # fmt: skip
    yield "\n".join(lines)
    for section, name in inner:
        yield from table(section, name, refusals)


def instead(name: str, section: type | None) -> str:
    """What is said of a key that has no words of its own."""
    if section is not None:
        return docstrings(section)[""].split("\n\n")[0].replace("\n", " ")
    if name == "task":
        return "Says which family is trained."
    if name in (*SBATCH_OPTIONS, "time"):
        return "`sbatch`'s option of this name."
    return ""


def refused(check: Callable[[], object], key: str) -> list[str]:
    """What an error says about one key."""
    try:
        check()
    except ConfigError as error:
        told = [line.split(": ", 1)[1] for line in error.problems if line.startswith(f"{key}: ")]
        return [WRONG.sub("", line).replace(f"{ROOT}/", "") for line in told]
    return []


def with_value(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A configuration with one more value, in sections that are made where they are missing."""
    *sections, last = key.split(".")
    changed = json.loads(json.dumps(values))
    node = changed
    for name in sections:
        node[name] = node.get(name) or {}
        node = node[name]
    node[last] = value
    return changed


def of_runs() -> Iterator[str]:
    """What all runs share, and each family's own keys."""
    shared = {entry.name for entry in dataclasses.fields(TrainingRun)} - {"task"}
    for number, family in enumerate(families().values()):
        schema, recipe = family.schema, recipe_of(family.task)
        refusals = functools.partial(of_run, schema, read_yaml(recipe))
        if number == 0:
            yield "## Every training\n"
            yield from table(TrainingRun, "", refusals, leave_out=["task"])
        yield f"\n## `task: {family.task}`\n"
        yield from table(schema, "", refusals, leave_out=shared)
        theirs, own = typing.get_type_hints(TrainingRun), typing.get_type_hints(schema)
        for name in [name for name in theirs if name in shared and own[name] != theirs[name]]:
            known = [entry.name for entry in dataclasses.fields(theirs[name])]
            yield from table(own[name], f"{name}.", refusals, leave_out=known)


def recipe_of(task: str) -> Path:
    """A recipe of this family, of the small ones where there is one."""
    found = sorted(RECIPES.rglob("*.yaml"), key=lambda path: path.parent.name != "quickstart")
    return next(path for path in found if read_yaml(path).get("task") == task)


def of_run(schema: type, values: dict[str, Any], key: str, value: Any) -> list[str]:
    """What a training's rules say of a value."""
    if "[]" in key:
        return []
    changed = with_value(values, key, value)
    rules = functools.partial(broken_rules, world_size=1, has_gpu=None)
    return refused(lambda: check_config(changed, schema, rules, ""), key)


def of_sweeps() -> Iterator[str]:
    """Keys of a sweep."""
    values = read_yaml(RECIPES / "quickstart" / "sweep.yaml")

    def of_sampler(key: str, value: Any) -> list[str]:
        name = key.rpartition(".")[2]
        return refused(lambda: SamplerConfig(**{name: value}), name)

    def refusals(key: str, value: Any) -> list[str]:
        changed = with_value(values, key, value)
        return refused(
            lambda: sweep_rules.check_sweep(changed, "", sweep_rules.broken_rules, {}), key
        )

    yield "\n## Sweeps\n"
    yield from table(SweepConfig, "", refusals, closed=("sampler", "cells"))
    yield from table(SamplerConfig, "sampler.", of_sampler)
    yield "\nIn a sweep each of these may be a list of values. An entry of `cells` has any of them"
    yield "and `num_tokens`, an integer or a list of integers."


def of_launchers() -> Iterator[str]:
    """Keys of clusters and of a pipeline's stages."""

    def refusals(key: str, value: Any) -> list[str]:
        def load() -> Cluster:
            return load_cluster("default", {key: value})

        return [*refused(load, key), *refused(load, f"--{key.replace('_', '-')}")]

    yield "\n## Clusters\n"
    yield from table(Cluster, "", refusals)
    yield "\n## Pipelines\n\nA file has `stages`, a section for each, and `cluster`.\n"
    yield from table(Stage, "stages.NAME.", lambda key, value: [])


def reference() -> str:
    """All of it, as Markdown."""
    return "\n".join([*of_runs(), *of_sweeps(), *of_launchers()])


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page: tables into their place, and no links out of the site."""
    if MARK in markdown:
        markdown = markdown.replace(MARK, reference())
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)


if __name__ == "__main__":
    print(reference())
