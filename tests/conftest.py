"""Fixtures for all tests."""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

# One thread per test process: on few cores, OpenMP threads that wait for each other cost more
# than they bring. Before torch is imported, and inherited by the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# DeepSpeed imports torch's compiler, which then starts processes that import torch once more.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from pathlib import Path
from typing import Any

import pytest
import torch
from forked_workers import ForkedWorkers
from random_weights import save_random_inception, save_random_vgg16
from rank_processes import share_server
from small_pipeline import SmallPipeline
from system_packages import CHROMIUM, obstacle
from typed_commands import typed

SHARED_MEMORY = Path("/dev/shm")
STARTED = pytest.StashKey[float]()


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let everything that a test starts litter where pytest clears up."""
    multiprocessing.util.get_temp_dir()  # lies elsewhere: it is removed at exit, after pytest's
    folder = tmp_path_factory.mktemp("tmp", numbered=False)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


ROOMS = ("tests/system/slurm", "tests/system/s3", "tests/distributed", "tests/system", "")
"""Longest waits first, and in each room what has slow tests: short files fill the end's gaps."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--jobs", type=int, default=1, help="in how many processes tests run")
    parser.addoption(
        "--second-try", action="store_true",
        help="run tests of servers and of chance once more if they fail, and say which did",
    )  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def order(item: pytest.Item) -> tuple[int, bool]:
        room = next(n for n, room in enumerate(ROOMS) if item.nodeid.startswith(room))
        return room, item.path not in slow

    items.sort(key=order)
    if config.option.second_try:
        # Its timer is that of both tries: what has hung would hang again, with nobody to end it.
        again = pytest.mark.flaky(reruns=1, rerun_except="from pytest-timeout")
        for item in items:
            if any(item.get_closest_marker(name) for name in ("servers", "thorough")):
                item.add_marker(again)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Let nobody overlook a test that needed its second try."""
    first = terminalreporter.stats.get("rerun", [])
    if first:
        terminalreporter.section("failed at the first try", yellow=True)
    for report in first:
        terminalreporter.write_line(f"{report.nodeid} failed, and was run once more:", yellow=True)
        crash = getattr(report.longrepr, "reprcrash", None)
        terminalreporter.write_line(crash.message if crash else report.longreprtext)


def _scope(nodeid: str) -> str:
    """A worker has whole files, and all files that share a cluster or a gateway."""
    file = nodeid.split("::", 1)[0]
    return next((room for room in ROOMS[:2] if file.startswith(room)), file)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.jobs > 1:
        workers = ForkedWorkers(config, config.option.jobs, _scope)
        config.pluginmanager.register(workers, "forked_workers")


gc.disable()  # until everything is imported: each pass over what is there takes half a second


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let garbage collection pass over what was imported: a third of a second after each test."""
    gc.freeze()
    gc.enable()
    rooms = (not item.nodeid.startswith("tests/unit") for item in session.items)
    slow = (item.get_closest_marker("slow") for item in session.items)
    if session.config.option.jobs > 1 and (any(rooms) or any(slow)):
        folder = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        share_server(folder / "server-of-ranks.txt")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[STARTED] = time.time()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remove the shared memory that killed ranks have left, once no process has it open."""
    if not SHARED_MEMORY.is_dir():
        return
    left = []
    for path in SHARED_MEMORY.glob("[0-9]*_*"):
        with contextlib.suppress(FileNotFoundError):  # another program's, which has just ended
            if path.stat().st_mtime >= session.config.stash[STARTED]:
                left.append(path)
    open_now = set()
    for maps in Path("/proc").glob("[0-9]*/maps") if left else ():
        try:
            open_now |= {word for word in maps.read_text().split() if word.startswith("/dev/shm/")}
        except OSError:  # it has just ended, or is somebody else's
            continue
    for path in left:
        if str(path) not in open_now:
            path.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def release_shared_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close what streaming opened in a test; it keeps a dozen files per data set to the end.

    Streaming is not imported for it, which takes five seconds: what the first test opens that
    imports it stays open until the process ends. Threads that read ahead end first: in closed
    memory they would look for a shard for ever, and hold the process up when it ends.
    """
    opened: list[Any] = []
    iterators: list[Any] = []
    reading: list[Future[Any]] = []
    memories = sys.modules.get("streaming.base.shared.memory")
    if memories is not None:
        start = memories.SharedMemory.__init__

        def noted(self: Any, *args: object, **options: object) -> None:
            start(self, *args, **options)
            opened.append(self)

        monkeypatch.setattr(memories.SharedMemory, "__init__", noted)
        library = sys.modules["streaming.base.dataset"]
        start_reading = library._Iterator.__init__

        def noted_iterator(self: Any, sample_ids: Any) -> None:
            start_reading(self, sample_ids)
            iterators.append(self)

        class NotedExecutor(ThreadPoolExecutor):
            def submit(self, *call: Any, **options: Any) -> Future[Any]:
                reading.append(super().submit(*call, **options))
                return reading[-1]

        monkeypatch.setattr(library._Iterator, "__init__", noted_iterator)
        monkeypatch.setattr(library, "ThreadPoolExecutor", NotedExecutor)
    yield
    for iterator in iterators:
        iterator.non_blocking_exit()
    wait(reading)
    if any([not _closed(memory) for memory in opened]):
        gc.collect()  # data sets in circles, whose arrays lie in this memory
        for memory in opened:
            _closed(memory)


def _closed(memory: Any) -> bool:
    """Close it; False while it is in use, as by a fixture of wider scope: closed at the end."""
    try:
        memory.cleanup()
    except BufferError:
        return False
    atexit.unregister(memory.cleanup)
    return True


@pytest.fixture(scope="session")
def small_pipeline(tmp_path_factory: pytest.TempPathFactory) -> SmallPipeline:
    """68 images of 32 x 32 in 17 classes, a random tokenizer, and the latents it makes."""
    from data_tools.demo_images import DemoArguments, make_demo_images
    from lgm_scale.data.preparation import encode
    from lgm_scale.data.preparation.convert import convert_folder
    from lgm_scale.families.tokenizer.bundle import save_tokenizer_bundle
    from lgm_scale.families.tokenizer.config import TokenizerModelConfig
    from lgm_scale.families.tokenizer.network import build_tokenizer

    root = tmp_path_factory.mktemp("small")
    pipeline = SmallPipeline(root)
    make_demo_images(root / "photos", DemoArguments(32, 4, 2, 0))
    convert_folder(root / "photos" / "train", pipeline.images, 32)
    config = TokenizerModelConfig(
        size="tiny",
        image_size=32,
        patch_size=8,
        num_base_tokens=16,
        latent_dim=8,
        codebook_size=32,
        latent_init="aligned",
    )
    torch.manual_seed(0)
    net = build_tokenizer(config)
    save_tokenizer_bundle(pipeline.tokenizer, config, net.state_dict(), net.merge_tree(), {})
    options = ("--images", pipeline.images, "--tokenizer", pipeline.tokenizer)
    said = typed(encode.main, *options, "--out", pipeline.latents)
    assert said.status == 0, said.err
    return pipeline


@pytest.fixture(scope="session")
def vgg16_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG16 with random weights."""
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.pth"
    save_random_vgg16(path)
    return path


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception with random weights."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    save_random_inception(path)
    return path


@pytest.fixture(scope="session")
def browser() -> str:
    """A headless browser, installed through apt where that is possible; else a reason to skip."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        if reason := obstacle(*CHROMIUM):
            pytest.skip(f"no browser: {reason}")
        found = shutil.which("chromium")
    assert found is not None
    return found
