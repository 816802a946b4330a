"""The folder of a run: whose it is, what may change, and whether the run is finished. Torch-free.

A folder belongs to a configuration from its first whole state on. Another one is refused then, with
the keys that differ, because resuming would silently mix two runs. Before that it is nobody's: a
start that failed at its data or its files claims nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lgm_scale.checkpoint.manifest import MANIFEST_NAME
from lgm_scale.config.inputs import ToCome, input_problems, nothing_to_come
from lgm_scale.config.loading import InvalidValues, load_config, to_dict, without_removed_keys
from lgm_scale.config.schema import TrainingRun
from lgm_scale.errors import ConfigError
from lgm_scale.families.base import family_of
from lgm_scale.initial_weights import is_absent
from lgm_scale.storage.clients import is_remote
from lgm_scale.storage.files import write_json, write_whole

CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"
HISTORY_NAME = "history.json"

_DURATION = "train.max_duration"
_FREE_KEYS = (
    "logging.",
    "data.num_workers",
    "data.cache",  # and cache_limit
    "data.predownload",
    "data.timeout",
    "data.retry_seconds",
    "checkpoint.interval",
    "checkpoint.keep",
    "crop_on",
    "evaluation",
    "parallel.",
)
"""Keys that do not change what a run computes, and so may change between resumes. (The micro-batch
is none of them: some losses of a tokenizer are nonlinear in it.)"""

_ON_REQUEST = (
    "optimizer.lr",
    "optimizer.min_lr",
    "optimizer.schedule",
    "optimizer.warmup",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "objective.",
    "assets.",
    "train.precision",
    "train.compile",
    "train.attention",
    "train.float8",
    "train.device_microbatch_size",
    "train.device_microbatch_tokens",
)
"""Keys that change what later steps compute and not what a state means: weights, moments, averages,
the place in the data and the draws of every step stay what they are. `--allow-change` is for them.
(Other betas or another decay of the average would change what the moments and the average are.)"""

_COMPILE = "train.compile"
_OLDER_DEFAULTS = {_COMPILE: False, "objective.mean_flow.adaptive": 0.0}
"""What a record that lacks a key means, where the key's default is another one by now."""

Changes = dict[str, dict[str, Any]]
"""Key -> {"from": value, "to": value}."""


class RunFolder:
    """The folder `out`, with config.json, metrics.jsonl, state/ (to resume) and bundle/ (result).

    Where a run started from a bundle, history.json has what it took; where it was changed on
    purpose, the changes and the steps they follow.

    Args:
        path: The folder; it need not exist.
        config: The run that is to live there.
        allowed: Keys of `--allow-change`.
    """

    def __init__(self, path: Path, config: TrainingRun, allowed: Sequence[str] = ()) -> None:
        self.path = path
        self.config = config
        self.allowed = tuple(allowed)
        self.bundle = path / "bundle"

    def start_problems(self, to_come: ToCome = nothing_to_come) -> list[str]:
        """Lines about all that hinders a start here: the folder, data, bundles, files of others."""
        try:
            problems, finished = [], self.finished()
            changes = self.changes()
            if finished and changes:
                problems.append(
                    f"{', '.join(changes)}: changed, but the run is finished after "
                    f"{self.config.train.max_duration}; to go on, make {_DURATION} larger"
                )
        except ConfigError as error:
            problems, finished = error.problems, False
        return problems + ([] if finished else list(input_problems(self._inputs(), to_come)))

    def _inputs(self) -> TrainingRun:
        """The configuration without the bundle that a run with a state does not read again."""
        config = self.config
        if config.init_from is None:
            return config
        try:
            begun = self._begun() is not None
        except ConfigError:  # told as a problem of the folder
            begun = False
        # Whether there is a state in object storage is found out when that is opened.
        elsewhere = is_remote(config.checkpoint.folder or "") and is_absent(config.init_from)
        return dataclasses.replace(config, init_from=None) if begun or elsewhere else config

    def finished(self) -> bool:
        """Whether this very run has ended. Raises: ConfigError if another run lives here."""
        grown = _DURATION in self.changes() or not self.complete()
        return (self.bundle / "bundle.json").is_file() and not grown

    def complete(self) -> bool:
        """Whether the last result, if there is one, is that of the duration that is wanted now."""
        history = self.history()
        durations = [entry["result"] for entry in history if "result" in entry]
        grown = any(_DURATION in entry.get("changes", {}) for entry in history)
        return not grown or durations[-1:] == [self.config.train.max_duration]

    def changes(self) -> Changes:
        """What differs from the run that lives here, and may. Raises: ConfigError if more does."""
        there = self._begun()
        return {} if there is None else self.compare(there, f"out: {self.path}")

    def compare(self, there: dict[str, Any], where: str) -> Changes:
        """What differs from a recorded configuration, and may.

        Args:
            there: The record, of whatever version. A key that it does not know counts with its
                default.
            where: Key and value of what holds the run, for the message.

        Raises: ConfigError with every key that may not differ, and with what can be done.
        """
        fixed = family_of(self.config).fixed_keys
        on_request = [key for key in self.allowed if _is_one(key, _ON_REQUEST, fixed)]
        problems = [
            f"--allow-change {key}: it cannot change within a run; these can: "
            f"{', '.join(_ON_REQUEST)} ({_DURATION} may grow without being asked for)"
            for key in self.allowed
            if key not in on_request and key != _DURATION
        ]
        changes, asked = {}, []
        for key, (old, new) in differing(there, self.config).items():
            if key in on_request or (key == _DURATION and _grows(old, new)):
                changes[key] = {"from": old, "to": new}
                continue
            problems.append(f"{key}: {old!r} there, {new!r} here")
            asked.append(key)
        if asked:
            ways = "choose another folder, or delete it"
            if all(_is_one(key, _ON_REQUEST, fixed) for key in asked):
                flags = " ".join(f"--allow-change {key}" for key in asked)
                ways = f"go on from its last state with the new values by adding `{flags}`, {ways}"
            elif asked == ["init_from"]:
                ways = f"its states do not read a bundle again: leave the key as it was; or {ways}"
            elif asked == [_DURATION]:
                ways = f"{_DURATION} may grow, in the same unit; or {ways}"
            problems.append(f"{where} holds a run with another configuration; {ways}")
        if problems:
            raise ConfigError(problems)
        return changes

    def claim(self) -> None:
        """Make the folder this run's. Raises: ConfigError if another run lives here, or none can.

        What is changed on purpose is written once a state is loaded, with `record`.
        """
        changes = self.changes()
        if not changes:
            try:
                write_whole(self.path / CONFIG_NAME, _text(self.config))
            except OSError as error:
                raise ConfigError(
                    f"out: {self.path} cannot be written ({error.strerror}); choose another "
                    "folder, or mend this one"
                ) from error

    def history(self) -> list[dict[str, Any]]:
        """The start from a bundle, changes on purpose, and ends since; empty for most runs."""
        path = self.path / HISTORY_NAME
        return json.loads(path.read_text()) if path.is_file() else []

    def record_start(self, start: Mapping[str, Any] | None) -> None:
        """Note what a run without a state takes from `init_from`; None: it starts from nothing."""
        history = self.history()
        kept = [entry for entry in history if "init_from" not in entry]
        entry = [] if start is None else [{"time": int(time.time()), **start}]
        if entry or len(kept) < len(history):
            write_json(self.path / HISTORY_NAME, [*kept, *entry])

    def start(self) -> dict[str, Any] | None:
        """What `record_start` noted, if the run started from a bundle."""
        found = [entry for entry in self.history() if "init_from" in entry]
        return found[-1] if found else None

    def record(self, changes: Mapping[str, Any], after_step: int) -> None:
        """Note changes and the step that they follow; from here on they are the run's own."""
        entry = {"time": int(time.time()), "after_step": after_step, "changes": dict(changes)}
        write_json(self.path / HISTORY_NAME, [*self.history(), entry])
        write_whole(self.path / CONFIG_NAME, _text(self.config))

    def begun_compiled(self) -> bool | None:
        """`train.compile` of the run that lives here; None where there is none yet."""
        there = self._begun()
        return None if there is None else compiled(there)

    def record_result(self) -> None:
        """Note that there is a result, if the run's duration was changed before."""
        history = self.history()
        if history:
            entry = {"time": int(time.time()), "result": self.config.train.max_duration}
            write_json(self.path / HISTORY_NAME, [*history, entry])

    def _begun(self) -> dict[str, Any] | None:
        """Configuration of the run that lives here: it has a state that is whole, or a result.

        Raises: ConfigError if nothing can live here, or the configuration is damaged.
        """
        path, problem = self.path / CONFIG_NAME, _unfit(self.path)
        if problem:
            raise ConfigError(f"out: {self.path} {problem}; choose another folder")
        if not path.is_file():
            return None
        try:
            there = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}); choose another `out`") from error
        location = (there.get("checkpoint") or {}).get("folder") or str(self.path / "state")
        if (self.bundle / "bundle.json").is_file():
            begun = True
        elif is_remote(location):  # its first line of log comes before its first state
            metrics = self.path / METRICS_NAME
            begun = metrics.is_file() and metrics.stat().st_size > 0
        else:
            begun = any(Path(location).glob(f"ba*/{MANIFEST_NAME}"))
        return there if begun else None


def compiled(there: dict[str, Any]) -> bool:
    """`train.compile` of a recorded configuration; a start settles `auto` before it records."""
    return there.get("train", {}).get("compile", _OLDER_DEFAULTS[_COMPILE]) is True


def differing(there: dict[str, Any], config: TrainingRun) -> dict[str, tuple[Any, Any]]:
    """Key -> (recorded value, value now) where they differ, except for keys that may.

    A key that the record does not know, because it is younger, counts with its default; and
    `train.compile: auto` is whatever the record says.
    """
    old = _flatten(there)
    try:
        known = load_config(without_removed_keys(there, type(config)), type(config))
    except InvalidValues as error:  # it has keys that this version does not know: they are told
        if error.rest is not None:
            old = _with_defaults(error.rest, old) | old
    else:
        old = _with_defaults(known, old)
    new = _flatten(to_dict(config))
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not key.startswith(_FREE_KEYS)
        and not (key == _COMPILE and new.get(key) == "auto")
    }


def _with_defaults(known: Any, recorded: dict[str, Any]) -> dict[str, Any]:
    """All keys of a configuration; of those that the record lacks, what they meant at its time."""
    keys = _flatten(to_dict(known))
    older = _OLDER_DEFAULTS.items()
    return keys | {key: value for key, value in older if key in keys and key not in recorded}


def _unfit(folder: Path) -> str | None:
    """Why nothing can be written at a folder that need not exist; None where it can."""
    if os.path.lexists(folder) and not folder.is_dir():
        return "is a file, or a link that leads nowhere"
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        return f"lies below {there}, which is a file"
    return None if os.access(there, os.W_OK | os.X_OK) else f"cannot be written in {there}"


def _is_one(key: str, keys: Sequence[str], fixed: Sequence[str]) -> bool:
    """Whether a key is among `keys`, where an entry that ends in a dot is a whole section."""
    inside = any(key.startswith(known) if known[-1] == "." else key == known for known in keys)
    return inside and key not in fixed


def _grows(old: Any, new: Any) -> bool:
    """Whether a duration becomes longer, in the same unit."""
    times = [re.fullmatch(r"(\d+)(ep|ba)", str(value)) for value in (old, new)]
    first, second = times
    return bool(first and second and first[2] == second[2] and int(first[1]) < int(second[1]))


def _text(config: TrainingRun) -> str:
    return json.dumps(to_dict(config), indent=1) + "\n"


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
