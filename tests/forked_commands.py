"""The project's commands in processes of their own, without paying for the imports each time.

A command runs as `__main__` in a process that is forked from the server of `rank_processes`: it
has its own environment, signal handlers, torch defaults and shared memory, can be killed, and ends
as an interpreter ends. Only the modules are there already. Where a fresh interpreter is the point,
`small_pipeline.run_command(..., fresh=True)` starts one; where composer's launcher is, it runs here
as any command, prepared with `fork_ranks`.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.util
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, NoReturn

from ports import meeting_port
from rank_processes import FORKS, ensure_server


def run_forked(
    args: Sequence[str | Path],
    cwd: Path,
    *,
    ranks: int = 0,
    timeout: float = 800,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], object] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Args:
        args: As after `python`: a script, `-m` and a module, or `-c` and a program.
        cwd: Where it runs.
        ranks: As after `composer -n`; 0 for no launcher. Once one fails, the others have two
            minutes.
        timeout: Seconds until a command that hangs is killed, on any machine.
        environment: In place of this process' own.
        prepare: A function of a module, called in the process before the command.

    Returns: the first status that is not 0, negative for signals, and what rank 0 said; stderr ends
    with what the others said if one failed. Raises: TimeoutError.
    """
    words, said = [str(arg) for arg in args], Path(tempfile.mkdtemp(prefix="command-"))
    port = meeting_port()
    ensure_server()
    processes = []
    for rank in range(max(ranks, 1)):
        own = dict(os.environ if environment is None else environment)
        own |= _rank_environment(rank, ranks, port) if ranks else {}
        target = (words, cwd, own, said / str(rank), prepare)
        processes.append(FORKS.Process(target=_become, args=target))
        processes[-1].start()
    try:
        status, late = _join(processes, timeout)
    finally:
        for process in processes:
            _kill(process)
        ends = [said / f"{rank}.{end}" for rank in range(len(processes)) for end in ("out", "err")]
        texts = [path.read_text() if path.exists() else "" for path in ends]
        shutil.rmtree(said)
    if late:
        raise TimeoutError(f"{words} did not end: {texts}")
    errors = "".join(texts[1:]) if status else texts[1]
    return subprocess.CompletedProcess(words, status, texts[0], errors)


def _join(processes: Sequence[BaseProcess], timeout: float) -> tuple[int, bool]:
    """The first status that is not 0, and whether the timeout came before any."""
    deadline, status, running = time.monotonic() + timeout, 0, list(processes)
    while running:
        left = deadline - time.monotonic()
        if not connection.wait([process.sentinel for process in running], max(left, 0)):
            return status, status == 0
        for process in [process for process in running if not process.is_alive()]:
            process.join()
            running.remove(process)
            if process.exitcode and status == 0:
                status = process.exitcode
                deadline = min(deadline, time.monotonic() + 120)
    return status, False


def _kill(process: BaseProcess) -> None:
    """With what it started, if it lives."""
    if process.is_alive():
        try:
            os.killpg(process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:  # has not yet a group of its own
            process.kill()
    process.join()


def _rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """As composer's launcher sets it for one node."""
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return size | meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _become(
    args: list[str],
    cwd: Path,
    environment: dict[str, str],
    said: Path,
    prepare: Callable[[], object] | None,
) -> None:
    """Run the command here, as the interpreter would."""
    os.setsid()
    for descriptor, end in ((1, "out"), (2, "err")):
        sink = os.open(f"{said}.{end}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, descriptor)
        os.close(sink)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    multiprocessing.set_start_method(None, force=True)  # the default: workers are forked from here
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    import torch

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    _run_as_main(args, cwd)


def _run_as_main(args: list[str], cwd: Path) -> None:
    kind = args[0] if args[0] in ("-m", "-c") else ""
    what, *rest = args[1:] if kind else args
    sys.argv = [kind or what, *rest]
    sys.path.insert(0, str(cwd if kind else (cwd / what).parent))
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(what, {"__name__": "__main__"})
    else:
        runpy.run_path(str(cwd / what), run_name="__main__")


_Popen = subprocess.Popen


class ForkedRank:
    """What composer's launcher needs of a `Popen`: a script, run in a fork of this process."""

    def __init__(
        self, args: list[str], stdout: IO | None = None, stderr: IO | None = None, text: bool = True
    ) -> None:
        self.args, self.returncode = args, None
        self.stdout = self.stderr = None
        self.pid = os.fork()
        if self.pid == 0:
            self._become(stdout, stderr)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def _become(self, stdout: IO | None, stderr: IO | None) -> NoReturn:
        subprocess.Popen = _Popen  # type: ignore[misc]
        for descriptor, file in ((1, stdout), (2, stderr)):
            if file is not None:
                os.dup2(file.fileno(), descriptor)
        status = 1
        try:
            _run_as_main(self.args[1:], Path.cwd())
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        multiprocessing.util._exit_function()  # data workers
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def fork_ranks() -> None:
    """To `prepare` composer's launcher: its ranks need not import everything once more."""
    subprocess.Popen = ForkedRank  # type: ignore[misc, assignment]
