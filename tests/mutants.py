"""Mutation testing: which mistakes in a module would its tests not see?

    pytest -p mutants --mutate lgm_scale/flow.py -m 'not slow' tests/unit/test_flow.py

Each is made in a process forked from this one, which has imported everything; the tests that reach
the function run there until one fails. What runs at import, and texts, stays right.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

OTHERS = {  # what is written in place of an operator
    **{ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE]},
    **{ast.GtE: [ast.Gt, ast.Lt], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.In: [ast.NotIn]},
    **{ast.NotIn: [ast.In], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.And: [ast.Or]},
    **{ast.Or: [ast.And], ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div]},
    **{ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult]},
}
FORK = multiprocessing.get_context("fork")
NO, YES = ast.Constant(False), ast.Constant(True)
FIELDS: dict[type[ast.AST], list[tuple[str, Any]]] = {  # what is put where a node has anything
    **{ast.If: [("test", NO), ("test", YES)], ast.IfExp: [("test", NO), ("test", YES)]},
    **{ast.Return: [("value", NO)], ast.Expr: [("value", NO)], ast.comprehension: [("ifs", [])]},
    **{ast.Slice: [("lower", None), ("upper", None)]},
}
Place = tuple[str, int]
place: Callable[[CodeType], Place] = attrgetter("co_name", "co_firstlineno")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutate", action="append", required=True, help="a module; may be repeated")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        os._exit(3)  # of the forked process


def pytest_runtestloop(session: pytest.Session) -> bool:
    session.config.pluginmanager.unregister(name="terminalreporter")
    gc.unfreeze()  # what is frozen is not found
    for name in session.config.getoption("--mutate"):  # tests may import it later, or never
        try:
            importlib.import_module(".".join(Path(name).with_suffix("").parts))
        except ImportError as error:
            raise pytest.UsageError(f"--mutate {name}: {error}; name a file from here") from None
    functions, tests = (f for f in gc.get_objects() if isinstance(f, FunctionType)), session.items
    live = {(f.__code__.co_filename, place(f.__code__)): f for f in functions}
    calls, costs = zip(*[in_fork(partial(watched, test), 900)[1] for test in tests], strict=True)
    for path in (Path(name).resolve() for name in session.config.getoption("--mutate")):
        ends = Counter[str]()
        for where, what, code in mistakes(path):
            reaching = sorted((c, n) for n, c in enumerate(costs) if where in calls[n])
            function = live[str(path), where]
            right, function.__code__ = function.__code__, code
            work = partial(run, [tests[n] for _, n in reaching])
            ends[end := in_fork(work, 2 + 5 * sum(c for c, _ in reaching))[0]] += 1
            function.__code__ = right
            if end != "killed":
                print(f"{path.name}:{what}  [{where[0]}, {len(reaching)} tests] {end}", flush=True)
        print(f"{path}: {dict(ends)}", flush=True)
    return True


def run(tests: Sequence[pytest.Item]) -> None:
    for test, after in zip(tests, [*tests[1:], None], strict=False):  # there may be none
        test.config.hook.pytest_runtest_protocol(item=test, nextitem=after)


def watched(test: pytest.Item) -> tuple[set[Place], float]:
    """Which functions a test and its fixtures call, and what it costs, in processor seconds."""
    called: set[Place] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        called.add(place(frame.f_code))

    sys.setprofile(note)
    run([test])
    return called, time.process_time()


def in_fork(work: Callable[[], Any], seconds: float) -> tuple[str, Any]:
    """Work in a process of its own: how the tests ended there, and what was returned."""
    heard, told = FORK.Pipe(duplex=False)

    def tell() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, resource.RLIM_INFINITY))
        told.send(work())

    (process := FORK.Process(target=tell)).start()
    told.close()
    answer = None
    with contextlib.suppress(EOFError):
        if heard.poll(60 + 20 * seconds):
            answer = heard.recv()
        else:  # it waits for ever, which takes no processor time
            process.kill()
    process.join()
    late = dict.fromkeys((-signal.SIGXCPU, -signal.SIGKILL), "took too long")
    ends = {0: "survived", 3: "killed", **late}
    return ends.get(process.exitcode or 0, "died"), answer


def mistakes(path: Path) -> Iterator[tuple[Place, str, CodeType]]:
    """Where, what, and the code of the function with the mistake."""
    tree = ast.parse(path.read_text())
    for where, node in list(nodes(tree)):
        for field, value in list(changes(node)):
            before, old = ast.unparse(node).splitlines()[0], getattr(node, field)
            setattr(node, field, value)
            codes = [compile(ast.fix_missing_locations(tree), str(path), "exec")]
            what = f"{before}  ->  {ast.unparse(node).splitlines()[0]}"
            setattr(node, field, old)
            while where not in map(place, codes):
                codes = [c for code in codes for c in code.co_consts if isinstance(c, CodeType)]
            what = f"{getattr(node, 'lineno', where[1])}: {what}"
            yield where, what, next(code for code in codes if place(code) == where)


def nodes(node: ast.AST, owner: Place | None = None) -> Iterator[tuple[Place, ast.AST]]:
    """All that runs in functions, not where they are defined, each with the outermost one."""
    if function := isinstance(node, ast.FunctionDef):
        owner = owner or (node.name, min(n.lineno for n in (node, *node.decorator_list)))
    for child in node.body if function else ast.iter_child_nodes(node):
        if not isinstance(child, ast.JoinedStr):
            yield from [(owner, child)] if owner else ()
            yield from nodes(child, owner)


def changes(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """Fields of a node, and what to put there."""
    for i, op in enumerate(node.ops if isinstance(node, ast.Compare) else ()):
        ops = [[*node.ops[:i], other(), *node.ops[i + 1 :]] for other in OTHERS[type(op)]]
        yield from (("ops", value) for value in ops)
    yield from (("op", other()) for other in OTHERS.get(type(getattr(node, "op", None)), ()))
    if isinstance(node, ast.Constant) and isinstance(old := node.value, (int, float)):
        new = [not old] if isinstance(old, bool) else [old + 1, old - 1]
        yield from (("value", value) for value in new)
    for field, value in FIELDS.get(type(node), ()):
        if getattr(node, field) and not isinstance(getattr(node, field), ast.Constant):
            yield field, value
