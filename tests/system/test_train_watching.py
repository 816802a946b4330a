"""Watched runs: the same bits as unwatched ones, and what they leave for people to see."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_pipeline import (
    ROOT,
    SmallPipeline,
    assert_same_run,
    losses,
    metrics,
    run_command,
    train_in_process,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.commands import reconstruct
from lgm_scale.evaluation.report.drawing import LIGHT, to_png
from lgm_scale.evaluation.report.pictures import image_grid
from lgm_scale.pipeline import load_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.system]

LOGGING = {"interval": 3, "progress_bar": False}
WATCHED = {"tensorboard": True, "pictures": "5ba"}
KINDS = ("tokenizer", "generator", "elit")


def config_of(pipeline: SmallPipeline, kind: str, out: Path, watched: bool, **changes) -> Path:
    logging = LOGGING | (WATCHED if watched else {})
    if watched and kind == "tokenizer":
        changes["evaluation"] = {"images": str(pipeline.images), "interval": "5ba"}
    if kind == "elit":  # published are 50 steps of its sampler: two lengths will do
        changes["lengths"] = {"choices": [64, 16]}
        logging = LOGGING | ({**WATCHED, "pictures": "10ba"} if watched else {})
    return getattr(pipeline, f"{kind}_config")(out, logging=logging, **changes)


@pytest.fixture(scope="module")
def pair(small_pipeline, tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """Of a kind: a run with everything on, and the same run with nothing on."""

    @cache
    def trained(kind: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(kind)
        watched, plain = (
            train_in_process(config_of(small_pipeline, kind, folder / name, name == "watched"))
            for name in ("watched", "plain")
        )
        return watched, plain

    return trained


def events_of(out: Path) -> EventAccumulator:
    (folder,) = (out / "tensorboard").iterdir()
    return EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()


def evaluated(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_notice(pair, kind):
    watched, plain = pair(kind)
    assert metrics(watched) == metrics(plain)
    name = f"{'tokenizer' if kind == 'tokenizer' else 'generator'}.safetensors"
    here, there = load_file(watched / "bundle" / name), load_file(plain / "bundle" / name)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in there)
    assert not (plain / "pictures").exists()
    assert not (plain / "tensorboard").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_tensorboard_has_every_number_of_every_step(pair, kind):
    watched, _ = pair(kind)
    events = events_of(watched)
    found = {
        tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]
    }
    for row in metrics(watched):
        for key, value in row.items():
            if key in ("step", "num_tokens") or key.startswith("loss/"):
                continue
            assert found[f"train/{key}"][row["step"]] == np.float32(value), key
        assert found[f"loss/K={row['num_tokens']}"][row["step"]] == np.float32(row["loss"])
    page = (ROOT / "docs" / "watching.md").read_text()
    general = {re.sub(r"K=\d+", "K=<K>", tag) for tag in found}
    quarters = {tag for tag in general if "/t=" in tag and "/t=0.00" not in tag}
    assert [tag for tag in general - quarters if f"`{tag}`" not in page] == []
    for key in ("throughput/images_per_second", "data/wait_seconds", "memory/host_gib"):
        assert list(found[key]) == [3, 6, 9]
        assert all(value > 0 for value in found[key].values()), key
    assert all(0 < value <= 1 for value in found["data/wait_share"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_have_a_row_per_length_and_change(pair, kind):
    watched, _ = pair(kind)
    title = "reconstructions" if kind == "tokenizer" else "samples"
    steps = [10] if kind == "elit" else [5, 10]
    paths = sorted((watched / "pictures").iterdir())
    assert [path.name for path in paths] == [f"{title}-{step:08d}.png" for step in steps]
    pictures = [np.array(Image.open(path).convert("RGB")) for path in paths]
    assert pictures[0].std() > 10
    assert len(steps) == 1 or (pictures[0] != pictures[1]).any()
    events = events_of(watched).Images(f"pictures/{title}")
    assert [event.step for event in events] == steps
    assert [(event.height, event.width) for event in events] == [p.shape[:2] for p in pictures]


def test_the_last_picture_is_of_the_result(pair):
    """The averaged weights, one noise in each column: what the bundle samples, pixel for pixel."""
    watched, _ = pair("generator")
    pipe = load_pipeline(watched / "bundle", "cpu", torch.float32)
    classes = [0, 2, 4, 6, 8, 10, 12, 14]  # eight of 17, evenly spaced
    rows = [
        np.asarray(pipe(classes, k, seed=0, progress_bar=False)).transpose(0, 3, 1, 2)
        for k in (4, 8, 16)
    ]
    names = [pipe.classes[label] for label in classes]
    drawn = to_png(image_grid(rows, ["K = 4", "K = 8", "K = 16"], names, LIGHT), LIGHT)
    assert (watched / "pictures" / "samples-00000010.png").read_bytes() == drawn


def test_the_last_psnr_is_that_of_the_result(small_pipeline, pair, tmp_path, monkeypatch):
    """The command for bundles measures the same, to the bit."""
    watched, _ = pair("tokenizer")
    lines = evaluated(watched)
    assert [(line["step"], line["label"]) for line in lines] == [
        (step, f"K={k}") for step in (5, 10) for k in (4, 8, 16)
    ]
    argv = ["--bundle", str(watched / "bundle"), "--images", str(small_pipeline.images)]
    argv += ["--out", str(tmp_path / "out"), "--lengths", "4", "8", "16"]
    monkeypatch.setattr(sys, "argv", ["reconstruct", *argv])
    assert reconstruct.main() == 0
    rows = json.loads((tmp_path / "out" / "reconstruction.json").read_text())["rows"]
    assert [row["metrics"]["psnr_db"] for row in rows] == [
        line["metrics"]["psnr_db"] for line in lines[3:]
    ]
    assert lines[0]["num_images"] == rows[0]["num_images"]
    found = events_of(watched).Scalars("evaluation/K=4/psnr_db")
    assert [event.value for event in found] == [
        np.float32(line["metrics"]["psnr_db"]) for line in lines if line["label"] == "K=4"
    ]


@pytest.mark.thorough
def test_ranks_share_the_images(small_pipeline, tmp_path, pair):
    watched, plain = pair("tokenizer")
    out = tmp_path / "shared"
    done = run_command(
        "lgm_scale/train.py", config_of(small_pipeline, "tokenizer", out, True), ranks=2
    )
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(losses(out, 10), losses(plain, 10), rtol=0, atol=1e-5)
    found, wanted = ([line["metrics"] for line in evaluated(run)] for run in (out, watched))
    assert found == [{"psnr_db": pytest.approx(row["psnr_db"], abs=1e-3)} for row in wanted]


@pytest.mark.parametrize(
    "section",
    [
        pytest.param({"strategy": "fsdp"}, id="fsdp"),
        pytest.param(
            {"strategy": "deepspeed", "deepspeed": {"stage": 3}},
            id="zero-3",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_ranks_that_share_weights_draw_together(small_pipeline, tmp_path, pair, section):
    _, plain = pair("generator")
    if section["strategy"] == "deepspeed":
        pytest.importorskip("deepspeed")
    out = tmp_path / "shared"
    config = config_of(small_pipeline, "generator", out, True, parallel=section)
    done = run_command("lgm_scale/train.py", config, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(out, plain, 10, 1e-5)
    assert len(list((out / "pictures").iterdir())) == 2
    assert len(events_of(out).Images("pictures/samples")) == 2


def test_images_of_another_size_are_refused_before_training(small_pipeline, tmp_path):
    config = config_of(small_pipeline, "tokenizer", tmp_path / "run", True)
    model = ["model.image_size=64", "model.patch_size=16"]
    with pytest.raises(ConfigError, match=r"evaluation\.images: .* holds images of 32 pixels"):
        train_in_process(config, *model)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
