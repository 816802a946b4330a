"""Files of object storage: fetched and stored whole, checked, patiently, and never for ever.

The streaming library knows many kinds of storage, and how to talk to each; what it leaves open is
when to give up, and what to say then. Here a file is either in place, complete and with the right
hash, or there is a DataError that names the file and the cause. S3 is read without the library,
one request per file, because its errors then name their reason. No torch.

Credentials come from the environment alone and are in no message.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lgm_scale.data.config import Patience, is_remote
from lgm_scale.errors import DataError
from lgm_scale.hashing import file_hash

__all__ = [
    "Expected",
    "MissingFileError",
    "fetch",
    "join",
    "read_remote",
    "shown",
    "store",
]

log = logging.getLogger("lgm_scale")

HASH = "sha256"
_CHUNK = 1 << 20
_LONGEST_PAUSE = 5.0  # seconds between two tries
_MISSING = {"NoSuchKey", "404", "NotFound"}
_NO_BUCKET = {"NoSuchBucket"}
_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "403", "Forbidden"}
_EXPIRED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed"}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR}


class MissingFileError(DataError):
    """There is no such file in the storage."""


@dataclass(frozen=True)
class Expected:
    """What a fetched file must be: its size in bytes, and hashes by the algorithm's name."""

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


def fetch(remote: str, local: Path, patience: Patience, expected: Expected | None = None) -> None:
    """Bring a file here; afterwards it is in place and complete, or there was an error.

    What is passing (a server that is busy, gone or silent, a torn connection) is tried again until
    `patience.retry_seconds` are over. A file with the wrong size or hash is fetched once more.

    Raises: DataError naming the file and the cause; MissingFileError.
    """
    damages: list[str] = []

    def damaged(problem: str) -> None:
        damages.append(problem)
        if len(damages) > 1:
            raise DataError(
                f"{shown(remote)} {problem}, as it had when it was fetched before: the "
                "stored file is damaged. Store it again (data_tools/verify_mds.py lists all "
                "damaged shards)."
            )
        log.warning("%s %s; it is fetched once more", shown(remote), problem)

    def attempt() -> None:
        try:
            _download(remote, part, patience.timeout)
        except Exception as error:
            if type(error).__name__ == "FlexibleChecksumError":  # the S3 client's own check
                damaged("has another checksum than the storage says")
            raise

    part = local.with_name(f".{local.name}.{uuid.uuid4().hex[:8]}.part")
    deadline = time.monotonic() + patience.retry_seconds
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        while True:
            _persist(attempt, shown(remote), "fetched", patience, deadline, part)
            problem = expected.problem(part) if expected is not None else None
            if problem is None:
                part.replace(local)
                return
            damaged(problem)
            part.unlink()
    except OSError as error:  # of our own handling of the part
        raise (_explain(error, shown(remote), "fetched", part) or error) from error
    finally:
        part.unlink(missing_ok=True)


def store(local: Path, remote: str, patience: Patience) -> None:
    """Copy a local file to its place, a folder or object storage. Raises: DataError."""

    def attempt() -> None:
        _upload(local, remote, patience.timeout)

    deadline = time.monotonic() + patience.retry_seconds
    _persist(attempt, shown(remote), "stored", patience, deadline, local)


def read_remote(remote: str, patience: Patience) -> bytes | None:
    """Contents of a small file of object storage; None if it is not there. Raises: DataError."""
    with tempfile.TemporaryDirectory(prefix="lgm_scale-") as folder:
        path = Path(folder) / "file"
        try:
            fetch(remote, path, patience)
        except MissingFileError:
            return None
        return path.read_bytes()


def _persist(
    attempt: Callable[[], None],
    name: str,
    done: str,
    patience: Patience,
    deadline: float,
    local: Path,
) -> None:
    """Repeat `attempt` until it works, cannot work, or the time is over."""
    tries, warned = 0, False
    while True:
        tries += 1
        error = _bounded(attempt, max(deadline - time.monotonic(), 0.1))
        if error is None:
            if warned:
                log.warning("%s was %s after %d tries", name, done, tries)
            return
        final = _explain(error, name, done, local)
        if final is not None:
            raise final from error
        pause = min(0.1 * 2**tries, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        if time.monotonic() + pause >= deadline:
            raise DataError(
                f"{name} could not be {done} within {patience.retry_seconds:g} s ({tries} tries); "
                f"the last failed with {_brief(error)}. Run again once the storage answers; a "
                "training resumes from its last resume state. To wait longer, raise "
                "data.retry_seconds."
            ) from error
        if tries == 3:
            warned = True
            log.warning("%s: %s; still trying", name, _brief(error))
        time.sleep(pause)


def _bounded(attempt: Callable[[], None], seconds: float) -> BaseException | None:
    """Run an attempt for so long at most. What still hangs then ends with the process."""
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            attempt()
            outcome.append(None)
        except BaseException as error:  # handed to the waiting thread
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True, name="lgm_scale-transfer")
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else TimeoutError(f"no end after {seconds:.0f} s")


def _explain(error: BaseException, name: str, done: str, local: Path) -> DataError | None:
    """The final word on an error; None for one that may pass."""
    if isinstance(error, DataError):
        return error
    code = _code(error)
    if code in _NO_BUCKET:
        return MissingFileError(f"{name} could not be {done}: its bucket does not exist")
    if code in _MISSING or isinstance(error, FileNotFoundError):
        return MissingFileError(f"{name} could not be {done}: there is no such file")
    if code in _REFUSED:
        return DataError(
            f"{name} could not be {done}: the storage refuses the credentials of this environment "
            f"({code}). Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what else your "
            "storage reads, and the rights of that account"
        )
    if code in _EXPIRED or code == "400":
        return DataError(
            f"{name} could not be {done}: the credentials of this environment are not valid any "
            f"more ({code}). Get new ones (AWS_SESSION_TOKEN belongs to them) and run again"
        )
    if type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError"):
        return DataError(f"{name} could not be {done}: this environment has no credentials")
    if isinstance(error, OSError) and error.errno in _FULL:
        return DataError(
            f"{name} could not be {done}: no space is left in {local.parent} "
            f"({os.strerror(error.errno)}). Free some, choose another data.cache, or set a "
            "data.cache_limit"
        )
    if isinstance(error, OSError) and error.errno in _NOT_ALLOWED:
        return DataError(f"{name} could not be {done}: {local.parent}: {os.strerror(error.errno)}")
    if isinstance(error, ImportError):
        return DataError(f"{name} could not be {done}: {error}")
    return None


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


def _download(remote: str, local: Path, timeout: float) -> None:
    """One try."""
    if not is_remote(remote):
        shutil.copyfile(remote, local)
    elif urlsplit(remote).scheme == "s3":
        bucket, key = _bucket_and_key(remote)
        body = _s3(timeout).get_object(Bucket=bucket, Key=key)["Body"]
        with open(local, "wb") as file:
            for chunk in body.iter_chunks(_CHUNK):  # checks the length that was announced
                file.write(chunk)
    else:
        from streaming.base.storage import CloudDownloader

        CloudDownloader.direct_download(remote, str(local), timeout)


def _upload(local: Path, remote: str, timeout: float) -> None:
    """One try."""
    if not is_remote(remote):
        target = Path(remote)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.part")
        shutil.copyfile(local, aside)
        aside.replace(target)
    elif urlsplit(remote).scheme == "s3":
        from boto3.exceptions import S3UploadFailedError

        bucket, key = _bucket_and_key(remote)
        try:
            _s3(timeout).upload_file(str(local), bucket, key)
        except S3UploadFailedError as error:
            raise error.__context__ or error from None
    else:
        from streaming.base.storage import CloudUploader

        folder, _, name = remote.rpartition("/")
        if name != local.name:
            raise ValueError(f"{remote} must keep the name {local.name}")
        uploader = CloudUploader.get((str(local.parent), folder), keep_local=True, exist_ok=True)
        uploader.upload_file(name)


def _bucket_and_key(remote: str) -> tuple[str, str]:
    parts = urlsplit(remote)
    return parts.netloc, parts.path.lstrip("/")


_clients: dict[tuple[int, str, float], Any] = {}
_clients_lock = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_clients_lock=threading.Lock()))


def _s3(timeout: float) -> Any:
    """A client of this process that tries once: the patience is ours."""
    from boto3.session import Session
    from botocore import UNSIGNED
    from botocore.config import Config

    endpoint = os.environ.get("S3_ENDPOINT_URL", "")
    key = (os.getpid(), endpoint, timeout)
    with _clients_lock:
        if key not in _clients:
            session = Session()
            options: dict[str, Any] = {
                "connect_timeout": timeout,
                "read_timeout": timeout,
                "retries": {"total_max_attempts": 1},
            }
            if session.get_credentials() is None:  # a public bucket, perhaps
                options["signature_version"] = UNSIGNED
            _clients[key] = session.client(
                "s3", endpoint_url=endpoint or None, config=Config(**options)
            )
        return _clients[key]
