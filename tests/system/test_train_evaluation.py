"""Evaluation during training: the sweep's own numbers, and a training that does not notice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_pipeline import SmallPipeline, metrics, run_command, train_in_process

from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.sweep.measure import measure
from lgm_scale.evaluation.sweep.rules import load_sweep

pytestmark = [pytest.mark.slow, pytest.mark.system]

SWEEP = {
    "cells": [{"num_tokens": [4, 16]}],
    "sampler": {"num_steps": 3, "cfg_scale": 1.5},
    "num_images": 9,
    "batch_size": 4,
    "chunk_size": 4,
    "num_components": 5,
    "metrics": ["pixel_frechet"],
}


@pytest.fixture(scope="module")
def sweep_file(small_pipeline, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "training_sweep.yaml"
    path.write_text(yaml.safe_dump(SWEEP | {"images": str(small_pipeline.images)}))
    return path


def evaluated(pipeline: SmallPipeline, out: Path, sweep: Path, **changes) -> Path:
    settings = {"sweep": str(sweep), "interval": "5ba"}
    return pipeline.generator_config(out, evaluation=settings, **changes)


@pytest.fixture(scope="module")
def trained(small_pipeline, sweep_file, tmp_path_factory) -> Path:
    """A run of ten steps that was evaluated twice."""
    out = tmp_path_factory.mktemp("trained") / "run"
    return train_in_process(evaluated(small_pipeline, out, sweep_file))


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]


def test_the_last_evaluation_is_the_sweep_of_the_result(
    small_pipeline, trained, sweep_file, tmp_path
):
    """The same code on the same weights: the numbers of a sweep over the run's bundle, to the bit.

    (The average in memory has gone through a bundle's file there.)
    """
    lines = lines_of(trained)
    assert [(line["step"], line["label"].split(",")[0]) for line in lines] == [
        (5, "K = 4"), (5, "K = 16"), (10, "K = 4"), (10, "K = 16"),
    ]  # fmt: skip
    path = tmp_path / "sweep.yaml"
    values = yaml.safe_load(sweep_file.read_text())
    values |= {"bundle": str(trained / "bundle"), "out": str(tmp_path / "report")}
    path.write_text(yaml.safe_dump(values))
    results = measure(load_sweep(str(path), []))
    assert results is not None
    assert [row["metrics"] for row in results["rows"]] == [line["metrics"] for line in lines[2:]]
    assert lines[0]["metrics"] != lines[2]["metrics"]
    step = trained / "evaluation" / "step-00000010"
    assert (step / "results.json").is_file()
    assert not list((step / "chunks").glob("samples*")), "features of a training are not kept"


def test_training_does_not_notice(small_pipeline, trained, tmp_path):
    plain = train_in_process(small_pipeline.generator_config(tmp_path / "plain"))
    ours, theirs = metrics(trained), metrics(plain)
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]
    name = "bundle/generator.safetensors"
    here, there = load_file(trained / name), load_file(plain / name)
    assert all(torch.equal(here[key], there[key]) for key in there)
    assert not (plain / "evaluation.jsonl").exists()


def test_two_ranks_evaluate_to_the_same_numbers_of_equal_weights(
    small_pipeline, sweep_file, tmp_path
):
    """Weights of two ranks are those of two ranks: the sweep over their bundle is the judge."""
    out = tmp_path / "run"
    config = evaluated(small_pipeline, out, sweep_file)
    done = run_command("lgm_scale/train.py", config, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    values = yaml.safe_load(sweep_file.read_text())
    values |= {"bundle": str(out / "bundle"), "out": str(tmp_path / "report")}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(values))
    results = measure(load_sweep(str(tmp_path / "s.yaml"), []))
    assert results is not None
    last = [line["metrics"] for line in lines_of(out) if line["step"] == 10]
    assert [row["metrics"] for row in results["rows"]] == last


def test_what_cannot_work_is_refused_before_training(small_pipeline, sweep_file, tmp_path):
    values = yaml.safe_load(sweep_file.read_text())
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        yaml.safe_dump(values | {"cells": [{"num_tokens": 3}], "part": "0/2", "batch_size": 0})
    )
    out = tmp_path / "run"
    with pytest.raises(ConfigError) as caught:
        train_in_process(evaluated(small_pipeline, out, bad))
    told = {problem.split(":")[0] for problem in caught.value.problems}
    assert told == {"cells", "part", "batch_size"}
    assert not (out / "metrics.jsonl").exists()
    with pytest.raises(ConfigError) as caught:
        train_in_process(
            small_pipeline.generator_config(
                out, evaluation={"sweep": "gone.yaml", "interval": "often"}
            )
        )
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "evaluation.sweep", "evaluation.interval",
    ]  # fmt: skip
