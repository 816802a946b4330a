"""Training runs in real rank processes over gloo, without paying for the imports each time.

Ranks are forked from a server that has imported everything. They are processes of their own:
they can be killed, and get signals.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing as mp
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from ports import meeting_port

Job = tuple[Path, list[str]]
"""A configuration file and overrides."""

FORKS = mp.get_context("forkserver")
FORKS.set_forkserver_preload(["rank_imports"])


def ensure_server() -> None:
    """Start the server; it looks for what to import in PYTHONPATH alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver._forkserver.ensure_running()


def share_server(log: Path) -> None:
    """Start the server for all processes that are forked from this one.

    What it says goes to `log`: much of it is of memory that killed ranks have left.
    """
    own = [os.dup(1), os.dup(2)]
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(sink, descriptor)
    ensure_server()
    for descriptor, before in zip((1, 2), own, strict=True):
        os.dup2(before, descriptor)
        os.close(before)
    os.close(sink)
    found = {"ensure_running": lambda: None}  # it is no child of theirs, to be looked after
    os.register_at_fork(after_in_child=lambda: vars(forkserver._forkserver).update(found))


def start_calls(
    world_size: int, function: Callable[..., object], *args: object, log: Path | None = None
) -> list[BaseProcess]:
    """Start `world_size` ranks that each call `function(*args)`, and exit with what it returns.

    Ranks find each other and the size of their world in the environment, as under a launcher.
    None is status 0, and so is everything that is no number. What a rank says goes to
    `<log>-<rank>.txt`.
    """
    port = meeting_port()
    own = dict(os.environ)  # the server's is that of the first test
    ranks = [
        FORKS.Process(target=_enter, args=(own, rank, world_size, port, log, function, args))
        for rank in range(world_size)
    ]
    ensure_server()
    for process in ranks:
        process.start()
        atexit.register(process.kill)  # no daemons: those may not have data workers
    return ranks


def start_ranks(
    world_size: int,
    jobs: Sequence[Job],
    log: Path | None = None,
    prepare: Callable[[], object] | None = None,
) -> list[BaseProcess]:
    """Start `world_size` ranks that train every job in turn.

    A rank exits with the status of its last job. It calls `prepare`, a function of a module,
    before its first job.
    """
    return start_calls(world_size, _train, list(jobs), prepare, log=log)


def wait_for(ranks: Sequence[BaseProcess], timeout: float = 600) -> list[int | None]:
    """Exit statuses; negative for signals. Raises: TimeoutError, with everything killed."""
    deadline = time.monotonic() + timeout
    for process in ranks:
        process.join(max(0.1, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in late:
        os.kill(ranks[rank].pid or 0, signal.SIGUSR1)  # where it hangs, into its log
    if late:
        time.sleep(2)
    for process in ranks:
        if process.is_alive():
            process.kill()
            process.join()
    if late:
        raise TimeoutError(f"ranks {late} did not end")
    return [process.exitcode for process in ranks]


def until(condition: Callable[[], object], ranks: Sequence[BaseProcess], log: Path) -> None:
    """Wait for what stays so, with the patience of `wait_for`; no rank may end before.

    The ranks must come there by themselves: one that stands still ends no save that another waits
    for, however long ago it began (`waited_for`).
    """
    deadline = time.monotonic() + 600
    while not condition():
        ended = [process.exitcode for process in ranks if not process.is_alive()]
        if ended or time.monotonic() > deadline:
            what = f"ranks ended with {ended}" if ended else "in vain"
            raise AssertionError(f"waited, {what}:\n{_said(log)}")
        time.sleep(0.01)


def run_ranks(
    world_size: int,
    jobs: Sequence[Job],
    log: Path,
    timeout: float = 600,
    prepare: Callable[[], object] | None = None,
) -> None:
    """Train every job on `world_size` ranks; all must succeed."""
    run_calls(world_size, _train, list(jobs), prepare, log=log, timeout=timeout)


def run_calls(
    world_size: int,
    function: Callable[..., object],
    *args: object,
    log: Path,
    timeout: float = 600,
) -> None:
    """Call `function(*args)` on `world_size` ranks; all must succeed."""
    statuses = wait_for(start_calls(world_size, function, *args, log=log), timeout)
    if any(statuses):
        raise AssertionError(f"ranks ended with {statuses}:\n{_said(log)}")


def run_strategies(
    config: Callable[[Path], Path],
    folder: Path,
    strategies: Mapping[str, list[str]],
    again: int | None = None,
) -> dict[str, Path]:
    """Train `config(out)` once in one process, and on two ranks with every strategy's overrides.

    Returns: the runs' folders by strategy; "one" is the single process, and "again" the same,
    resumed from its state at the step `again`.
    """
    run_ranks(1, [(config(folder / "one"), [])], folder / "one-log")
    jobs = [(config(folder / name), keys) for name, keys in strategies.items()]
    run_ranks(2, jobs, folder / "two-log")
    found = {name: folder / name for name in ("one", *strategies)}
    if again is not None:
        found["again"] = rewound(found["one"], folder / "again", again)
        run_ranks(1, [(config(found["again"]), [])], folder / "again-log")
    return found


def _enter(
    environment: dict[str, str],
    rank: int,
    world_size: int,
    port: int,
    log: Path | None,
    function: Callable[..., object],
    args: tuple[object, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ |= environment
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    if log is not None:
        sink = os.open(f"{log}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        status = function(*args)
    except SystemExit as end:
        _leave(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
        _leave(1)
    # Neither a normal exit nor the end of a process group: both have been seen to wait for ever.
    _leave(status if isinstance(status, int) else 0)


def _train(jobs: list[Job], prepare: Callable[[], object] | None) -> int:
    from lgm_scale.checkpoint.run_folder import RunFolder
    from lgm_scale.config.rules import load_training_run
    from lgm_scale.errors import exit_on_user_error
    from lgm_scale.train import train

    if prepare is not None:
        prepare()
    world_size = int(os.environ["WORLD_SIZE"])

    def main() -> int:
        status = 0
        for path, overrides in jobs:
            config = load_training_run(str(path), overrides, world_size, has_gpu=False)
            status = train(config, RunFolder(Path(config.out), config))
        return status

    exit_on_user_error(main)
    raise AssertionError("exit_on_user_error came back")


def _said(log: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in log.parent.glob(log.name + "-*.txt"))


def _leave(status: int) -> None:
    """End at once: threads of process groups with a dead peer would hold a normal exit up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def waited_for(save: Callable[..., object]) -> Callable[..., None]:
    """`Checkpointer.save` for a training that stands still until its state is complete."""

    def save_and_wait(self, *args: object) -> None:
        save(self, *args)
        self.finish()

    return save_and_wait


def die_at_step(step: int) -> None:
    """Let SIGKILL meet every rank at the start of a step, with the states before it complete."""
    from lgm_scale.checkpoint.checkpointer import Checkpointer  # late: for ranks alone
    from lgm_scale.training.callbacks import StepKeys

    Checkpointer.save = waited_for(Checkpointer.save)  # type: ignore[method-assign]
    start = StepKeys.batch_start

    def batch_start(self, state, logger):
        start(self, state, logger)
        if state.batch["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    StepKeys.batch_start = batch_start  # type: ignore[method-assign]


def states(out: Path) -> list[str]:
    """Names of the states of a run that are sealed, oldest first."""
    return sorted(path.parent.name for path in (out / "state").glob("ba*/manifest.json"))


def rewound(out: Path, copy: Path, step: int) -> Path:
    """A copy of a finished run as it was right after the state of `step` was written."""
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "bundle")
    for path in (copy / "state").glob("ba*"):
        if int(path.name[2:10]) > step:
            shutil.rmtree(path)
    assert states(copy)[-1].startswith(f"ba{step:08d}")
    for record in (copy / "config.json", copy / "state" / "run.json"):
        record.write_text(record.read_text().replace(f'"{out}"', f'"{copy}"'))
    return copy
