"""Epochs, trainings and conversions against a real object store that fails in every known way."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_pipeline import assert_user_error, metrics, run_command
from test_images import write_images

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.epochs import CheckedLoader, StreamOptions
from lgm_scale.data.images import ImageDataset
from lgm_scale.data.preparation.convert import convert_folder
from lgm_scale.data.preparation.parts import PartsFolder
from lgm_scale.data.preparation.verify import verify
from lgm_scale.errors import DataError
from lgm_scale.storage.transfer import Patience

pytestmark = pytest.mark.servers

NUM_IMAGES = 240
SHARDS = 12
SECRET = "tests-secret-key"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """240 small images of noise in 6 classes."""
    folder = tmp_path_factory.mktemp("source")
    for label in range(6):
        (folder / f"class{label}").mkdir()
        for i in range(NUM_IMAGES // 6):
            pixels = np.random.default_rng([label, i]).integers(0, 256, (16, 16, 3), np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG")
            (folder / f"class{label}" / f"{i:03}.jpg").write_bytes(buffer.getvalue())
    return folder


@pytest.fixture
def data(bucket, source, tmp_path) -> SourceConfig:
    """The images as a data set in the bucket."""
    size = sum(path.stat().st_size for path in source.rglob("*.jpg"))
    options = {"staging": str(tmp_path / "staging"), "shard_size": size // (SHARDS - 1)}
    convert_folder(source, f"{bucket.url}/images", **options)
    assert not (tmp_path / "staging").exists()
    bucket.proxy.requests.clear()
    return SourceConfig(path=f"{bucket.url}/images", cache=str(tmp_path / "cache"))


def loader_of(data: SourceConfig, patience: Patience, workers: int = 2, **more) -> CheckedLoader:
    options = StreamOptions(patience, predownload=32)
    arguments = {"image_size": 16, "train": True, "seed": 1, "batch_size": 8, "options": options}
    dataset = ImageDataset((data,), **arguments)
    return CheckedLoader(dataset, num_workers=workers, batch_size=8, **more)


def epoch(loader: CheckedLoader) -> list[int]:
    return [i for batch in loader for i in batch["sample_ids"].tolist()]


CALM = Patience(timeout=20, retry_seconds=300)
"""For tests that need no fault to last: passing ones pass sooner, on any machine."""


# Passing faults


@pytest.mark.parametrize("mode", ["500", "503", "reset", "truncate"])
def test_every_fourth_answer_may_fail(bucket, data, mode):
    with bucket.proxy.failing(mode, match="shard.", every=4) as fault:
        seen = epoch(loader_of(data, CALM))
    assert sorted(seen) == list(range(NUM_IMAGES))
    assert fault.done >= 3
    assert verify(data.path).problems == []
    shards = {path.name: path.read_bytes() for path in Path(data.cache).glob("shard.*")}
    stored = {key.split("/")[1]: value for key, value in bucket.objects().items()}
    assert shards == {name: stored[name] for name in stored if name.startswith("shard.")}


def test_the_server_may_be_gone_for_half_a_minute(bucket, data):
    """With the timeouts of the configuration's defaults."""
    loader = loader_of(data, Patience())
    bucket.proxy.go_away()
    begun = time.monotonic()
    threading.Timer(30, bucket.proxy.come_back).start()
    assert sorted(epoch(loader)) == list(range(NUM_IMAGES))
    assert time.monotonic() - begun >= 30


def test_the_real_service_may_restart(bucket, data, gateway):
    loader = loader_of(data, Patience())
    gateway.stop_service()
    before = bucket.proxy.count("shard.")
    with ThreadPoolExecutor(1) as reader:
        seen = reader.submit(epoch, loader)
        while bucket.proxy.count("shard.") < before + 3 and not seen.done():
            time.sleep(0.05)
        gateway.start_service()  # once it was asked, and could not answer
        assert sorted(seen.result()) == list(range(NUM_IMAGES))


def test_a_flipped_bit_is_fetched_again(bucket, data):
    with bucket.proxy.failing("flip", match="shard.00003", first=1) as fault:
        assert sorted(epoch(loader_of(data, CALM))) == list(range(NUM_IMAGES))
    assert fault.done == 1
    assert bucket.proxy.count("shard.00003") == 2


# Lasting faults: loud, within the time, and resumed at the sample


@pytest.mark.parametrize(
    ("mode", "workers"), [("503", 0), ("503", 2), ("hang", 2), ("gone", 2), ("flip", 0)]
)
def test_a_lost_shard_stops_the_epoch_and_nothing_is_lost_or_repeated(bucket, data, mode, workers):
    whole = epoch(loader_of(data, CALM))
    shutil.rmtree(data.cache)
    loader = loader_of(data, CALM, workers)
    if mode != "flip":  # which is told at once; other shards must not be lost to a busy machine
        for each in (loader.dataset, *loader.dataset.streams):  # no more manifests to come
            each.patience = Patience(timeout=1, retry_seconds=3)
    seen: list[int] = []
    lost = rf"shard\.\d+\.mds ({'has another' if mode == 'flip' else 'could not be fetched'})"
    begun = time.monotonic()
    match = "" if mode == "gone" else "shard.00005"

    def read_on(loader: CheckedLoader) -> None:
        for batch in loader:
            seen.extend(batch["sample_ids"].tolist())

    with (
        bucket.proxy.failing("reset" if mode == "gone" else mode, match=match),
        pytest.raises(DataError, match=rf"epoch 0 is not complete: .*{lost}"),
    ):
        read_on(loader)
    assert time.monotonic() - begun < 3 + 120  # retries, and a machine with other work
    assert len(seen) < NUM_IMAGES
    assert seen == whole[: len(seen)]
    state = loader.dataset.state_dict(len(seen), from_beginning=True)
    assert (state["epoch"], state["sample_in_epoch"]) == (0, len(seen))
    del loader
    resumed = loader_of(data, CALM, workers)
    resumed.load_state_dict(state)
    assert epoch(resumed) == whole[len(seen) :]


# Bad accounts and places: one error before anything starts


@pytest.mark.parametrize(
    ("changes", "path", "text"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "", "refuses the credentials"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "", "refuses the credentials"),
        ({}, "s3://no-such-bucket-here/x", "its bucket does not exist|has no manifest.json"),
        ({}, "nothing", "has no manifest.json"),
        ({"fault": "expired"}, "", r"not valid any more \(ExpiredToken\)"),
    ],
)
def test_what_cannot_work_is_one_error_before_the_start(
    bucket, data, monkeypatch, changes, path, text, capfd
):
    where = data.path if not path else path if "://" in path else f"{bucket.url}/{path}"
    source = SourceConfig(path=where, cache=data.cache)
    fault = changes.get("fault")
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as stack:
        if fault:
            stack.enter_context(bucket.proxy.failing(fault))
        error = stack.enter_context(pytest.raises(DataError, match=text))
        loader_of(source, CALM)
    out, err = capfd.readouterr()
    for secret in (SECRET, "wrong-secret"):
        assert secret not in str(error.value) + out + err
    assert not Path(data.cache).exists()


def test_a_cache_belongs_to_one_data_set(bucket, data, source):
    loader_of(data, CALM, workers=0)
    convert_folder(source, f"{bucket.url}/other", 8, staging=f"{data.cache}-staging")
    other = SourceConfig(path=f"{bucket.url}/other", cache=data.cache)
    with pytest.raises(DataError, match="holds another data set than s3://"):
        loader_of(other, CALM)


def test_a_full_disk_is_named_and_leaves_no_damage(bucket, data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    try:
        small = SourceConfig(path=data.path, cache=str(disk / "cache"))
        with pytest.raises(DataError, match=r"no space is left in .*cache"):
            epoch(loader_of(small, CALM))
        stored = {key.split("/")[1]: value for key, value in bucket.objects().items()}
        for path in (disk / "cache").glob("shard.*"):
            assert path.read_bytes() == stored[path.name]
        assert not list((disk / "cache").glob(".shard*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_cache_with_a_limit_still_gives_everything(bucket, data):
    shard = max(len(v) for k, v in bucket.objects().items() if "shard." in k)
    limit = 6 * shard
    options = StreamOptions(CALM, predownload=16, cache_limit=limit)
    arguments = {"image_size": 16, "train": True, "seed": 1, "batch_size": 8, "options": options}
    loader = CheckedLoader(ImageDataset((data,), **arguments), num_workers=1, batch_size=8)
    for _ in range(2):
        assert sorted(epoch(loader)) == list(range(NUM_IMAGES))
    # What is being fetched does not count yet: a worker has three threads that fetch.
    found = sum(path.stat().st_size for path in Path(data.cache).glob("shard.*"))
    assert found <= limit + 2 * shard


# The commands


def test_a_training_stops_with_status_2_and_resumes_to_the_same_numbers(
    bucket, small_pipeline, tmp_path
):
    """The generator on latents in the bucket: the storage goes under way, and comes back."""
    stored = tmp_path / "latents"
    arguments = ("--tokenizer", small_pipeline.tokenizer, "--images", small_pipeline.images)
    arguments += ("--out", f"{bucket.url}/latents", "--staging", tmp_path / "staging")
    result = run_command("data_tools/encode_latents.py", *arguments, "--shard-size", "3000")
    assert result.returncode == 0, result.stderr
    assert verify(f"{bucket.url}/latents").problems == []
    data = {"path": f"{bucket.url}/latents", "num_workers": 1, "predownload": 8, "timeout": 9.0}
    data |= {"retry_seconds": 10.0}
    runs = {}
    for name in ("undisturbed", "disturbed"):
        changes = {"data": {**data, "cache": str(tmp_path / f"cache-{name}")}}
        changes["train"] = {
            "max_duration": "16ba", "global_batch_size": 8, "precision": "fp32"
        }  # fmt: skip
        runs[name] = small_pipeline.generator_config(tmp_path / name, **changes)
    train = "lgm_scale/train.py"
    patient = "data.retry_seconds=300"
    assert run_command(train, runs["undisturbed"], patient).returncode == 0
    with bucket.proxy.failing("503", match="shard.00003"):
        stopped = run_command(train, runs["disturbed"])
    assert_user_error(stopped, "is not complete", "shard.00003.mds could not be fetched")
    assert SECRET not in stopped.stdout + stopped.stderr
    assert not (tmp_path / "disturbed" / "bundle").exists()
    again = run_command(train, runs["disturbed"], patient)
    assert again.returncode == 0, again.stderr
    assert metrics(tmp_path / "disturbed") == metrics(tmp_path / "undisturbed")
    assert not stored.exists()


def die_after_four_parts() -> None:
    """Let SIGKILL meet a command and its workers once four parts are written."""
    write = PartsFolder.write

    def write_and_die(self, *args, **options):
        write(self, *args, **options)
        if len(list(self.folder.glob("part.*.json"))) >= 4:
            os.killpg(0, signal.SIGKILL)

    PartsFolder.write = write_and_die  # type: ignore[method-assign]


def contents(bucket, folder: str) -> dict[str, bytes]:
    return {k: v for k, v in bucket.objects().items() if k.startswith(f"{folder}/")}


def renamed(objects: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {f"{folder}/{key.split('/', 1)[1]}": value for key, value in objects.items()}


def test_a_killed_conversion_leaves_the_objects_of_an_undisturbed_one(bucket, source, tmp_path):
    def converted(name: str, **options) -> subprocess.CompletedProcess[str]:
        places = ["--out", f"{bucket.url}/{name}", "--staging", tmp_path / name]
        words = [source, *places, "--shard-size", "8000", "--workers", "2"]
        return run_command("data_tools/images_to_mds.py", *words, **options)

    assert converted("whole").returncode == 0
    assert converted("killed", prepare=die_after_four_parts).returncode == -signal.SIGKILL
    assert "killed/manifest.json" not in bucket.objects()
    finished = contents(bucket, "killed")
    before = sum(method == "PUT" for method, _ in bucket.proxy.requests)
    assert converted("killed").returncode == 0
    assert renamed(contents(bucket, "killed"), "whole") == contents(bucket, "whole")
    writes = sum(method == "PUT" for method, _ in bucket.proxy.requests) - before
    assert writes <= len(contents(bucket, "killed")) - len(finished) + 2  # at most those in flight
    assert "nothing to do" in converted("killed").stdout


def test_a_killed_encoding_is_finished_by_other_ranks(bucket, small_pipeline, tmp_path):
    inputs = ["--tokenizer", small_pipeline.tokenizer, "--images", small_pipeline.images]
    inputs += ["--shard-size", "2000", "--batch-size", "3", "--workers", "0"]

    def encoded(name: str, **options) -> subprocess.CompletedProcess[str]:
        places = ["--out", f"{bucket.url}/{name}", "--staging", tmp_path / name]
        return run_command("data_tools/encode_latents.py", *inputs, *places, **options)

    assert encoded("whole").returncode == 0
    assert encoded("killed", prepare=die_after_four_parts).returncode == -signal.SIGKILL
    result = encoded("killed", ranks=2)
    assert result.returncode == 0, result.stderr
    assert renamed(contents(bucket, "killed"), "whole") == contents(bucket, "whole")
    assert verify(f"{bucket.url}/killed").problems == []


def test_a_destination_with_another_data_set_is_refused(bucket, data, source, tmp_path):
    before = bucket.objects()
    with pytest.raises(DataError, match="holds another data set"):
        convert_folder(source, data.path, 8, staging=str(tmp_path / "s"))
    write_images(tmp_path / "mds", 3)
    bucket.put("strange/index.json", (tmp_path / "mds" / "index.json").read_bytes())
    with pytest.raises(DataError, match="is not a finished result"):
        convert_folder(source, f"{bucket.url}/strange", staging=str(tmp_path / "s"))
    assert {k: v for k, v in bucket.objects().items() if "strange" not in k} == before


def test_verification_of_the_bucket_finds_a_damaged_shard(bucket, data):
    key = "images/shard.00002.mds"
    damaged = bytearray(bucket.objects()[key])
    damaged[len(damaged) // 2] ^= 1
    bucket.put(key, bytes(damaged))
    result = run_command("data_tools/verify_mds.py", data.path)
    assert result.returncode == 1, result.stderr
    assert "shard.00002.mds has another sha256" in result.stdout
    assert SECRET not in result.stdout + result.stderr
