"""One file from or to object storage: whole, checked, patiently, and never for ever.

The clients of storage leave open when to give up, and what to say then. Here a file is either in
place, complete and with the right hash, or there is a StorageError that names the file and the
cause. (botocore's own tries are counted, not timed, and do not cover a body that breaks off; they
serve the parts of large files.)

Credentials come from the environment alone and are in no message.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

from lgm_scale.errors import DataError
from lgm_scale.storage.clients import download, is_remote, upload
from lgm_scale.storage.files import file_hash, partial_path

log = logging.getLogger("lgm_scale")

Result = TypeVar("Result")

_LONGEST_PAUSE = 5.0  # seconds between two tries
_MISSING = {"NoSuchKey", "404", "NotFound"}
_NO_BUCKET = {"NoSuchBucket"}
_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "403", "Forbidden"}
_EXPIRED = {"400", "ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed"}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR}


class StorageError(DataError, OSError):
    """Storage that refuses, is full, does not answer, or holds something damaged."""


class MissingFileError(StorageError, FileNotFoundError):
    """There is no such file in the storage."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for object storage.

    Args:
        timeout: Seconds without a byte after which one request is given up.
        retry_seconds: Seconds from the first try of a file to the last; nothing takes longer, but
            the transfer of a large file.
    """

    timeout: float = 30.0
    retry_seconds: float = 300.0


@dataclass(frozen=True)
class Expected:
    """What a fetched file must be.

    Args:
        num_bytes: Its size; None if that is not known.
        hashes: Hexadecimal digests by the name of their algorithm.
    """

    num_bytes: int | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)

    def problem(self, path: Path) -> str | None:
        """What is wrong with a file, or None."""
        size = path.stat().st_size
        if self.num_bytes is not None and size != self.num_bytes:
            return f"has {size:,} bytes instead of {self.num_bytes:,}"
        for name, wanted in sorted(self.hashes.items()):
            if name in hashlib.algorithms_available and file_hash(path, name) != wanted:
                return f"has another {name} than the index says"
        return None


def join(folder: str | os.PathLike[str], name: str) -> str:
    """Name of a file in a folder, local or remote."""
    return f"{str(folder).rstrip('/')}/{name}"


def shown(location: str) -> str:
    """A location without the credentials that some schemes carry in it."""
    if not is_remote(location):
        return location
    parts = urlsplit(location)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def fetch(
    remote: str,
    local: Path,
    patience: Patience,
    expected: Expected | None = None,
    *,
    large: bool = False,
) -> None:
    """Bring a file here; afterwards it is in place and complete, or there was an error.

    What is passing (a server that is busy, gone or silent, a torn connection) is tried again until
    `patience.retry_seconds` are over. A file with the wrong size or hash is fetched once more.

    A `large` transfer may take as long as bytes keep coming.

    Raises: StorageError naming the file and the cause; MissingFileError if there is none.
    """
    name, part = shown(remote), partial_path(local)

    def attempt() -> str | None:
        """Fetch it once; what is wrong with it."""
        try:
            download(remote, part, patience.timeout, large)
        except Exception as error:
            if type(error).__name__ != "FlexibleChecksumError":  # the S3 client's own check
                raise
            return "has another checksum than the storage says"
        return expected.problem(part) if expected is not None else None

    deadline = time.monotonic() + patience.retry_seconds
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        for last in (False, True):
            problem = persist(
                attempt, name, "fetched", patience, deadline=deadline, near=part, large=large
            )
            if problem is None:
                part.replace(local)  # not synced: what is fetched can be fetched again
                return
            if not last:
                log.warning("%s %s; it is fetched once more", name, problem)
    except StorageError:
        raise
    except OSError as error:  # of our own handling of the part
        raise (_explain(error, name, "fetched", part) or error) from error
    finally:
        part.unlink(missing_ok=True)
    raise StorageError(
        f"{name} {problem}, as it had when it was fetched before: the stored file is damaged. "
        "Store it again (data_tools/verify_mds.py lists all damaged shards)."
    )


def store(local: Path, remote: str, patience: Patience, *, large: bool = False) -> None:
    """Copy a local file to its place, a folder or object storage, which must keep its name.

    Raises: StorageError naming the file and the cause.
    """
    persist(
        lambda: upload(local, remote, patience.timeout, large),
        *(shown(remote), "stored", patience),
        near=local,
        large=large,
    )


def read_remote(remote: str, patience: Patience) -> bytes | None:
    """Contents of a small file of object storage; None if it is not there.

    Raises: StorageError naming the file and the cause.
    """
    with tempfile.TemporaryDirectory(prefix="lgm_scale-") as folder:
        path = Path(folder) / "file"
        try:
            fetch(remote, path, patience)
        except MissingFileError:
            return None
        return path.read_bytes()


def persist(
    attempt: Callable[[], Result],
    name: str,
    done: str,
    patience: Patience,
    *,
    deadline: float | None = None,
    near: Path = Path(),
    large: bool = False,
) -> Result:
    """Repeat a request until it works, cannot work, or the time is over.

    `name`, `done` (a participle) and `near`, a path of this machine that is read or written, are
    for messages. `deadline` is in seconds of `time.monotonic`, by default the patience from now. A
    `large` try may take as long as it does.

    Raises: StorageError naming the file and the cause.
    """
    deadline = time.monotonic() + patience.retry_seconds if deadline is None else deadline
    tries = 0
    while True:
        tries += 1
        try:
            seconds = None if large else max(deadline - time.monotonic(), 0.1)
            result = _bounded(attempt, seconds)
        except Exception as problem:
            error = problem
        else:
            if tries > 3:
                log.warning("%s was %s after %d tries", name, done, tries)
            return result
        final = _explain(error, name, done, near)
        if final is not None:
            raise final from error
        pause = min(0.1 * 2**tries, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        if time.monotonic() + pause >= deadline:
            raise StorageError(
                f"{name} could not be {done} within {patience.retry_seconds:g} s ({tries} tries); "
                f"the last failed with {_brief(error)}. Run again once the storage answers; a "
                "training resumes from its last resume state. To wait longer, raise "
                "data.retry_seconds."
            ) from error
        if tries == 3:
            log.warning("%s: %s; still trying", name, _brief(error))
        time.sleep(pause)


def _bounded(attempt: Callable[[], Result], seconds: float | None) -> Result:
    """Run an attempt for so long at most. What still hangs then ends with the process."""
    if seconds is None:
        return attempt()
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(attempt())
        except BaseException as error:  # handed to the waiting thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="lgm_scale-transfer")
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no end after {seconds:.0f} s")
    return results[0]


def _explain(error: BaseException, name: str, done: str, near: Path) -> StorageError | None:
    """The final word on an error; None for one that may pass."""
    if isinstance(error, StorageError):
        return error
    code = _code(error)
    number = error.errno if isinstance(error, OSError) else None
    kind = StorageError
    if code in _NO_BUCKET:
        kind, reason = MissingFileError, f"its bucket does not exist ({code})"
    elif code in _MISSING or isinstance(error, FileNotFoundError):
        kind, reason = MissingFileError, "there is no such file"
    elif code in _REFUSED:
        reason = (
            f"the storage refuses the credentials of this environment ({code}). Check "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what else your storage reads, and "
            "the rights of that account"
        )
    elif code in _EXPIRED:
        reason = (
            f"the credentials of this environment are not valid any more ({code}). Get new ones "
            "(AWS_SESSION_TOKEN belongs to them) and run again"
        )
    elif type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError"):
        reason = "this environment has no credentials"
    elif number in _FULL:
        reason = (
            f"no space is left in {near.parent} ({os.strerror(number)}). Free some, choose "
            "another data.cache, or set a data.cache_limit"
        )
    elif number in _NOT_ALLOWED:
        reason = f"{near.parent}: {os.strerror(number)}"
    elif isinstance(error, ImportError):
        reason = str(error)
    else:
        return None
    return kind(f"{name} could not be {done}: {reason}")


def _code(error: BaseException) -> str:
    """Reason that an S3 server gave."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return ""
    return str(response.get("Error", {}).get("Code", ""))


def _brief(error: BaseException) -> str:
    """An error in a few words, without the server's own text, which may repeat a request."""
    code = _code(error)
    if code:
        return f"{type(error).__name__} {code}"
    if isinstance(error, (TimeoutError, OSError)) and str(error):
        return f"{type(error).__name__}: {error}"
    return type(error).__name__
