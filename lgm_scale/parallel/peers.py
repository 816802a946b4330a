"""Notice that another rank of this node is gone, wherever this one waits for it.

A collective fails when its peer dies, soon under gloo, after a timeout under NCCL. But not every
wait is a collective: between epochs, streaming's data sets wait for each other in shared memory,
for ever. So each rank looks whether the others' processes live. (Of other nodes, the process
group's timeout tells.)
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading

import psutil
from composer.utils import dist


class PeerWatch:
    """Inside a `with` block, end this process some seconds after another rank of its node has died.

    The seconds are for this rank to fail by itself, with a traceback that says more. Every rank
    must enter it; where there are no other ranks, it does nothing.

    Args:
        grace_seconds: Seconds from the death of a peer to the end of this process.
        interval: Seconds between two looks.
    """

    def __init__(self, grace_seconds: float = 10.0, interval: float = 1.0) -> None:
        self.grace_seconds = grace_seconds
        self.interval = interval
        self._peers: dict[int, psutil.Process] = {}
        self._left = threading.Event()

    def __enter__(self) -> PeerWatch:
        own = (socket.gethostname(), os.getpid())
        for rank, (host, process) in enumerate(dist.all_gather_object(own)):
            if host == own[0] and process != own[1] and psutil.pid_exists(process):
                self._peers[rank] = psutil.Process(process)
        if self._peers:
            threading.Thread(target=self._watch, name="peer watch", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()

    def _watch(self) -> None:
        while not self._left.wait(self.interval):
            gone = [rank for rank, process in self._peers.items() if not _lives(process)]
            if gone:
                if not self._left.wait(self.grace_seconds):
                    self._end(gone)
                return

    def _end(self, gone: list[int]) -> None:
        """Say why and where, take the data workers along, and leave.

        By `os._exit`, for the main thread is in a wait that no exception reaches.
        """
        rank = dist.get_global_rank()
        print(
            f"rank {rank}: the process of rank {', '.join(map(str, gone))} is gone, and this one "
            "still waits for it; it ends now. It was here:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(1)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
