"""What ranks need from whoever starts them: an environment, a place to meet, and care with signals.

Standard library only.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

__all__ = [
    "STOP_SIGNALS",
    "listens",
    "master_port",
    "own_group",
    "own_group_and_deaf",
    "rank_environment",
]

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""Sent by schedulers before they take the machine away."""


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


def listens(pid: int) -> bool:
    """Whether a process has a handler of its own for SIGUSR2."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR2 - 1) & 1)


def own_group() -> None:
    """In a child, before it becomes another program: what it starts can be ended with it."""
    os.setpgid(0, 0)


def own_group_and_deaf() -> None:
    """The same for a trainer; and no signal may end it before it listens."""
    own_group()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
