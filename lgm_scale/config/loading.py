"""From YAML and `key=value` overrides to typed configurations, with every problem in one error.

An unknown key, a missing one and a wrong type are told with the key, the value and the fix.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from lgm_scale.errors import ConfigError

RunConfig = TypeVar("RunConfig")

RECIPES = Path(__file__).resolve().parents[1] / "yamls"
"""Folder of the recipes that come with the package."""


def find_recipe(path: str | Path) -> Path:
    """The file at `path`, or else the recipe of the package with this name.

    `yamls/dit_xl.yaml` and `dit_xl.yaml` both name a recipe; a file of one's own goes first.

    Raises: ConfigError that says where it looked and which recipes have a similar name.
    """
    if Path(path).is_file():
        return Path(path)
    name = str(path).removeprefix("yamls/")
    recipes = {str(found.relative_to(RECIPES)): found for found in sorted(RECIPES.rglob("*.yaml"))}
    if name in recipes:
        return recipes[name]
    close = difflib.get_close_matches(name, recipes, n=3, cutoff=0.6)
    hint = f" (did you mean yamls/{' or yamls/'.join(close)}?)" if close else ""
    raise ConfigError(
        f"config: {path} is not a file: neither {Path(path).absolute()} nor a recipe of {RECIPES} "
        f"is there{hint}; give a YAML file"
    )


def read_yaml(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Read a YAML file and apply `key=value` overrides.

    Args:
        path: The file, or the name of a recipe of the package (see `find_recipe`).
        overrides: `key=value` strings; a key may hold dots.

    Raises: ConfigError for a missing or malformed file and for overrides that do not parse.
    """
    path = find_recipe(path)
    malformed = [item for item in overrides or [] if "=" not in item.lstrip("-")]
    if malformed:
        raise ConfigError([f"override {item!r}: write it as key=value" for item in malformed])
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise ConfigError(f"{path}: must hold `key: value` lines")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(overrides or []))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    return typing.cast(dict[str, Any], values)


def load_config(values: dict[str, Any], schema: type[RunConfig], source: str = "") -> RunConfig:
    """Turn plain values into a typed configuration, or report every problem at once.

    Raises: InvalidValues (a ConfigError) with all of them.
    """
    adapter = _adapter(schema)
    try:
        return adapter.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problems = [_explain(item, schema) for item in error.errors()]
        wrong = [item["loc"] for item in error.errors()]
    raise InvalidValues(problems, source or None, _without(values, wrong, adapter, schema))


_adapter = cache(TypeAdapter)  # of a run's schema it takes 20 ms


def check_config(
    values: dict[str, Any],
    schema: type[RunConfig],
    rules: Callable[[RunConfig], Iterable[str]],
    source: str,
) -> RunConfig:
    """Do what `load_config` does, and tell every rule that is broken in the same error.

    Args:
        values: Plain values, as read from YAML.
        schema: Dataclass of the configuration.
        rules: Configuration -> lines `key: value; rule; fix`. It is also heard where values are
            wrong, on the configuration as it would be without them.
        source: Where the values were read.

    Raises: ConfigError with every problem.
    """
    problems: list[str] = []
    config: RunConfig | None
    try:
        config = load_config(values, schema, source)
    except InvalidValues as error:
        problems, config = error.problems, error.rest
    if config is not None:
        told = {problem.split(":")[0] for problem in problems}
        problems += [line for line in rules(config) if line.split(":")[0] not in told]
    if problems or config is None:
        raise ConfigError(problems, source)
    return config


class InvalidValues(ConfigError):
    """Wrong keys or types.

    Attributes:
        rest: The configuration without the wrong entries: with their defaults, or where a key has
            none with the example that its schema gives. None where that is no configuration.
    """

    def __init__(self, problems: list[str], source: str | None, rest: Any) -> None:
        self.rest = rest
        super().__init__(problems, source)


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain values, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def without_removed_keys(values: dict[str, Any], schema: type) -> dict[str, Any]:
    """A recorded configuration of an earlier version, without keys that are gone by now.

    A section or a list stays, and is refused as unknown: what it asked for is gone, too.
    """
    kept = {}
    for key, value in values.items():
        if key in getattr(schema, "removed", {}) and not isinstance(value, dict | list):
            continue
        inner = _field_type(schema, key) if dataclasses.is_dataclass(schema) else None
        nested = isinstance(value, dict) and dataclasses.is_dataclass(inner)
        kept[key] = without_removed_keys(value, inner) if nested else value  # type: ignore[arg-type]
    return kept


def _without(
    values: dict[str, Any], wrong: list[tuple[int | str, ...]], adapter: TypeAdapter, schema: type
) -> Any:
    """The configuration without the entries at these places; None if that is none."""
    rest = json.loads(json.dumps(values))
    for place in wrong:
        _replace(rest, place, schema)
    try:
        return adapter.validate_json(json.dumps(rest), strict=True)
    except ValidationError:
        return None


def _replace(values: dict[str, Any], place: tuple[int | str, ...], schema: Any) -> None:
    """Drop the entry at a place; where its schema gives an example, that stands there instead."""
    node: Any = values
    for key in place[:-1]:
        if not isinstance(node, dict) or not isinstance(node.get(str(key)), dict):
            break  # the place is inside a list: the list is dropped whole
        node, schema = node[str(key)], _field_type(schema, key)
    else:
        key = place[-1]
    node.pop(str(key), None)
    example = _example(schema, str(key))
    if example is not None:
        node[str(key)] = example


def _example(schema: Any, key: str) -> Any:
    """What `required` says would do; None for keys with a default."""
    fields = {entry.name: entry for entry in dataclasses.fields(schema)}
    return fields[key].metadata.get("example") if key in fields else None


def _explain(item: Any, schema: type) -> str:
    """One line for one finding of pydantic: the key, the value, the rule and the fix."""
    path = [part for part in item["loc"] if not _is_union_tag(part)]
    key = ".".join(str(part) for part in path)
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        names = _fields_at(schema, path[:-1])
        removed = _removed_at(schema, path[:-1]).get(str(path[-1]))
        if removed is not None:
            return f"{key}: is gone; {removed}"
        close = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(names)}"
        return f"{key}: unknown key; {hint}"
    if item["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{key}: missing, and it has no default{_for_example(schema, path)}"
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{key}: {json.dumps(item['input'])} is wrong: {message}"


def _is_union_tag(part: int | str) -> bool:
    """Pydantic names the member of a union in its path, as in ('a', 'tuple[float, ...]')."""
    return isinstance(part, str) and ("[" in part or part in ("int", "float", "str", "none"))


_hints = cache(typing.get_type_hints)


def _field_type(schema: Any, name: int | str) -> Any:
    """Type of a field; of an optional one, the type besides None; of an entry, its tuple's."""
    if isinstance(name, int):
        return schema
    hint = _hints(schema).get(str(name))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0]
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _section_at(schema: Any, path: list[int | str]) -> Any:
    """The dataclass at `path`; None where there is none."""
    for part in path:
        if isinstance(part, int):  # an entry of tuple[Entry, ...]
            schema = (typing.get_args(schema) or (schema,))[0]
        else:
            schema = _field_type(schema, part)
        if typing.get_origin(schema) is tuple:
            continue
        if not dataclasses.is_dataclass(schema):
            return None
    return schema


def _fields_at(schema: Any, path: list[int | str]) -> list[str]:
    """Names of the fields of the dataclass at `path`."""
    section = _section_at(schema, path)
    return [] if section is None else [entry.name for entry in dataclasses.fields(section)]


def _removed_at(schema: Any, path: list[int | str]) -> dict[str, str]:
    """Keys that the dataclass at `path` had once -> what to write instead."""
    return getattr(_section_at(schema, path), "removed", {})


def _for_example(schema: Any, path: list[int | str]) -> str:
    section = _section_at(schema, path[:-1])
    example = None if section is None else _example(section, str(path[-1]))
    return "" if example is None else f"; for example {json.dumps(example)}"
