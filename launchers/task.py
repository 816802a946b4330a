"""What Slurm starts for every rank: the job object that Submitit keeps, and its supervision.

One task of Slurm per rank, and in it one child process that does the work. So Slurm itself sees
the end of every rank and takes the others down at once, ranks have logs of their own, and the
child's exit status arrives unchanged. The parent imports no torch; it knows the signals of Slurm
from the first moment, long before a trainer is ready for them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from launchers import scheduler
from launchers.records import STOPPED_STATUS, Starts, Verdict, last_step

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""Sent by schedulers before they take the machine away."""


@dataclass
class RankTask:
    """Run one rank of a job; picklable, and the same for all of them.

    Args:
        directory: Where it runs: where the job was submitted, so that relative paths hold.
        temporary: Node-local folder for the job's TMPDIR.
        grace_seconds: How long a child that was asked to stop may take.
        saves_on_request: The child answers SIGUSR2 and SIGTERM by saving; another one is ended
            by them.
    """

    command: tuple[str, ...]
    directory: str
    env: dict[str, str]
    temporary: str
    grace_seconds: int
    metrics: str | None
    saves_on_request: bool
    _asked_at: float | None = field(default=None, init=False, repr=False)
    _signal: str = field(default="", init=False, repr=False)

    def __call__(self) -> None:
        """Run the child to its end. Ends the process with the child's status."""
        slurm = submitit.JobEnvironment()
        requeue_by_submitit = signal.getsignal(signal.SIGUSR2)  # calls `checkpoint`, then Slurm
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask_to_stop)
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        starts = Starts(Path(slurm.paths.folder) / slurm.job_id)
        rank = slurm.global_rank
        print(f"=== start {restart}: rank {rank} of {slurm.num_tasks} on {slurm.hostname} ===")
        if rank == 0:
            starts.started(restart, list(slurm.hostnames))
        status = self._run(slurm, restart)
        starts.rank_ended(restart, rank, slurm.hostname, status, self._signal)
        if status == 0 or (status == STOPPED_STATUS and rank != 0):
            return  # rank 0 speaks to Slurm; a failure here would make Slurm kill it
        if status != STOPPED_STATUS or not self._signal or not callable(requeue_by_submitit):
            # `batch_end` judges: another rank may have failed, and Slurm asked this one to stop.
            raise SystemExit(status if status > 0 else 128 - status)
        step = last_step(Path(self.metrics) if self.metrics is not None else None)
        reason = f"{self._signal}, state saved"
        if starts.superseded(restart):
            raise SystemExit(STOPPED_STATUS)
        if scheduler.state(slurm.job_id) != "RUNNING":
            # Cancelled, or requeued by hand: Slurm knows what is next.
            starts.judged(restart, Verdict("stopped", reason, requeue=False, step=step))
            raise SystemExit(STOPPED_STATUS)
        starts.judged(restart, Verdict("stopped", reason, requeue=True, step=step))
        requeue_by_submitit(signal.SIGUSR2, None)

    def checkpoint(self) -> DelayedSubmission:
        """Submitit asks what to run after a requeue: the same, which resumes by itself.

        The child has saved and ended by now.
        """
        return DelayedSubmission(replace(self))

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self._asked_at is None:
            self._asked_at, self._signal = time.monotonic(), signal.Signals(number).name
            print(f"=== {self._signal}: asked to stop ===")

    def _run(self, slurm: Any, restart: int) -> int:
        # Slurm's number of the job; for an element of an array, a number of its own.
        job, local_size = slurm.raw_job_id, slurm.num_tasks // slurm.num_nodes
        temporary = Path(self.temporary) / f"lgm-{job}-{restart}"
        temporary.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        environment |= rank_environment(
            rank=slurm.global_rank,
            world_size=slurm.num_tasks,
            local_rank=slurm.local_rank,
            local_world_size=local_size,
            address=slurm.hostnames[0],
            port=master_port(int(job), restart),
        )
        child = subprocess.Popen(
            self.command,
            cwd=self.directory,
            env=environment | self.env,
            preexec_fn=_own_group_and_deaf if self.saves_on_request else _own_group,
        )
        try:
            return self._wait(child)
        finally:
            with contextlib.suppress(ProcessLookupError):  # data workers of a rank that was killed
                os.killpg(child.pid, signal.SIGKILL)
            if slurm.local_rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _wait(self, child: subprocess.Popen) -> int:
        told = False
        while True:
            try:
                return child.wait(timeout=1)
            except subprocess.TimeoutExpired:
                pass
            if self._asked_at is None:
                continue
            if time.monotonic() - self._asked_at > self.grace_seconds:
                child.kill()
            elif not told and _listens(child.pid):  # Slurm's own signal may have come too early
                child.send_signal(signal.SIGUSR2)
                told = True


def master_port(job_id: int, restart: int) -> int:
    """Port of the rendezvous, below the range of ephemeral ports; another one at every start."""
    return 10_000 + (job_id * 17 + restart) % 20_000


def rank_environment(
    *, rank: int, world_size: int, local_rank: int, local_world_size: int, address: str, port: int
) -> dict[str, str]:
    """What every launcher of PyTorch sets for a rank."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "NODE_RANK": str(rank // local_world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a rank that waits for a dead one must end
        "PYTHONUNBUFFERED": "1",
    }


def _listens(pid: int) -> bool:
    """Whether a process has a handler of its own for SIGUSR2."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR2 - 1) & 1)


def _own_group() -> None:
    """In a child, before it becomes another program: what it starts can be ended with it."""
    os.setpgid(0, 0)


def _own_group_and_deaf() -> None:
    """The same for a trainer; and no signal may end it before it listens."""
    _own_group()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
