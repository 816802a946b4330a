"""`--second-try`: tests of servers and of chance are run once more, and nobody overlooks it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = "pytester"

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
HOOKS = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("ours", {str(CONFTEST)!r})
ours = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ours)
for name in ("addoption", "collection_modifyitems", "terminal_summary"):
    globals()[f"pytest_{{name}}"] = getattr(ours, f"pytest_{{name}}")
"""
TESTS = """
import pytest

tries = dict.fromkeys(["server", "chance", "unit", "hung"], 0)
stopped = []

@pytest.fixture(scope="module")
def server():
    yield "up"
    stopped.append(1)

def tried(name):
    tries[name] += 1
    return tries[name]

@pytest.mark.servers
def test_of_a_server(server):
    assert server == "up" and not stopped
    assert tried("server") == 2, "the node was busy"

@pytest.mark.thorough
def test_of_chance():
    assert tried("chance") == 3, "never"

def test_of_a_unit():
    assert tried("unit") == 2, "no chance"

@pytest.mark.servers
def test_that_hangs():
    tried("hung")
    pytest.fail("Timeout (>900.0s) from pytest-timeout.")

def test_all_were_tried_so_often():
    assert tries == {"server": 2, "chance": 2, "unit": 1, "hung": 1}
"""


@pytest.mark.parametrize("asked", [True, False])
def test_a_second_try_is_given_to_tests_of_chance_alone_and_told(pytester, asked):
    pytester.makeconftest(HOOKS)
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nmarkers =\n  servers: x\n  thorough: x\n")
    options = ["--strict-markers", "-p", "no:cacheprovider", *(["--second-try"] if asked else [])]
    done = pytester.runpytest_inprocess(*options)
    if not asked:
        done.assert_outcomes(failed=5)
        done.stdout.no_fnmatch_line("*run once more*")
        return
    assert done.parseoutcomes() == {"passed": 2, "failed": 3, "rerun": 2}
    done.stdout.fnmatch_lines(
        [
            "*failed at the first try*",
            "*::test_of_a_server failed, and was run once more:",
            "*the node was busy*",
            "*::test_of_chance failed, and was run once more:",
            "*never*",
        ]
    )
