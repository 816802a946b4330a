"""What `make quickstart` and `make demo` run, and the generator of the second in the package."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest
from small_pipeline import ROOT

from lgm_scale.config.loading import read_yaml


@pytest.mark.parametrize("name", ["quickstart", "demo"])
def test_the_report_shows_the_commands_that_the_script_runs(name, tmp_path):
    """Nothing runs: in place of python, a program that ends at once."""
    (tmp_path / "python").write_text("#!/bin/sh\n")
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["sh", "quickstart.sh", name], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert ended.returncode == 0
    printed = [line[4:-4] for line in ended.stdout.splitlines() if line.startswith("\33[1m")]
    shown = read_yaml(str(ROOT / f"yamls/{name}/sweep.yaml"), [])["commands"]
    assert [line.removeprefix("$ ") for line in printed] == [
        " ".join(shlex.split(command)) for command in shown
    ]
