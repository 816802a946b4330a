"""A training stopped around the end of an epoch sees what it would have seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_pipeline import Steps, train_in_process


@pytest.mark.parametrize("interval", ["1ep", "4ba"])
def test_a_resume_between_two_epochs_goes_on_with_the_next(small_pipeline, tmp_path, interval):
    def config(name: str) -> Path:
        train = {"max_duration": "20ba", "global_batch_size": 8, "precision": "fp32"}
        changes = {"train": train, "checkpoint": {"interval": interval}}
        return small_pipeline.generator_config(tmp_path / name, **changes)

    whole = Steps()
    train_in_process(config("whole"), on_step=whole)
    stopped, resumed = Steps(stop=8), Steps()
    with pytest.raises(KeyboardInterrupt):
        train_in_process(config("resumed"), on_step=stopped)
    train_in_process(config("resumed"), on_step=resumed)
    assert {**stopped.seen, **resumed.seen} == whole.seen
    assert min(resumed.seen) == 8
