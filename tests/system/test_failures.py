"""A rank that fails or dies ends the whole job soon, and the first cause is on top.

Under composer's launcher, whose ranks are forked from it: it tells the others, who would wait for
an hour.
"""

from __future__ import annotations

from disturbed_train import LAUNCH
from forked_commands import fork_ranks
from small_pipeline import run_command

PATIENT = "parallel.timeout_seconds=3600"


def test_the_first_failing_rank_is_on_top(small_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTURB", "bug")
    config = small_pipeline.generator_config(tmp_path / "bug")
    result = run_command(*LAUNCH, config, PATIENT, prepare=fork_ranks)
    assert result.returncode == 1
    said = result.stderr + result.stdout
    top = said.index("rank 1 failed first:")
    assert "ZeroDivisionError: a bug in rank 1" in said[top:]
    assert said.index("Traceback") > top
    assert said.index("ZeroDivisionError") < said.index("rank 0 then failed as well")
    assert len(list((tmp_path / "bug" / "failures").iterdir())) == 2


def test_a_killed_rank_ends_the_job(small_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTURB", "kill")
    config = small_pipeline.generator_config(tmp_path / "dead")
    result = run_command(*LAUNCH, config, PATIENT, prepare=fork_ranks)
    assert result.returncode != 0
    assert "no other rank has left a traceback" in result.stderr + result.stdout
