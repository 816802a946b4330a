"""Mistakes that people make, made by rule: of every key of a configuration, of every option.

A mistake is a command line that is right but for one thing, and the word that its refusal must
hold. `test_mistakes` makes them all, and can print them as a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints
from unittest import mock

from typed_commands import Said

Main = Callable[[], int | None]


class Mistake(NamedTuple):
    """What was typed in place of what is right, and what the refusal must name: `this|or that`."""

    what: str
    args: list[str]
    named: str

    def complaint(self, said: Said) -> str | None:
        """What is wrong with how the command ended; None: it was refused as it should be."""
        names = self.named.split("|")
        names += [name.lstrip("-").replace("-", "_") for name in names]
        text = said.err + said.out
        if said.status != 2:
            return f"{self.what}: status {said.status}: {self.args}\n{text[-600:]}"
        if "Traceback" in text:
            return f"{self.what}: a traceback: {self.args}\n{text[-600:]}"
        if not any(name in said.err for name in names):
            return f"{self.what}: {self.named} is not named: {self.args}\n{said.err[-600:]}"
        return None


# --- keys of configurations -----------------------------------------------------------------------


def keys_of(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a configuration that holds a value, with its type; sections opened."""
    for name, hint in get_type_hints(schema).items():
        if get_origin(hint) is typing.ClassVar:
            continue
        bare = _without_none(hint)
        if dataclasses.is_dataclass(bare):
            yield from keys_of(typing.cast(type, bare), f"{prefix}{name}.")
        else:
            yield prefix + name, bare


def wrong_values(hint: Any) -> Iterator[tuple[str, str]]:
    """Values that a key of this type cannot have: what is wrong with each, and its YAML."""
    if hint in (int, float):
        yield "a word", "many"
        yield "below any range", "-7" if hint is int else "-7.5"
        yield "a list", "[1, 2]"
    if hint is int:
        yield "a fraction", "1.5"
        yield "text", '"3"'
    if hint is float:
        yield "no number", ".nan"
        yield "infinite", ".inf"
    if hint is bool:
        yield "a word", "perhaps"
        yield "a number", "3"
    if get_origin(hint) is Literal:
        yield "another word", "nonsense"
        yield "a number", "-12"
    if get_origin(hint) is tuple:
        yield "no list", "nonsense"
        yield "a list of lists", "[[[]]]"
    if hint is str:
        yield "a number", "12"
        yield "nothing", "''"


def misspelt(key: str) -> str:
    """The key with its last two letters the other way round."""
    head, last = key[:-2], key[-2:]
    return head + (last[::-1] if last[0] != last[1] else last + "s")


def mistakes_of_keys(
    schema: type,
    before: list[str],
    beside: dict[str, list[str]],
    free: tuple[str, ...],
    like: type | None = None,
) -> Iterator[Mistake]:
    """Every key misspelt, and with every wrong value of its type.

    Args:
        schema: Class of the configuration.
        before: What comes before on the command line.
        beside: Beginning of keys -> what must be given with them.
        free: Keys of numbers of any sign.
        like: A configuration whose mistakes are made elsewhere: keys of the same name and type
            are left out, for one class of their section reads both.
    """
    known = dict(keys_of(like)) if like is not None else {}
    for key, hint in keys_of(schema):
        if key in known and known[key] == hint:
            continue
        near = [word for name, words in beside.items() if key.startswith(name) for word in words]
        wrong = misspelt(key)
        yield Mistake(f"{key} misspelt", [*before, *near, f"{wrong}=1"], wrong)
        for what, value in wrong_values(hint):
            if not (key in free and what == "below any range"):
                yield Mistake(f"{key} is {what}", [*before, *near, f"{key}={value}"], key)


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (typing.Union, types.UnionType):
        rest = [part for part in get_args(hint) if part is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


# --- options of commands --------------------------------------------------------------------------


class Command(NamedTuple):
    """A command that works as it is given here.

    Args:
        given: Option, or name of a positional argument -> its values.
        reads: Those that name a file or a folder to be read -> which of both.
        writes: Those that name what will be written.
        words: Those that take a name -> one that there is not.
        free: Numbers that may have any sign.
    """

    main: Main
    given: dict[str, list[str]]
    reads: Mapping[str, str] = MappingProxyType({})
    writes: tuple[str, ...] = ()
    words: Mapping[str, str] = MappingProxyType({})
    free: tuple[str, ...] = ("--seed",)
    before: tuple[str, ...] = ()
    """Words in front: a subcommand."""

    def args(self, **changes: list[str] | None) -> list[str]:
        """The command line, with other values; None leaves an option out."""
        given = {k: v for k, v in (self.given | changes).items() if v is not None}
        places = [word for key, words in given.items() if key[0] != "-" for word in words]
        options = [[key, *words] for key, words in given.items() if key[0] == "-"]
        return [*self.before, *places, *(word for option in options for word in option)]


def mistakes_of_options(command: Command, at: Path) -> Iterator[Mistake]:
    """Every option left out, with a wrong value, with a file that is none of its kind.

    Args:
        command: One that works.
        at: A folder for things that are no good.
    """
    at.mkdir()
    (at / "file.txt").write_text("Dear diary\n")
    yield Mistake("an option misspelt", [*command.args(), "--frobnicate"], "--frobnicate")
    for action in _options(command):
        key = _name(action)
        if action.required and key in command.given:
            yield Mistake(f"{key} left out", command.args(**{key: None}), _shown(action))
        kinds: Any = {int: int, float: float}.get(action.type)
        rest = ["0.5"] * (action.nargs - 1) if isinstance(action.nargs, int) else []
        values = [("another word", "nonsense")] if action.choices else [*wrong_values(kinds)]
        for what, value in values:
            if key in command.free and what == "below any range":
                continue
            words = [value.strip('".'), *rest] if what != "text" else None
            if words is not None:
                yield Mistake(f"{key} is {what}", command.args(**{key: words}), key)
    for key, kind in command.reads.items():
        for what, path in bad_inputs(at, kind):
            yield Mistake(
                f"{key} is {what}", command.args(**{key: [str(path)]}), f"{path.name}|{key}"
            )
    for key, word in command.words.items():
        yield Mistake(f"{key} is {word}", command.args(**{key: [word]}), word)
    for key in command.writes:
        path = at / "file.txt" / "below"
        yield Mistake(f"{key} is below a file", command.args(**{key: [str(path)]}), "file.txt")


def bad_inputs(at: Path, kind: str) -> Iterator[tuple[str, Path]]:
    """Paths that are no file, or no folder, of anybody's; what is wrong with each."""
    (at / "empty.file").write_bytes(b"")
    (at / "bytes.file").write_bytes(bytes(range(256)) * 8)
    (at / "empty.folder").mkdir(exist_ok=True)
    yield "not there", at / "nowhere"
    if kind == "folder":
        yield "a file", at / "file.txt"
        yield "an empty folder", at / "empty.folder"
    else:
        yield "a folder", at / "empty.folder"
        yield "empty", at / "empty.file"
        yield "bytes without a meaning", at / "bytes.file"
        yield "a text", at / "file.txt"


def damaged(folder: Path, at: Path, unread: str = "") -> Iterator[tuple[str, Path, str]]:
    """Copies of a folder of which one file is gone, empty or of other bytes; that file's name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != unread)
    for number, path in enumerate(files):
        for what in ("missing", "empty", "other bytes"):
            copy = at / f"{number}-{what.replace(' ', '-')}"
            shutil.copytree(folder, copy)
            file = copy / path.relative_to(folder)
            file.unlink()
            if what != "missing":
                file.write_bytes(b"" if what == "empty" else bytes(range(256)) * 8)
            yield f"{path.relative_to(folder)} {what}", copy, path.name


class _Found(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _options(command: Command) -> list[argparse.Action]:
    def found(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Found(parser)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", found),
        mock.patch.object(argparse.ArgumentParser, "parse_known_intermixed_args", found),
        mock.patch("sys.argv", ["command", *command.args()]),
    ):
        try:
            command.main()
        except _Found as caught:
            parser = caught.parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parser = action.choices[command.before[0]]
    return [action for action in parser._actions if action.nargs != 0]


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else action.dest


def _shown(action: argparse.Action) -> str:
    """Its name in messages of argparse."""
    return _name(action) if action.option_strings else str(action.metavar or action.dest)
