"""`--jobs`: tests in forked processes are reported as in one; a process that dies is a failure."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

pytest_plugins = "pytester"

CONFTEST = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
from forked_workers import ForkedWorkers

def pytest_addoption(parser):
    parser.addoption("--jobs", type=int)

def pytest_configure(config):
    workers = ForkedWorkers(config, config.option.jobs, lambda nodeid: nodeid.split("::")[0])
    config.pluginmanager.register(workers)
"""
TESTS = """
import os, pathlib, signal, subprocess, warnings
import pytest

HERE = pathlib.Path(__file__)

@pytest.fixture(scope="session")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with open(HERE.with_name("started"), "a") as file:
        file.write(f"{folder}\\n")
    yield folder
    with open(HERE.with_name("ended"), "a") as file:
        file.write(f"{folder}\\n")

@pytest.fixture(autouse=True)
def process():
    with open(HERE.with_suffix(".processes"), "a") as file:
        file.write(f"{os.getpid()}\\n")

def test_passes(server):
    warnings.warn("beware")

def test_fails(server):
    print("what it said")
    assert server == 0

def test_dies():
    if not (orphan := os.fork()):
        signal.pause()
    HERE.with_suffix(".orphan").write_text(str(orphan))
    os.kill(os.getpid(), signal.SIGKILL)

def test_after(server, tmp_path):
    assert tmp_path.is_dir()

tries = []

@pytest.mark.flaky(reruns=1)
def test_of_chance():
    tries.append(1)
    assert len(tries) == 2

@pytest.mark.skip(reason="no GPU")
def test_skipped():
    pass
"""


@pytest.fixture
def folder(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_a=TESTS, test_b=TESTS.replace("def test_", "def test_b_"))
    return pytester


def test_everything_is_told_and_a_death_stops_nothing(folder):
    options = ("--jobs", "2", "-p", "no:cacheprovider", "-rfs")
    try:
        done = folder.runpytest_subprocess(*options, timeout=600)
    finally:
        orphans = list(folder.path.glob("*.orphan"))
        for orphan in orphans:
            os.kill(int(orphan.read_text()), signal.SIGKILL)
    assert len(orphans) == 2  # nobody waited for what a dead process has left
    outcomes = {"passed": 6, "failed": 4, "skipped": 2, "rerun": 2, "warnings": 2}
    assert done.parseoutcomes() == outcomes
    done.stdout.fnmatch_lines(["*what it said*", "*UserWarning: beware*", "SKIPPED*no GPU"])
    done.stdout.fnmatch_lines_random(
        [
            f"FAILED {test}_dies - the process of this test ended with -9"
            for test in ("test_a.py::test", "test_b.py::test_b")
        ]
    )
    for processes in folder.path.glob("*.processes"):
        assert len(set(processes.read_text().split())) == 2  # all of a file in one, until it died
    ended = (folder.path / "ended").read_text().split()
    assert 1 <= len(ended) == len(set(ended)) <= 2  # those that died could not end it


def test_the_first_failure_can_end_all(folder):
    done = folder.runpytest_subprocess("--jobs", "2", "-p", "no:cacheprovider", "-x")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    outcomes = done.parseoutcomes()
    assert 1 <= outcomes["failed"] <= 2
    assert outcomes.get("skipped", 0) == 0
    # One of the workers may not have begun when the other's test fails.
    started, ended = ((folder.path / name).read_text().split() for name in ("started", "ended"))
    assert 1 <= len(started) <= 2
    assert sorted(ended) == sorted(started)
