"""Ctrl-C, disks and paths that fail, readers that leave: what a user sees, and what is kept."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from small_pipeline import ROOT, losses, train_in_process
from small_sweep import make_sweep_inputs, numbers_of, sweep_file
from typed_commands import refusal, typed

from lgm_scale import sample
from lgm_scale import train as training
from lgm_scale.data.preparation import convert, encode
from lgm_scale.data.preparation.parts import PartsFolder
from lgm_scale.errors import end_at_once
from lgm_scale.evaluation.commands import sweep
from lgm_scale.evaluation.engine.stages import Engine
from lgm_scale.training.callbacks import StepKeys

INTERRUPTED = 130


def interrupted_after(count: int, function: Callable) -> Callable:
    """The same function, and Ctrl-C for this process after it was called so often."""
    calls = []

    def call(*args, **options):
        result = function(*args, **options)
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    return call


# --- Ctrl-C ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_saves_and_goes_on(small_pipeline, tmp_path, monkeypatch, capfd):
    checkpoint = {"interval": "100ba"}  # the only state is the one of Ctrl-C
    paths = [
        small_pipeline.generator_config(tmp_path / name, run_name="x", checkpoint=checkpoint)
        for name in ("stopped", "whole")
    ]
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(StepKeys, "batch_start", interrupted_after(4, StepKeys.batch_start))
        said = typed(training.main, paths[0])
    assert said.status == 75
    assert "stopped after step 4, state saved; the same command again goes on" in said.out
    assert "Ctrl-C: saving after the next step; once more ends at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) == before
    assert [p.name for p in (tmp_path / "stopped/state").glob("ba*")] == ["ba00000004-a0001"]
    assert typed(training.main, paths[0]).status == 0
    assert losses(tmp_path / "stopped", 10) == losses(train_in_process(paths[1]), 10)


def test_the_second_one_ends_a_training_at_once(small_pipeline, tmp_path, monkeypatch):
    path = small_pipeline.generator_config(tmp_path / "run")
    handlers = []

    def batch_start(self, state, logger, start=StepKeys.batch_start):
        start(self, state, logger)
        if state.batch["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        handlers.append(signal.getsignal(signal.SIGINT))

    monkeypatch.setattr(StepKeys, "batch_start", batch_start)
    assert typed(training.main, path).status == 75
    assert handlers[1] is not end_at_once
    assert handlers[2] is end_at_once


SLEEPER = """
import multiprocessing, os, signal, sys, time
from lgm_scale.errors import exit_on_user_error

def sleep():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(600)

def main():
    child = multiprocessing.get_context("fork").Process(target=sleep)
    child.start()
    print(child.pid, flush=True)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)
    finally:
        if len(sys.argv) == 1:  # puts away what it has begun, and hangs
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(600)
        child.kill()

exit_on_user_error(main)
"""


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("words", [[], ["puts away"]])
def test_any_command_ends_with_one_line_and_leaves_no_process(words):
    result = subprocess.run(
        [sys.executable, "-c", SLEEPER, *words],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert result.returncode == INTERRUPTED
    said = "\ninterrupted; the same command again makes what is missing\n" if words else ""
    assert result.stderr == said
    deadline = time.monotonic() + 300
    while lives(int(result.stdout)):  # killed, which takes a moment
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_conversion_keeps_its_parts(small_pipeline, tmp_path, monkeypatch, workers):
    photos = small_pipeline.root / "photos" / "train"
    options = ("--shard-size", "8000", "--image-size", "32", "--workers", workers)
    write, me = PartsFolder.write, os.getpid()

    def write_then_interrupt(self, part, *args):
        write(self, part, *args)
        if part == 3:
            os.kill(me, signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(PartsFolder, "write", write_then_interrupt)
        said = typed(convert.main, photos, "--out", tmp_path / "mds", *map(str, options))
    assert said.status == INTERRUPTED, said
    assert "Traceback" not in said.err
    kept = sorted((tmp_path / "mds.partial").glob("part.*.json"))
    assert len(kept) >= (4 if workers == 0 else 1)
    assert not (tmp_path / "mds").exists()
    times = [path.stat().st_mtime_ns for path in kept]
    with monkeypatch.context() as patch:
        patch.setattr(PartsFolder, "write", lambda self, part, *args: made.append(part) or write(
            self, part, *args))  # fmt: skip
        made: list[int] = []
        again = ("--out", tmp_path / "mds", *map(str, options[:-1]), "0")
        assert typed(convert.main, photos, *again).status == 0
    assert not {int(path.name.split(".")[1]) for path in kept} & set(made)
    assert len(times) + len(made) == len(list((tmp_path / "mds").glob("shard.*.mds")))


def test_an_encoding_keeps_its_parts(small_pipeline, tmp_path, monkeypatch):
    words = ("--tokenizer", small_pipeline.tokenizer, "--images", small_pipeline.images)
    words += ("--out", tmp_path / "z", "--shard-size", "4000", "--workers", "0")
    with monkeypatch.context() as patch:
        patch.setattr(PartsFolder, "write", interrupted_after(2, PartsFolder.write))
        assert typed(encode.main, *words).status == INTERRUPTED
    assert len(list((tmp_path / "z.partial").glob("part.*.json"))) == 2
    made: list[int] = []
    write = PartsFolder.write
    monkeypatch.setattr(
        PartsFolder, "write", lambda self, part, *a: made.append(part) or write(self, part, *a)
    )
    assert typed(encode.main, *words).status == 0
    assert made[0] == 2


@pytest.mark.slow
def test_a_sweep_keeps_its_chunks(tmp_path, monkeypatch):
    made = make_sweep_inputs(tmp_path / "made")
    whole, stopped = (sweep_file(made, tmp_path / name) for name in ("whole", "stopped"))
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "make_sums", interrupted_after(1, Engine.make_sums))
        assert typed(sweep.main, stopped).status == INTERRUPTED
    assert not (tmp_path / "stopped" / "results.json").exists()
    assert typed(sweep.main, stopped).status == typed(sweep.main, whole).status == 0
    assert numbers_of(tmp_path / "stopped") == numbers_of(tmp_path / "whole")


# --- disks and paths ------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_is_told_before_anything_is_built(small_pipeline, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = small_pipeline.generator_config(tmp_path / "run")
    for name, text in (
        ("file", "out: {} is a file, or a link"),
        ("loop", "out: {} is a file, or a link that leads nowhere"),
        ("file/below", "out: {} lies below {root}/file, which is a file"),
    ):
        said = refusal(training.main, path, f"out={tmp_path / name}", "optimizer.lr=-1")
        assert text.format(tmp_path / name, root=tmp_path) in said
        assert "optimizer.lr: -1" in said
        assert "another" in said


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSPC, "No space left on device; choose another folder, or mend this one"),
        (errno.EROFS, "Read-only file system; choose another folder, or mend this one"),
        (errno.EACCES, "Permission denied; choose another folder, or mend this one"),
    ],
)
def test_a_disk_that_takes_nothing_is_told(small_pipeline, tmp_path, monkeypatch, code, text):
    def full(path, content):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr("lgm_scale.checkpoint.run_folder.write_whole", full)
    said = refusal(training.main, small_pipeline.generator_config(tmp_path / "run"))
    assert f"out: {tmp_path / 'run'} cannot be written ({text.split(';')[0]})" in said
    assert text.split("; ")[1] in said


def test_a_disk_that_fills_up_under_way_is_told(small_pipeline, tmp_path, monkeypatch):
    path = small_pipeline.generator_config(tmp_path / "run")
    open_as_ever = Path.open

    def full(self, mode="r", *args, **options):
        if self.name == "metrics.jsonl" and mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return open_as_ever(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    said = refusal(training.main, path)
    assert "metrics.jsonl: No space left on device; make room, and run the same command" in said


def test_links_that_loop_are_told(tmp_path):
    photos = tmp_path / "photos"
    (photos / "cat").mkdir(parents=True)
    (photos / "dog").symlink_to(photos / "dog")
    said = refusal(convert.main, photos, "--out", tmp_path / "mds")
    assert "dog" in said
    assert "Too many levels of symbolic links; mend the link, which leads back to itself" in said
    shutil.rmtree(photos)
    (photos / "cat").mkdir(parents=True)
    (photos / "cat" / "up").symlink_to(photos)
    said = refusal(convert.main, photos, "--out", tmp_path / "mds")
    assert "holds another folder, 'up'" in said


def test_files_have_the_mode_that_the_umask_says(small_pipeline, tmp_path):
    before = os.umask(0o027)
    try:
        out = train_in_process(small_pipeline.tokenizer_config(tmp_path / "run"))
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()}
    assert {path.suffix for path in modes} >= {".safetensors", ".json", ".jsonl"}
    assert set(modes.values()) == {0o640}, modes
    stats = small_pipeline.latents / "latent_stats.safetensors"
    assert load_file(stats)
    assert stat.S_IMODE(stats.stat().st_mode) == 0o666 & ~before


# --- words that mean nothing ----------------------------------------------------------------------


def test_a_device_that_there_is_not(tmp_path):
    made = make_sweep_inputs(tmp_path)
    words = (made / "dit", "--classes", "dog", "--out", tmp_path / "a.png", "--device")
    assert "device: 'gpu0' is no device; write cpu, cuda" in refusal(sample.main, *words, "gpu0")
    assert "no CUDA device is visible" in refusal(sample.main, *words, "cuda")


@pytest.mark.parametrize("ranks", ["0", "-3"])
def test_no_ranks_are_no_run(ranks):
    said = refusal(training.main, "yamls/dit_xl.yaml", "--dry-run", "--world-size", ranks)
    assert f"--world-size: {ranks} must be 1 or more" in said


READER = "from lgm_scale.errors import exit_on_user_error\nexit_on_user_error(lambda: print({}))"


@pytest.mark.parametrize("text", ["'x'", "'x' * 10**6"])
def test_a_reader_that_has_seen_enough_is_no_error(text):
    process = subprocess.Popen(
        [sys.executable, "-c", READER.format(text)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate(timeout=600)[1] == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_connection_of_ours_that_breaks_is_an_error():
    code = (
        "from lgm_scale.errors import exit_on_user_error\ndef main():\n raise BrokenPipeError(32)"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nexit_on_user_error(main)"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "BrokenPipeError" in result.stderr


@pytest.mark.parametrize(
    "command",
    ["data_tools/images_to_mds.py", "data_tools/demo_images.py", "eval/sweep.py",
     "launchers/slurm.py", "launchers/pipeline.py", "launchers/status.py"],
)  # fmt: skip
def test_a_python_without_the_packages_is_told(command):
    result = subprocess.run(
        [sys.executable, "-S", ROOT / command, "x"],
        cwd="/", env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "is not this project's: it needs Python 3.10 to 3.12 and its packages" in result.stderr
