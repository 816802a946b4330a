"""`--jobs N`: tests in N processes, forked from one that has imported and collected everything.

pytest-xdist starts interpreters, and each imports and collects: ten seconds of processor time,
after five of the process that starts them. Here it is done once. A worker is given whole files in
their order; where it dies, its test has failed, and another one goes on.
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import groupby
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import pytest


class Worker:
    """A worker as its parent sees it."""

    def __init__(self, pid: int, line: Connection) -> None:
        self.pid, self.line = pid, line
        self.items: list[int] = []
        """What it still has to run, from the test that runs now."""
        self.done = False


class ForkedWorkers:
    """The plugin. `scope` names what stays in one worker, from a test's id."""

    def __init__(self, config: pytest.Config, jobs: int, scope: Callable[[str], str]) -> None:
        self.config, self.jobs, self.scope = config, jobs, scope
        self.workers: list[Worker] = []
        self.started = 0
        self.line: Connection | None = None
        """To the parent, in a worker."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed or self.config.option.collectonly:
            return None  # pytest's own loop says it
        ids = [item.nodeid for item in session.items]
        left = [list(group) for _, group in groupby(range(len(ids)), lambda n: self.scope(ids[n]))]
        try:
            for _ in range(min(self.jobs, len(left))):
                self._fork(session)
            while self.workers:
                for line in wait([worker.line for worker in self.workers]):
                    worker = next(worker for worker in self.workers if worker.line is line)
                    if self._listen(session, worker, left):
                        self._fork(session)
        finally:
            for worker in self.workers:
                worker.line.close()  # its next word fails, and its fixtures end
            for worker in self.workers:
                os.waitpid(worker.pid, 0)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        return True

    def _listen(self, session: pytest.Session, worker: Worker, left: list[list[int]]) -> bool:
        """Hear one word; True where the worker has died in a test, and another has to go on."""
        hook, items = self.config.hook, session.items
        try:
            word, said = worker.line.recv()
        except (EOFError, ConnectionResetError):  # reset: with a word that it has not read
            self.workers.remove(worker)
            status = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
            if worker.done:
                return False
            if not worker.items:
                raise RuntimeError(f"a worker ended with {status} after its tests") from None
            dead = items[worker.items.pop(0)]
            said = f"the process of this test ended with {status}"
            report = pytest.TestReport(dead.nodeid, dead.location, {}, "failed", said, "call")
            hook.pytest_runtest_logreport(report=report)
            left[:0] = [worker.items] if worker.items else []
            return not session.shouldfail
        if word == "more" and not session.shouldfail:
            worker.items = left.pop(0) if left else []
            worker.line.send(list(worker.items))
        elif word == "report":
            stopped = session.shouldfail
            report = hook.pytest_report_from_serializable(config=self.config, data=said)
            hook.pytest_runtest_logreport(report=report)
            if session.shouldfail and not stopped:
                for other in self.workers:
                    with suppress(BrokenPipeError):  # it has ended, and is heard of later
                        other.line.send([])
        elif word == "finished":
            item = items[worker.items.pop(0)]
            hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        elif word == "warning":
            message, category, file, number, where = said
            warning = warnings.WarningMessage(message, category, file, number)
            hook.pytest_warning_recorded.call_historic(kwargs={"warning_message": warning, **where})
        worker.done = word == "done"
        return False

    def _fork(self, session: pytest.Session) -> None:
        ours, theirs = Pipe()
        folder = self.config._tmp_path_factory.getbasetemp() / f"w{self.started}"  # type: ignore[attr-defined]
        self.started += 1
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            theirs.close()
            self.workers.append(Worker(pid, ours))
            return
        for line in (ours, *(worker.line for worker in self.workers)):
            line.close()
        os.register_at_fork(after_in_child=theirs.close)  # its end is the worker's alone
        status = 1
        try:
            self._work(session, theirs, folder)
            status = 0
        except (KeyboardInterrupt, BrokenPipeError):  # the parent's end says why
            pass
        except BaseException:
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # what pytest does at the end of a session is the parent's

    def _work(self, session: pytest.Session, line: Connection, folder: Path) -> None:
        """Be a worker: with a folder and a file of captured words of its own, and no terminal."""
        self.line = line
        plugins = self.config.pluginmanager
        plugins.unregister(name="terminalreporter")
        self.config.option.basetemp = str(folder)
        plugins.get_plugin("tmpdir").pytest_configure(self.config)  # type: ignore[union-attr]
        capture = plugins.get_plugin("capturemanager")
        assert capture is not None
        capture.stop_global_capturing()
        capture.start_global_capturing()
        capture.suspend_global_capture()
        try:
            self._run(session, line)
        finally:
            capture.resume_global_capture()
            session._setupstate.teardown_exact(None)
            capture.suspend_global_capture()
        line.send(("done", None))

    def _run(self, session: pytest.Session, line: Connection) -> None:
        """All that the parent gives, until it gives no more, or says so meanwhile."""
        while True:
            line.send(("more", None))
            if not (group := [session.items[n] for n in line.recv()]):
                return
            for item, after in zip(group, [*group[1:], session], strict=True):
                # The session in place of a next test keeps its fixtures.
                item.ihook.pytest_runtest_protocol(item=item, nextitem=after)
                line.send(("finished", None))
                if session.shouldfail or line.poll():
                    return

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.line is not None:
            to = self.config.hook.pytest_report_to_serializable
            self.line.send(("report", to(config=self.config, report=report)))

    def pytest_warning_recorded(
        self, warning_message: Any, when: str, nodeid: str, location: Any
    ) -> None:
        if self.line is not None:
            where = {"when": when, "nodeid": nodeid, "location": location}
            w = warning_message
            said = (str(w.message), w.category, w.filename, w.lineno, where)
            self.line.send(("warning", said))
