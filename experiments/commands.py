"""Commands of an experiment. Those of the repository run in forks of one server.

A run of a comparison may last a minute, and to import everything takes ten seconds of it: the
server does that once. A fork is a process of its own; how it ends is how the command ends.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from experiments.config import fill
from lgm_scale.errors import DataError

_SERVER = multiprocessing.get_context("forkserver")
_IMPORTS = (
    "composer",
    "streaming",
    "timm",
    "lgm_scale.build",
    "lgm_scale.evaluation.sweep.measure",
)


def words(command: str, record: Mapping[str, Any]) -> list[str]:
    """The words of a command, filled in after they were split; `python` is this interpreter."""
    first, *rest = (fill(word, record) for word in shlex.split(command))
    return [sys.executable if first == "python" else first, *rest]


def call(command: Sequence[str]) -> None:
    """Show a command and run it. Raises: DataError if it fails."""
    text = shlex.join(command)
    print("$", text, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        status = _forked(command[1:], said) if is_ours(command) else _started(command, said)
        if status != 0:
            raise DataError(f"{text}: stopped with an error:\n{said.read_text()[-3000:]}")


def is_ours(command: Sequence[str]) -> bool:
    """Whether a fork can run it: a script or module, in one process (composer without -n)."""
    first, *rest = [*command, ""]
    if first == "composer":
        return rest[0].endswith(".py")
    return first == sys.executable and (rest[0] == "-m" or rest[0].endswith(".py"))


def _started(command: Sequence[str], said: Path) -> int:
    with said.open("wb") as file:
        return subprocess.run(command, check=False, stdout=file, stderr=file).returncode


def _forked(args: Sequence[str], said: Path) -> int:
    _SERVER.set_forkserver_preload(list(_IMPORTS))
    target = (list(args), said, dict(os.environ))
    process = _SERVER.Process(target=_become, args=target)
    process.start()
    process.join()
    return process.exitcode or 0


def _become(args: list[str], said: Path, environment: dict[str, str]) -> None:
    """Run a script, or `-m` and a module, here, as the interpreter would."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sink = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # the default, for workers of its own
    # Its shared memory, too, is looked after by a process of its own, as in any interpreter.
    tracker: Any = resource_tracker._resource_tracker
    tracker._fd = None
    is_module = args[0] == "-m"
    what, *rest = args[1:] if is_module else args
    sys.argv = [what, *rest]
    if is_module:
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")


def _end_with_parent() -> None:
    """Stop as a signal stops a command, once whoever asked for it is gone, killed or not.

    Otherwise it would go on alone, and the experiment started anew would find its folder in use.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
