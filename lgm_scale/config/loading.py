"""From YAML and `key=value` overrides to typed configurations, with every problem in one error.

An unknown key, a missing one and a wrong type are told with the key, the value and the fix.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from lgm_scale.errors import ConfigError

__all__ = ["InvalidValues", "find_recipe", "load_config", "read_yaml", "to_dict"]

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

    Raises: InvalidValues (a ConfigError) with all of them. It carries the configuration with
    defaults or placeholders for the wrong entries, so that rules between keys are heard as well.
    """
    adapter = TypeAdapter(schema)
    problems, config = [], None
    try:
        config = adapter.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problems = [_explain(item, schema) for item in error.errors()]
        rest = json.loads(json.dumps(values))
        for item in error.errors():
            _repair(rest, item["loc"], schema)
        try:
            config = adapter.validate_json(json.dumps(rest), strict=True)
        except ValidationError:
            config = None
    if problems:
        raise InvalidValues(problems, source or None, config)
    assert config is not None
    return config


class InvalidValues(ConfigError):
    """Wrong keys or types; `rest` is the configuration without them, where it makes sense."""

    def __init__(self, problems: list[str], source: str | None, rest: Any) -> None:
        self.rest = rest
        super().__init__(problems, source)


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain values, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


_PLACEHOLDERS = {str: "1ep", int: 1}


def _repair(values: dict[str, Any], loc: tuple[int | str, ...], schema: type) -> None:
    """Drop the wrong entry at `loc`; a required one becomes a placeholder of its type."""
    node: Any = values
    for key in loc[:-1]:
        if not isinstance(node, dict) or not isinstance(node.get(str(key)), dict):
            break
        node, schema = node[str(key)], _field_type(schema, key)
    else:
        key = loc[-1]
    node.pop(str(key), None)
    required = {
        entry.name
        for entry in dataclasses.fields(schema)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    }
    if key in required and _field_type(schema, key) in _PLACEHOLDERS:
        node[str(key)] = _PLACEHOLDERS[_field_type(schema, key)]


def _explain(item: Any, schema: type) -> str:
    """One line for one finding of pydantic: the key, the value, the rule and the fix."""
    path = [part for part in item["loc"] if not _is_union_tag(part)]
    key = ".".join(str(part) for part in path)
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        names = _fields_at(schema, path[:-1])
        close = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(names)}"
        return f"{key}: unknown key; {hint}"
    if item["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{key}: missing, and it has no default"
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{key}: {json.dumps(item['input'])} is wrong: {message}"


def _is_union_tag(part: int | str) -> bool:
    """Pydantic names the member of a union in its path, as in ('a', 'tuple[float, ...]')."""
    return isinstance(part, str) and ("[" in part or part in ("int", "float", "str", "none"))


def _field_type(schema: type, name: int | str) -> Any:
    """Type of a field; of an optional one, the type besides None; of an entry, its tuple's."""
    if isinstance(name, int):
        return schema
    hint = typing.get_type_hints(schema).get(str(name))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0]
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _fields_at(schema: type, path: list[int | str]) -> list[str]:
    """Names of the fields of the dataclass at `path`."""
    for part in path:
        if isinstance(part, int):  # an entry of tuple[Entry, ...]
            schema = (typing.get_args(schema) or (schema,))[0]
        else:
            schema = _field_type(schema, part)
        if typing.get_origin(schema) is tuple:
            continue
        if not dataclasses.is_dataclass(schema):
            return []
    return [entry.name for entry in dataclasses.fields(schema)]
