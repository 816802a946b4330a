"""Start the ranks of one machine, for clouds and clusters without a scheduler of jobs.

    python launchers/node.py lgm_scale/train.py yamls/dit_xl.yaml
    python launchers/node.py --nodes 4 --node-rank 2 --address host0 lgm_scale/train.py CONFIG ...

Run it once on every machine. SIGTERM and SIGUSR2 are passed on to every rank, and the exit status
is that of the rank that ended first and badly: 75 stopped after saving, 2 for anything the user
must mend. (`torchrun` makes 1 of every status, and `composer` passes no signal on.) Where they are
set, Kubernetes' JOB_COMPLETION_INDEX and SkyPilot's variables say which machine this is.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from launchers.attempts import STOPPED_STATUS
from launchers.ranks import STOP_SIGNALS, deafen, listens, rank_environment
from lgm_scale.errors import ConfigError, exit_on_user_error

_PATIENCE = 30.0
"""Seconds that ranks may take to end once one of them has failed."""


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line. Raises: ConfigError."""
    env = os.environ
    parser = argparse.ArgumentParser(
        prog="python launchers/node.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--nodes", type=int, default=int(env.get("SKYPILOT_NUM_NODES", "1")), help="machines")
    index = env.get("SKYPILOT_NODE_RANK", env.get("JOB_COMPLETION_INDEX", "0"))
    add("--node-rank", type=int, default=int(index), help="this machine, from 0")
    first = env.get("SKYPILOT_NODE_IPS", "").split("\n")[0] or None
    add("--address", default=first, help="of machine 0; needed with several")
    add("--port", type=int, default=29500, help="on machine 0 (29500)")
    gpus = env.get("SKYPILOT_NUM_GPUS_PER_NODE", "0")
    add("--ranks", type=int, default=int(gpus) or None, help="per machine; default: its GPUs, or 1")
    add("command", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="what every rank runs")
    args = parser.parse_args(argv)
    problems = []
    if not args.command:
        problems.append("SCRIPT: missing; name what the ranks run, such as lgm_scale/train.py")
    if not 0 <= args.node_rank < args.nodes:
        problems.append(f"--node-rank: {args.node_rank} outside [0, {args.nodes - 1}]")
    if args.nodes > 1 and args.address is None:
        problems.append(f"--address: missing; {args.nodes} machines meet at machine 0")
    if args.ranks is not None and args.ranks < 1:
        problems.append(f"--ranks: {args.ranks} must be 1 or more")
    if problems:
        raise ConfigError(problems)
    return args


def main() -> int:
    """Start, watch, and end together."""
    args = parse_args(sys.argv[1:])
    ranks = args.ranks or _gpus() or 1
    if args.ranks is None:
        print(f"{ranks} rank{'s' * (ranks > 1)} on this machine", file=sys.stderr)
    environments = [
        rank_environment(
            rank=args.node_rank * ranks + local_rank,
            world_size=args.nodes * ranks,
            local_rank=local_rank,
            local_world_size=ranks,
            address=args.address or "127.0.0.1",
            port=args.port,
        )
        for local_rank in range(ranks)
    ]
    return run([sys.executable, *args.command], environments)


def run(command: Sequence[str], environments: Sequence[dict[str, str]]) -> int:
    """Run a command once per environment; the status for this machine.

    Once a rank has failed, the others get SIGTERM, and after half a minute SIGKILL. Ranks that
    were asked to stop end by themselves.
    """
    asked: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: asked.append(number))
    # A signal that comes before a rank listens is passed on when it does.
    ranks = [
        subprocess.Popen(command, env=os.environ | own, preexec_fn=deafen) for own in environments
    ]
    told: set[int] = set()
    while all(rank.poll() in (None, 0, STOPPED_STATUS) for rank in ranks):
        if all(rank.returncode is not None for rank in ranks):
            return max(rank.returncode for rank in ranks)
        for rank in ranks:
            if asked and rank.returncode is None and rank.pid not in told and listens(rank.pid):
                rank.send_signal(asked[0])
                told.add(rank.pid)
        time.sleep(0.1)
    status = next(
        rank.returncode for rank in ranks if rank.returncode not in (None, 0, STOPPED_STATUS)
    )
    _end(ranks)
    return status if status > 0 else 128 - status


def _end(ranks: Sequence[subprocess.Popen]) -> None:
    """One has failed: the others can do nothing more."""
    for rank in ranks:
        rank.terminate()
    deadline = time.monotonic() + _PATIENCE
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _gpus() -> int:
    """Number of GPUs, asked in a process of its own: importing torch takes seconds."""
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


if __name__ == "__main__":
    exit_on_user_error(main)
