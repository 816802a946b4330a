"""One file from the web: whole, with the right sum, and resumed where it broke off. No torch.

An interrupted download leaves `NAME.part` and `NAME.part.json` beside the place of the file: the
next one goes on there, if the server still has the same file, and starts anew if not.
"""

from __future__ import annotations

import fcntl
import json
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from ssl import SSLError
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from lgm_scale.storage.files import file_hash, place, write_json
from lgm_scale.storage.transfer import StorageError

_BLOCK = 1 << 20


def fetch(url: str, path: Path, sha256: str | None = None, timeout: float = 60) -> str:
    """Download a file, with a progress bar on a terminal.

    Args:
        url: Its address.
        path: Where it goes, once it is whole.
        sha256: Its sum, or the first digits; None: only the length that the server says is checked.
        timeout: Seconds without a byte after which it is given up; what is there is kept.

    Returns: the file's SHA-256. Raises: StorageError, with nothing at `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    note = part.with_name(part.name + ".json")
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(f"{part}: another process downloads it; wait for it") from error
        try:
            _complete(url, file, note, timeout)
        except (HTTPException, URLError, TimeoutError, ConnectionError, SSLError) as error:
            refused = isinstance(error, HTTPError) and f"{error.code} {error.reason}"
            reason = refused or getattr(error, "reason", None) or error or type(error).__name__
            again = "; the same command again goes on where it was, if the server lets it"
            if not file.tell():
                part.unlink()
                again = ""
            raise StorageError(f"{url}: {reason}{again}") from error
        found = file_hash(part)
        note.unlink(missing_ok=True)
        if not found.startswith(sha256 or ""):
            part.unlink()
            raise StorageError(
                f"{url} sent a file whose sha256 is {found}, and {sha256} is published: it was "
                "deleted"
            )
        place(part, path)
    return found


def _complete(url: str, file: BinaryIO, note: Path, timeout: float) -> None:
    """Append what is missing."""
    known = json.loads(note.read_text()) if note.is_file() else {}
    have, request = file.tell(), Request(url, headers={"User-Agent": "lgm_scale"})
    if have and known.get("url") == url and known.get("validator"):
        if have == known["num_bytes"]:
            return
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", known["validator"])  # else the server sends it all
    with urlopen(request, timeout=timeout) as answer:
        if answer.status != 206:
            have = file.seek(0)
            file.truncate()
        length = answer.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        write_json(note, {"url": url, "num_bytes": total, "validator": _validator(answer)})
        name = note.name.removesuffix(".part.json")
        with tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=name, disable=None
        ) as bar:
            while block := answer.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
        file.flush()
    if total is not None and file.tell() != total:
        raise ConnectionError(f"it ended after {file.tell():,} of {total:,} bytes")


def _validator(answer: HTTPResponse) -> str | None:
    """What tells this file from a later one at the same address; None if nothing surely does."""
    tag = answer.headers.get("ETag")
    if tag is None or tag.startswith("W/"):
        return answer.headers.get("Last-Modified")
    return tag
