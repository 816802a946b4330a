"""A training stopped around the end of an epoch sees what it would have seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_pipeline import SmallPipeline, Steps, train_in_process


def config(pipeline: SmallPipeline, out: Path, interval: str) -> Path:
    train = {"max_duration": "20ba", "global_batch_size": 8, "precision": "fp32"}
    return pipeline.generator_config(out, train=train, checkpoint={"interval": interval})


@pytest.fixture(scope="module")
def whole(small_pipeline) -> Steps:
    steps = Steps()
    train_in_process(config(small_pipeline, small_pipeline.root / "epochs", "20ba"), on_step=steps)
    return steps


@pytest.mark.parametrize("interval", ["1ep", "4ba"])
def test_a_resume_between_two_epochs_goes_on_with_the_next(
    small_pipeline, tmp_path, whole, interval
):
    path = config(small_pipeline, tmp_path / "resumed", interval)
    stopped, resumed = Steps(stop=8), Steps()
    with pytest.raises(KeyboardInterrupt):
        train_in_process(path, on_step=stopped)
    train_in_process(path, on_step=resumed)
    assert {**stopped.seen, **resumed.seen} == whole.seen
    assert min(resumed.seen) == 8
