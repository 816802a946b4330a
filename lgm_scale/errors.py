"""The few error classes a user can meet, and how a command ends when one is raised.

A user error names the key or file, its value, the rule and the fix. It ends a command with exit
status 2 and no traceback. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 128 + signal.SIGINT
UNREAD_STATUS = 128 + signal.SIGPIPE

_OUTSIDE = {
    errno.EACCES: "give yourself access, or name another place",
    errno.EPERM: "give yourself access, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.ENOTDIR: "name a folder",
    errno.EISDIR: "name a file",
    errno.EEXIST: "name another place, or move what is there",
    errno.ELOOP: "mend the link, which leads back to itself",
    errno.ENAMETOOLONG: "name a shorter path",
}
"""Faults of disks and paths that are nobody's bug -> what to do."""


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
    """Run a command's `main` and end the process, without a traceback where no bug of ours is.

    User errors, and files or disks that cannot be read or written, are one message and status 2.
    Ctrl-C ends with status 130 once what was begun is put away; a second one ends at once. A reader
    that has seen enough (`| head`) ends a command without a word, as any tool.
    """
    listens = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, _on_first_interrupt) if listens else None
    try:
        status = main() or 0
        sys.stdout.flush()
    except LGMError as error:
        status = _refuse(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command again makes what is missing", file=sys.stderr)
        status = INTERRUPTED_STATUS
    except BrokenPipeError:
        if _has_reader():
            raise  # a connection of ours, and no reader of what we print
        status = UNREAD_STATUS
    except OSError as error:
        if error.errno not in _OUTSIDE:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        hint = _OUTSIDE[error.errno]
        status = _refuse(f"{where}{error.strerror}; {hint}, and run the same command again")
    finally:
        if listens:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        if not _has_reader():  # else Python says at its end that it could not write
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _refuse(message: str) -> int:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    if os.environ.get("RANK", "0") != "0":
        # The launcher stops every rank once one has ended. Let rank 0 speak first: its
        # message is the one that reaches the console.
        time.sleep(3)
    return USER_ERROR_STATUS


def _has_reader() -> bool:
    """Whether somebody still reads what this process prints."""
    try:
        sys.stdout.flush()
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except BrokenPipeError:
        return False
    except (OSError, ValueError):  # it is no file, and nobody can leave
        return True
    # Unbuffered, nothing is left to be flushed; but a pipe knows that its other end is closed.
    return not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _on_first_interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, end_at_once)
    raise KeyboardInterrupt


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Handle a second Ctrl-C: the processes that this one started end first, then it does."""
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:
        child.join()
    os._exit(INTERRUPTED_STATUS)
