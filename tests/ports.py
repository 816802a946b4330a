"""Ports of loopback that are nobody else's between their choice and their use.

A socket that is bound and never listens keeps its port. A server may listen there all the same if
it sets SO_REUSEADDR, as all of ours do: the kernel refuses that to listeners alone.
"""

from __future__ import annotations

import socket
from collections import deque

_KEPT: deque[socket.socket] = deque(maxlen=100)


def keep_port() -> socket.socket:
    """A port that is kept until this socket is closed; it is the socket's own."""
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    return kept


def meeting_port() -> int:
    """A port for ranks to meet at, kept until this process has chosen a hundred others."""
    _KEPT.append(keep_port())
    return _KEPT[-1].getsockname()[1]
