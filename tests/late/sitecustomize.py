"""Let what comes at once on an idle machine come late, in every interpreter that finds this.

    LATE=2 PYTHONPATH=tests/late:. pytest -m '' --jobs 4

Threads begin late, those that write a state by up to LATE seconds; a rename takes up to a twentieth
of a second, and every fourth fork up to LATE. A test that fails with this waits for something that
nobody has promised it, and will fail on a busy machine. Jobs on Slurm have a path of their own, and
do not find it.
"""

from __future__ import annotations

import os
import random
import threading
import time

LATE = float(os.environ.get("LATE", "0"))
_chance = random.Random(os.urandom(8))
_run, _rename, _replace = threading.Thread.run, os.rename, os.replace


def _run_late(self: threading.Thread) -> None:
    time.sleep(_chance.uniform(0, LATE) if self.name == "state" else _chance.choice([0, 0, 0.2]))
    _run(self)


def _rename_late(*args, **options) -> None:
    time.sleep(_chance.uniform(0, 0.05))
    _rename(*args, **options)


def _replace_late(*args, **options) -> None:
    time.sleep(_chance.uniform(0, 0.05))
    _replace(*args, **options)


def _start_late() -> None:
    _chance.seed(os.urandom(8))
    time.sleep(_chance.choice([0, 0, 0, _chance.uniform(0, LATE)]))


if LATE:
    threading.Thread.run = _run_late  # type: ignore[method-assign]
    os.rename, os.replace = _rename_late, _replace_late
    os.register_at_fork(after_in_child=_start_late)
