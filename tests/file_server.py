"""A web server of files for downloads: ranges, tags, and connections that break off.

`PUBLISHED` names addresses that tests never ask: `use_served_files` puts this server's in their
place, in this process or, as the `prepare` of a command, in the command's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lgm_scale.published import PUBLISHED

SERVED = "LGM_TEST_SERVED_FILES"
"""Environment variable: JSON of name -> [address, sum or null]."""


class FileServer:
    """Serves a folder.

    Args:
        folder: What is served.
        break_after: Bytes of a body after which connections end; None: never.
        tagged: Whether answers have an ETag, without which nothing can be resumed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.break_after: int | None = None
        self.tagged = True
        self.asked: list[tuple[str, str | None]] = []
        """Path and Range of every request."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                return

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append((request.path, request.headers.get("Range")))
        path = self.folder / request.path.lstrip("/")
        if not path.is_file():
            request.send_error(404)
            return
        body, tag = path.read_bytes(), f'"{path.stat().st_mtime_ns}"'
        start, wanted = 0, request.headers.get("Range")
        if wanted and request.headers.get("If-Range") == tag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body) - start))
        if self.tagged:
            request.send_header("ETag", tag)
        request.end_headers()
        end = None if self.break_after is None else start + self.break_after
        request.wfile.write(body[start:end])


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    server = FileServer(folder)
    try:
        yield server
    finally:
        server.close()


def served_files(server: FileServer, sums: Mapping[str, str | None]) -> dict[str, str]:
    """Environment with which `use_served_files` takes these files from the server."""
    names = {name: [f"{server.url}/{PUBLISHED[name].name}", sums[name]] for name in sums}
    return {SERVED: json.dumps(names)}


def use_served_files() -> None:
    """Change addresses and sums in `PUBLISHED` to those of the environment."""
    for name, (url, sha256) in json.loads(os.environ[SERVED]).items():
        PUBLISHED[name] = dataclasses.replace(
            PUBLISHED[name], url=url, sha256=sha256, sum_from="the test", megabytes=0.001
        )
