"""Commands of an experiment: in forks of one server, as if started, and never left alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from rank_processes import ensure_server

from experiments.commands import call, is_ours
from lgm_scale.errors import DataError

WAITS = """
import signal, sys
from pathlib import Path

said = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(said.write_text("asked to end")))
said.write_text("waits")
while True:
    signal.pause()
"""


@pytest.mark.slow
def test_commands_of_ours_run_in_forks_and_end_as_they_would():
    ensure_server()
    call([sys.executable, "-m", "experiments", "--help"])
    with pytest.raises(DataError, match=r"(?s)stopped with an error:.*'elastik' is neither"):
        call([sys.executable, "-m", "experiments", "elastik"])
    for command, forked in (
        (["composer", "lgm_scale/train.py", "x.yaml"], True),
        (["composer", "-n", "2", "lgm_scale/train.py", "x.yaml"], False),
        ([sys.executable, "eval/sweep.py"], True),
        (["tar", "x.py"], False),
    ):
        assert is_ours(command) == forked


def wait_for(said: Path, words: str) -> None:
    deadline = time.monotonic() + 300
    while not said.exists() or said.read_text() != words:
        assert time.monotonic() < deadline, f"never said {words!r}"
        time.sleep(0.02)


def test_a_command_ends_when_the_experiment_is_killed(tmp_path):
    script, said = tmp_path / "waits.py", tmp_path / "said"
    script.write_text(WAITS)
    command = [sys.executable, str(script), str(said)]
    # Of its own, with a server of its own that imports nothing before.
    calls = f"from experiments import commands as c; c._IMPORTS = (); c.call({command})"
    experiment = subprocess.Popen([sys.executable, "-c", calls])
    wait_for(said, "waits")
    experiment.kill()
    experiment.wait()
    wait_for(said, "asked to end")
