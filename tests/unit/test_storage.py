"""Files are there whole or not at all; else an error names the file and the cause.

Against moto, the light S3 server; `tests/system/s3` does the same with a real one.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from fault_proxy import FaultProxy
from kill_points import KillPoints
from moto.server import ThreadedMotoServer
from small_pipeline import ROOT

from lgm_scale.data.shards import _claim
from lgm_scale.errors import DataError
from lgm_scale.storage.files import folder_aside, replace_folder, write_json, write_whole
from lgm_scale.storage.stores import Storage, open_storage
from lgm_scale.storage.transfer import (
    Expected,
    MissingFileError,
    Patience,
    StorageError,
    fetch,
    join,
    read_remote,
    shown,
    store,
)

DATA = bytes(range(256)) * 4000
CALM = Patience(timeout=20, retry_seconds=300)
"""For tests that need no fault to last: passing ones pass sooner, on any machine."""
SECRET = "a-secret-that-no-message-shows"
REMOTE = "s3://bucket/folder/x"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def proxy(server, monkeypatch) -> Iterator[FaultProxy]:
    with FaultProxy(server) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=server)
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="folder/x", Body=DATA)
        yield proxy


EXPECTED = Expected(len(DATA), {"sha256": hashlib.sha256(DATA).hexdigest()})


@pytest.mark.parametrize("mode", ["500", "503", "reset", "truncate", "hang", "flip"])
def test_what_passes_is_outlasted(proxy, tmp_path, mode):
    with proxy.failing(mode, first=1) as fault:
        fetch(REMOTE, tmp_path / "x", Patience(1 if mode == "hang" else 20, 300), EXPECTED)
        assert fault.done == 1
    assert (tmp_path / "x").read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("mode", ["503", "hang", "trickle", "reset"])
def test_what_stays_is_an_error_within_the_time(proxy, tmp_path, mode):
    begun = time.monotonic()
    with (
        proxy.failing(mode),
        pytest.raises(DataError, match=r"bucket/folder/x could not be fetched within 2 s .*tries"),
    ):
        fetch(REMOTE, tmp_path / "x", Patience(timeout=0.5, retry_seconds=2), EXPECTED)
    assert time.monotonic() - begun < 2 + 60  # its patience, and a machine with other work
    assert not (tmp_path / "x").exists()


def test_a_server_may_be_gone_for_a_while(proxy, tmp_path):
    proxy.go_away()
    threading.Timer(2.0, proxy.come_back).start()
    fetch(REMOTE, tmp_path / "x", CALM, EXPECTED)
    assert (tmp_path / "x").read_bytes() == DATA


def test_a_damaged_file_is_fetched_twice_and_then_named(proxy, tmp_path):
    with (
        proxy.failing("flip") as fault,
        pytest.raises(DataError, match=r"folder/x has another (sha256|checksum) .* is damaged"),
    ):
        fetch(REMOTE, tmp_path / "x", CALM, EXPECTED)
    assert fault.done == 2
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="has 1,024,000 bytes instead of 7"):
        fetch(REMOTE, tmp_path / "x", CALM, Expected(7))


@pytest.mark.parametrize(
    ("remote", "text"),
    [
        ("s3://bucket/nowhere", "there is no such file"),
        ("s3://no-bucket/x", "bucket does not exist"),
    ],
)
def test_what_is_not_there_is_said_at_once(proxy, tmp_path, remote, text):
    begun = time.monotonic()
    with pytest.raises(MissingFileError, match=text):
        fetch(remote, tmp_path / "x", CALM)
    assert time.monotonic() - begun < CALM.retry_seconds
    assert read_remote(remote, CALM) is None


def test_an_expired_token_is_said_at_once(proxy, tmp_path):
    with proxy.failing("expired"), pytest.raises(DataError, match=r"not valid any more .*Expired"):
        fetch(REMOTE, tmp_path / "x", CALM)


def test_no_message_has_a_secret(proxy, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    texts = []
    for mode in ("503", "expired", "reset"):
        with proxy.failing(mode), pytest.raises(DataError) as error:
            fetch(REMOTE, tmp_path / "x", Patience(0.5, 1))
        texts.append(str(error.value))
    assert SECRET not in "".join(texts) + caplog.text
    assert shown("sftp://user:password@host/x?sig=1") == "sftp://host/x"


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(DATA)

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lgm_scale.storage.clients.shutil.copyfile", full)
    with pytest.raises(DataError, match=r"no space is left in .*cache"):
        fetch(str(tmp_path / "source"), tmp_path / "cache" / "x", CALM)
    assert list((tmp_path / "cache").iterdir()) == []


def test_files_are_stored_and_read_back(proxy, tmp_path):
    (tmp_path / "y").write_bytes(DATA)
    for folder in ("s3://bucket/out", str(tmp_path / "out")):
        store(tmp_path / "y", join(folder, "y"), CALM)
        assert read_remote(join(folder, "y"), CALM) == DATA
    with pytest.raises(DataError, match="bucket does not exist"):
        store(tmp_path / "y", "s3://no-bucket/y", CALM)


# Many files under one root


@pytest.fixture(params=["folder", "bucket"])
def storage(request, tmp_path) -> Storage:
    if request.param == "folder":
        return Storage(tmp_path / "state")
    request.getfixturevalue("proxy")
    root = f"s3://bucket/{tmp_path.name}"
    return open_storage(root, "checkpoint.folder", CALM)


def test_files_under_a_root_are_listed_moved_and_deleted(storage, tmp_path):
    storage.write("run.json", b"first")
    storage.write("run.json", b"second")
    assert storage.create("attempts/0001.json", b"mine")
    assert not storage.create("attempts/0001.json", b"theirs")
    with storage.workplace() as workplace:
        path = Path(workplace, "rank")
        path.write_bytes(DATA)
        assert storage.names() == ["attempts/0001.json", "run.json"]  # not what is being written
        storage.put(path, "ba1/rank")
        assert not path.exists()
    assert storage.names("ba1/") == ["ba1/rank"]
    assert (storage.read("run.json"), storage.read("attempts/0001.json")) == (b"second", b"mine")
    assert storage.get("ba1/rank", tmp_path).read_bytes() == DATA
    storage.delete("ba1/")
    assert storage.names("ba1/") == []
    for missing in (lambda: storage.read("ba1/rank"), lambda: storage.get("ba1/rank", tmp_path)):
        with pytest.raises(FileNotFoundError):
            missing()


WRITER = """
import sys, threading
from lgm_scale.storage.stores import Storage

def write():
    with Storage(sys.argv[1]).workplace():
        inside.set()
        threading.Event().wait()

inside = threading.Event()
threading.Thread(target=write, daemon=True).start()
inside.wait()
sys.exit(3 if list(Storage(sys.argv[1]).path.iterdir()) else "nothing was there")
"""


def test_a_process_that_fails_while_a_thread_writes_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 3
    assert list(tmp_path.iterdir()) == []


def test_states_outlast_what_passes(proxy, tmp_path):
    storage = open_storage("s3://bucket/outlast", "checkpoint.folder", CALM)
    (tmp_path / "rank").write_bytes(DATA)
    with proxy.failing("503", first=2):
        storage.put(tmp_path / "rank", "rank")
    with proxy.failing("reset", first=2):
        assert storage.names() == ["rank"]
    with proxy.failing("truncate", first=1):
        assert storage.get("rank", tmp_path).read_bytes() == DATA


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("s3://no-bucket/run", r"^checkpoint.folder: s3://no-bucket/run .*NoSuchBucket"),
        ("ftp://user:pass@host/x", r"^checkpoint.folder: ftp://host/x .* use a folder, s3://"),
    ],
)
def test_a_root_that_cannot_be_is_told_with_its_key(proxy, uri, text):
    with pytest.raises(StorageError, match=text):
        open_storage(uri, "checkpoint.folder", CALM).names()


def test_an_error_of_storage_reaches_other_ranks_whole():
    for error in (StorageError("s3://x: why"), MissingFileError("s3://x: gone")):
        copied = pickle.loads(pickle.dumps(error))
        assert (type(copied), str(copied)) == (type(error), str(error))


# Whole or not at all


@pytest.mark.parametrize("content", ["text", b"bytes", lambda aside: aside.write_text("written")])
def test_a_kill_before_any_change_leaves_a_whole_file(tmp_path, monkeypatch, content):
    kill, path, step = KillPoints(monkeypatch), tmp_path / "folder" / "x", 1
    while kill.run(lambda: write_whole(path, content), step):
        assert not path.exists()
        step += 1
    new = path.read_bytes()
    path.write_bytes(b"old")
    step = 1
    while kill.run(lambda: write_whole(path, content), step):
        assert path.read_bytes() in (b"old", new)
        step += 1
    assert step > 2


def test_a_cache_is_claimed_after_a_kill_at_any_moment(tmp_path, monkeypatch):
    kill, cache, step = KillPoints(monkeypatch), tmp_path / "cache", 1
    write, unlink = Path.write_bytes, Path.unlink
    while kill.run(lambda: _claim(cache, b"manifest", "s3://bucket/data"), step):
        step += 1
    shutil.rmtree(cache)

    def half(path: Path, content: bytes) -> None:
        write(path, content[:3])
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a kill cleans nothing up
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        _claim(cache, b"manifest", "s3://bucket/data")
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(Path, "write_bytes", write)
    monkeypatch.setattr(Path, "unlink", unlink)
    _claim(cache, b"manifest", "s3://bucket/data")
    assert (cache / "manifest.json").read_bytes() == b"manifest"


def test_a_failure_leaves_nothing_aside(tmp_path):
    def fails(aside: Path) -> None:
        aside.write_bytes(b"half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_whole(tmp_path / "x", fails)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x", {"loss": float("nan")})


def test_a_folder_is_never_half(tmp_path, monkeypatch):
    folder = tmp_path / "bundle"

    def replace(content: str) -> None:
        aside = folder_aside(folder)
        for name in ("a", "b"):
            (aside / name).write_text(content)
        replace_folder(folder, aside)

    replace("old")
    kill, step = KillPoints(monkeypatch), 1
    while kill.run(lambda: replace("new"), step):
        step += 1
        if folder.exists():
            assert {path.read_text() for path in folder.iterdir()} in ({"old"}, {"new"})
            assert len(list(folder.iterdir())) == 2
        else:
            replace("old")
    assert step > 4
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
