"""The project's commands in processes of their own, without paying for the imports each time.

A command runs as `__main__` in a process that is forked from the server of `rank_processes`: it
has its own environment, signal handlers, torch defaults and shared memory, can be killed, and ends
as an interpreter ends. Only the modules are there already. Where a fresh interpreter or composer's
launcher is the point, `small_pipeline.run_command(..., fresh=True)` starts them.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path

import rank_processes


class Command:
    """A running command.

    Args:
        args: As after `python`: a script, `-m` and a module, or `-c` and a program.
        cwd: Where it runs.
        ranks: As after `composer -n`; 0 for no launcher.
        environment: In place of this process' own.
        prepare: A function of a module, called in the process before the command.
    """

    def __init__(
        self,
        args: Sequence[str | Path],
        cwd: Path,
        ranks: int = 0,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self.args = [str(arg) for arg in args]
        self._said = Path(tempfile.mkdtemp(prefix="command-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        everywhere = dict(os.environ if environment is None else environment)
        rank_processes._ensure_server()
        self.processes = []
        for rank in range(max(ranks, 1)):
            own = everywhere | (_rank_environment(rank, ranks, port) if ranks else {})
            said = self._said / str(rank)
            process = rank_processes._FORKS.Process(
                target=_become, args=(self.args, cwd, own, said, prepare)
            )
            process.start()
            self.processes.append(process)

    def poll(self) -> int | None:
        """The status of a rank that ended, None while all run."""
        return next((p.exitcode for p in self.processes if p.exitcode is not None), None)

    def kill(self) -> None:
        """SIGKILL to all ranks and to what they started."""
        for process in self.processes:
            if process.is_alive():
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:  # has not yet a group of its own
                    process.kill()
            process.join()

    def wait(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """What it said, rank 0 alone as under the launcher, and the first status that is not 0.

        Once a rank fails, the others have half a minute. Raises: TimeoutError, all killed.
        """
        deadline, status, running = time.monotonic() + timeout, 0, list(self.processes)
        try:
            while running:
                left = deadline - time.monotonic()
                if not connection.wait([p.sentinel for p in running], max(left, 0)):
                    if status == 0:
                        raise TimeoutError(f"{self.args} did not end: {self._texts()}")
                    break
                for process in [p for p in running if not p.is_alive()]:
                    process.join()
                    running.remove(process)
                    if process.exitcode and status == 0:
                        status = process.exitcode
                        deadline = min(deadline, time.monotonic() + 30)
        finally:
            self.kill()
            texts = self._texts()
            shutil.rmtree(self._said)
        if status:
            texts[1] += "".join(texts[2:])
        return subprocess.CompletedProcess(self.args, status, texts[0], texts[1])

    def _texts(self) -> list[str]:
        """Of rank 0 stdout and stderr, then those of the others."""
        names = [f"{rank}.{end}" for rank in range(len(self.processes)) for end in ("out", "err")]
        paths = [self._said / name for name in names]
        return [path.read_text() if path.exists() else "" for path in paths]


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
