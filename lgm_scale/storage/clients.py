"""How each kind of storage is asked: one try, with whatever error its client raises.

S3 is asked through boto3, one request per file, because its errors then name their reason; other
kinds of object storage through the streaming library, which knows many.
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lgm_scale.storage.files import write_whole

_CHUNK = 1 << 20
_TRIES_OF_A_PART = 5  # of a large file: one torn connection must not cost gigabytes


def is_remote(location: str) -> bool:
    """Whether a location is object storage (`s3://...`) and not a folder."""
    return "://" in location


def bucket_and_key(location: str) -> tuple[str, str]:
    """Bucket, and key or prefix of keys, of an `s3://` location."""
    parts = urlsplit(location)
    return parts.netloc, parts.path.lstrip("/")


def download(remote: str, local: Path, timeout: float, large: bool) -> None:
    """Copy a file here, in one try; a large one from S3 in parts, each tried again by itself."""
    if not is_remote(remote):
        shutil.copyfile(remote, local)
    elif urlsplit(remote).scheme != "s3":
        from streaming.base.storage import CloudDownloader

        local.unlink(missing_ok=True)  # the library takes what is there for complete
        CloudDownloader.direct_download(remote, str(local), timeout)
    elif large:
        bucket, key = bucket_and_key(remote)
        s3_client(timeout, _TRIES_OF_A_PART).download_file(bucket, key, str(local))
    else:
        bucket, key = bucket_and_key(remote)
        body = s3_client(timeout).get_object(Bucket=bucket, Key=key)["Body"]
        with open(local, "wb") as file:
            for chunk in body.iter_chunks(_CHUNK):  # checks the length that was announced
                file.write(chunk)


def upload(local: Path, remote: str, timeout: float, large: bool) -> None:
    """Copy a file to its place, in one try; the parts of a large one are tried again on S3."""
    if not is_remote(remote):
        write_whole(Path(remote), lambda aside: shutil.copyfile(local, aside))
    elif urlsplit(remote).scheme == "s3":
        from boto3.exceptions import S3UploadFailedError

        bucket, key = bucket_and_key(remote)
        try:
            tries = _TRIES_OF_A_PART if large else 1
            s3_client(timeout, tries).upload_file(str(local), bucket, key)
        except S3UploadFailedError as error:
            raise error.__context__ or error from None
    else:
        from streaming.base.storage import CloudUploader

        folder, _, name = remote.rpartition("/")
        if name != local.name:
            raise ValueError(f"{remote} must keep the name {local.name}")
        uploader = CloudUploader.get((str(local.parent), folder), keep_local=True, exist_ok=True)
        uploader.upload_file(name)


_clients: dict[tuple[int, str, float, int], Any] = {}
_clients_lock = threading.Lock()
# A data worker may be forked while another thread holds the lock.
os.register_at_fork(after_in_child=lambda: globals().update(_clients_lock=threading.Lock()))


def s3_client(timeout: float, tries: int = 1) -> Any:
    """The S3 client of this process.

    Args:
        timeout: Seconds without a byte after which one request is given up.
        tries: How often botocore itself tries a request; 1 leaves the patience to `persist`.
    """
    from boto3.session import Session
    from botocore import UNSIGNED
    from botocore.config import Config

    endpoint = os.environ.get("S3_ENDPOINT_URL", "")
    key = (os.getpid(), endpoint, timeout, tries)
    with _clients_lock:
        if key not in _clients:
            session = Session()
            options: dict[str, Any] = {
                "connect_timeout": timeout,
                "read_timeout": timeout,
                "retries": {"mode": "standard", "total_max_attempts": tries},
            }
            if session.get_credentials() is None:  # a public bucket, perhaps
                options["signature_version"] = UNSIGNED
            _clients[key] = session.client(
                "s3", endpoint_url=endpoint or None, config=Config(**options)
            )
        return _clients[key]
