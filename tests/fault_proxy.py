"""A proxy in front of an S3 server that damages chosen answers, byte by byte.

It passes requests on as they are, so signatures stay valid: S3 signs the `Host` header, which is
the proxy's own and is passed on unchanged. Faults hit GET requests alone.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ERRORS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
}
MODES = (*ERRORS, "reset", "truncate", "hang", "trickle", "flip")
TRICKLE_SECONDS = 0.5  # between two bytes
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive"}


@dataclass
class Fault:
    """What happens to a GET whose path contains `match`: to every `every`-th of them.

    Modes: the status codes `500` and `503`; `expired`, the answer to an expired token; `reset`,
    the connection is torn down instead of an answer; `truncate`, after half of it; `hang`, no
    answer; `trickle`, one byte now and then; `flip`, one bit in the middle is wrong.
    """

    mode: str
    match: str = ""
    every: int = 1
    first: int | None = None
    """Only so many times."""
    seen: int = 0
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is none of {', '.join(MODES)}")

    def strikes(self, path: str) -> bool:
        """Whether this request is hit."""
        if self.match not in path:
            return False
        with self.lock:
            self.seen += 1
            spent = self.first is not None and self.done >= self.first
            hit = not spent and self.seen % self.every == 0
            self.done += hit
            return hit


class FaultProxy:
    """Listens on loopback and passes on to `target`. Use as a context manager.

    Args:
        target: URL of the server.
    """

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.fault: Fault | None = None
        self.requests: list[tuple[str, str]] = []
        """(method, path) of every request that came."""
        self._released = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self._open: set[socket.socket] = set()

    @property
    def endpoint(self) -> str:
        """URL for clients. It stays when the proxy is gone and comes back."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> FaultProxy:
        self.come_back()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self.go_away()

    @contextmanager
    def failing(self, mode: str, match: str = "", every: int = 1, **more: Any) -> Iterator[Fault]:
        """Damage answers within the block."""
        self.fault = Fault(mode, match, every, **more)
        try:
            yield self.fault
        finally:
            self.fault = None

    def go_away(self) -> None:
        """Refuse connections, and cut those that are open."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()
        for connection in list(self._open):  # their threads wake up and end
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def come_back(self) -> None:
        """Listen again, on the same port."""
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def count(self, match: str) -> int:
        """GET requests so far whose path contains `match`."""
        return sum(method == "GET" and match in path for method, path in self.requests)


class _Server(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up when they have seen enough; that is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def setup(self) -> None:
        super().setup()
        self.proxy._open.add(self.connection)

    def finish(self) -> None:
        self.proxy._open.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _serve(self) -> None:
        self.proxy.requests.append((self.command, self.path))
        body = self._body()
        fault = self.proxy.fault if self.command == "GET" else None
        mode = fault.mode if fault is not None and fault.strikes(self.path) else ""
        if mode in ERRORS:
            status, code = ERRORS[mode]
            text = f"<Error><Code>{code}</Code><Message>{mode}</Message></Error>".encode()
            self._answer(status, "fault", [("content-type", "application/xml")], text)
        elif mode == "reset":
            self._tear_down()
        elif mode == "hang":
            self.proxy._released.wait()
            self._tear_down()
        else:
            self._pass_on(body, mode)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _pass_on(self, body: bytes, mode: str) -> None:
        target = self.proxy.target
        server = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for key, value in self.headers.items():
                if key.lower() != "expect":
                    server.putheader(key, value)
            server.endheaders(body)
            response = server.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException):
            self._tear_down()
            return
        finally:
            server.close()
        headers = [pair for pair in response.getheaders() if pair[0].lower() not in HOP_BY_HOP]
        if mode == "flip" and data:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        self._answer(response.status, response.reason, headers, data, mode)

    def _answer(
        self, status: int, reason: str, headers: list[tuple[str, str]], data: bytes, mode: str = ""
    ) -> None:
        self.send_response_only(status, reason)
        lengths = [value for key, value in headers if key.lower() == "content-length"]
        for key, value in headers:
            if key.lower() != "content-length":
                self.send_header(key, value)
        # A HEAD has no body but tells the length of the one it would have.
        self.send_header("content-length", lengths[0] if lengths else str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if mode == "truncate":
            self.wfile.write(data[: len(data) // 2])
            self._tear_down()
        elif mode == "trickle":
            for byte in data:
                self.wfile.write(bytes([byte]))
                if self.proxy._released.wait(TRICKLE_SECONDS):
                    return
        else:
            self.wfile.write(data)

    def _tear_down(self) -> None:
        """Close with an RST instead of a FIN."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
