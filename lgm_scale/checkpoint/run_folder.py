"""The folder of a run: whose it is, and whether the run is finished. Free of torch.

A folder belongs to one configuration. Another one under the same folder is refused with the keys
that differ, because resuming would silently mix two runs.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from lgm_scale.config.loading import load_config, to_dict, without_removed_keys
from lgm_scale.config.schema import TrainingRun
from lgm_scale.errors import ConfigError
from lgm_scale.storage.files import write_whole

__all__ = ["RunFolder"]

CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"

_FREE_KEYS = (
    "logging.",
    "data.num_workers",
    "data.cache",  # and cache_limit
    "data.predownload",
    "data.timeout",
    "data.retry_seconds",
    "checkpoint.interval",
    "checkpoint.keep",
    "evaluation",
    "parallel.",
)
"""Keys that do not change what a run computes, and so may change between resumes. (The micro-batch
is none of them: some losses of a tokenizer are nonlinear in it.)"""


class RunFolder:
    """The folder `out`, with config.json, metrics.jsonl, state/ (to resume) and bundle/ (result).

    Args:
        path: The folder; it need not exist.
        config: The run that is to live there.
    """

    def __init__(self, path: Path, config: TrainingRun) -> None:
        self.path = path
        self.config = config
        self.bundle = path / "bundle"

    def finished(self) -> bool:
        """Whether this very run has ended. Raises: ConfigError if another run lives here."""
        self._check()
        return (self.bundle / "bundle.json").is_file()

    def claim(self) -> None:
        """Make the folder this run's. Raises: ConfigError if another run lives here."""
        self._check()
        write_whole(self.path / CONFIG_NAME, json.dumps(to_dict(self.config), indent=1) + "\n")

    def _check(self) -> None:
        path = self.path / CONFIG_NAME
        if not path.is_file():
            return
        try:
            there = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}); choose another `out`") from error
        differing = differing_keys(there, self.config)
        if differing:
            raise ConfigError(
                differing,
                f"out: {self.path} holds a run with another configuration; choose another `out` "
                "or delete it",
            )


def differing_keys(there: dict[str, Any], config: TrainingRun) -> list[str]:
    """One line for each key in which a recorded configuration differs, except those that may.

    A key that the record does not know, because it is younger, counts with its default.
    """
    with contextlib.suppress(ConfigError):  # it has keys that are gone; they will be told
        there = to_dict(load_config(without_removed_keys(there, type(config)), type(config)))
    old, new = _flatten(there), _flatten(to_dict(config))
    return [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_FREE_KEYS)
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
