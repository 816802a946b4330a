"""Several training runs in one set of rank processes: starting Python and torch costs the most."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch.multiprocessing as mp

Job = tuple[str, list[str]]
"""A configuration file and overrides."""


def run_jobs(world_size: int, jobs: Sequence[Job], errors: Path | None = None) -> None:
    """Train every job in turn on `world_size` ranks over gloo.

    With `errors`, a user error of rank 0 goes to the file `<errors>/<number of the job>` instead
    of ending everything. All ranks must raise it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (world_size, port, list(jobs), None if errors is None else str(errors))
    mp.spawn(_worker, arguments, nprocs=world_size)  # type: ignore[arg-type]


def _worker(rank: int, world_size: int, port: int, jobs: list[Job], errors: str | None) -> None:
    import torch

    from lgm_scale.config_rules import load_training_run
    from lgm_scale.errors import LGMError
    from lgm_scale.run_folder import RunFolder
    from lgm_scale.train import train

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    for number, (path, overrides) in enumerate(jobs):
        try:
            config = load_training_run(path, overrides, world_size, has_gpu=False)
            train(config, RunFolder(Path(config.out), config))
        except LGMError as error:
            if errors is None:
                traceback.print_exc()
                raise
            if rank == 0:
                (Path(errors) / str(number)).write_text(f"{type(error).__name__}: {error}")
