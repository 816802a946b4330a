"""The few error classes a user can meet, and how a command ends when one is raised.

A user error names the key or file, its value, the rule and the fix. It ends a command with exit
status 2 and no traceback. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "LGMError",
    "MissingAssetError",
    "SupersededError",
    "exit_on_user_error",
]

USER_ERROR_STATUS = 2


class LGMError(Exception):
    """Base of every error that a user can fix, and not only a programmer."""


class ConfigError(LGMError):
    """One or more problems of a configuration, all reported together."""

    def __init__(self, problems: str | Sequence[str], source: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        where = f" in {source}" if source else ""
        head = f"{count} problem{'s' if count > 1 else ''}{where}:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))
        self._source = source

    def __reduce__(self) -> tuple:
        """Take a copy apart into problems and source, not into the finished text.

        Ranks send each other their errors, and pickle would call the class with the text alone.
        """
        return ConfigError, (self.problems, self._source)


class DataError(LGMError):
    """Data that is missing, damaged or of the wrong kind."""


class CheckpointError(LGMError):
    """A bundle or a resume state that is damaged, foreign or does not fit."""


class MissingAssetError(LGMError):
    """A frozen file (weights, reference statistics) that the user must provide."""


class DivergenceError(LGMError):
    """A run whose losses are no numbers any more."""


class SupersededError(LGMError):
    """A process that was thought dead, while another took over its run."""


def exit_on_user_error(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and end the process: user errors as one message and status 2."""
    try:
        status = main() or 0
    except LGMError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        if os.environ.get("RANK", "0") != "0":
            # The launcher stops every rank once one has ended. Let rank 0 speak first: its
            # message is the one that reaches the console.
            time.sleep(3)
        status = USER_ERROR_STATUS
    sys.exit(status)
