"""A family that the package does not know, through every command; and its size."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_pipeline import ROOT, assert_user_error, losses, run_command
from small_sweep import make_images

pytestmark = pytest.mark.system
IMPORT = ("--import", "toy_family")


@pytest.fixture(scope="module", autouse=True)
def _on_the_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    make_images(root)
    (root / "sweep.yaml").write_text(yaml.safe_dump(sweep_values(root)))
    return root


def sweep_values(root: Path) -> dict:
    return {
        "bundle": str(root / "ddp/bundle"), "out": str(root / "report"),
        "images": str(root / "mds"), "cells": [{"num_tokens": [1, 4], "num_steps": 3}],
        "num_images": 12, "batch_size": 6, "chunk_size": 6, "num_components": 4,
        "metrics": ["pixel_frechet"],
    }  # fmt: skip


def config(root: Path, name: str, **changes: object) -> Path:
    values = {
        "task": "toy", "run_name": name, "out": str(root / name), "model": {"image_size": 16},
        "data": {"path": str(root / "mds"), "num_workers": 0}, "lengths": {"choices": [4, 1]},
        "train": {"max_duration": "6ba", "global_batch_size": 4, "precision": "fp32"},
        "checkpoint": {"interval": "2ba"}, "logging": {"progress_bar": False},
        "optimizer": {"lr": 1e-3},
    }  # fmt: skip
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def train(path: Path, *more: str, **options):
    return run_command("lgm_scale/train.py", path, *more, *IMPORT, **options)


def test_an_example_is_short():
    assert len((ROOT / "tests/toy_family.py").read_text().splitlines()) < 150


def test_it_is_unknown_without_its_module_and_told_so(root):
    assert_user_error(run_command("lgm_scale/train.py", config(root, "none")), "task: 'toy'")
    missing = run_command("lgm_scale/train.py", "x.yaml", "--import", "no_such_family")
    assert missing.returncode == 2
    assert "--import no_such_family" in missing.stderr


def test_its_rules_and_its_plan(root):
    path = config(root, "plan", objective={"label_dropout": 2.0})
    assert_user_error(train(path), "objective.label_dropout: 2.0 must be in [0, 1)")
    plan = train(config(root, "plan"), "--dry-run", "--world-size", "4")
    assert plan.returncode == 0, plan.stderr
    assert "fsdp2" in plan.stdout
    assert "   4   " in plan.stdout


@pytest.fixture(scope="module")
def trained(root) -> Path:
    """Under DDP, evaluated and drawn while it trains."""
    sweep = {k: v for k, v in sweep_values(root).items() if k not in ("bundle", "out")}
    (root / "during.yaml").write_text(yaml.safe_dump(sweep))
    evaluation = {"sweep": str(root / "during.yaml"), "interval": "3ba"}
    watched = {"progress_bar": False, "pictures": "3ba"}
    result = train(config(root, "ddp", evaluation=evaluation, logging=watched))
    assert result.returncode == 0, result.stderr[-3000:]
    return root / "ddp"


@pytest.mark.parametrize(
    "parallel",
    [{"strategy": "fsdp"}, {"strategy": "deepspeed", "deepspeed": {"stage": 2}}],
    ids=["fsdp", "zero-2"],
)
def test_it_trains_under_every_strategy(root, trained, parallel):
    name = parallel["strategy"]
    result = train(config(root, name, parallel=parallel), ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    torch.testing.assert_close(losses(root / name, 6), losses(trained, 6), rtol=0, atol=1e-6)


def test_it_resumes_to_the_same_bits(root, trained):
    path = config(root, "again")
    first = train(path, "train.max_duration=6ba", "--dry-run")
    assert first.returncode == 0
    code = (
        "import toy_family; from pathlib import Path\n"
        "from small_pipeline import Steps, train_in_process\n"
        f"train_in_process(Path({str(path)!r}), on_step=Steps(stop=4))\n"
    )
    stopped = run_command("-c", code)
    assert "KeyboardInterrupt" in stopped.stderr
    assert not (root / "again/bundle").exists()
    assert train(path).returncode == 0
    found, wanted = (load_file(run / "bundle/toy.safetensors") for run in (root / "again", trained))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_it_starts_from_a_bundle_whose_every_weight_fits(root, trained):
    start = {"init_from": str(trained / "bundle"), "optimizer": {"lr": 1e-12}}
    assert train(config(root, "tuned", **start), "train.max_duration=1ba").returncode == 0
    found, wanted = (load_file(run / "bundle/toy.safetensors") for run in (root / "tuned", trained))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)
    wider = config(root, "wider", model={"image_size": 16, "width": 9}, **start)
    for more in ((), ("--dry-run",)):
        assert_user_error(train(wider, *more), "does not fit: blocks.0.bias is [8] there, [9] here")


def test_it_was_evaluated_while_it_trained(trained):
    rows = [json.loads(line) for line in (trained / "evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 3, 6, 6]
    names = sorted(path.name for path in (trained / "pictures").iterdir())
    assert names == ["samples-00000003.png", "samples-00000006.png"]


def test_its_bundle_makes_pictures(root, trained):
    out = root / "grid.png"
    result = run_command(
        "-m", "lgm_scale.sample", trained / "bundle", "--classes", "dog", "2",
        "--num-tokens", "1", "4", "--out", out, *IMPORT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert out.stat().st_size > 1000
    many = ("--num-images", "5", "--num-tokens", "1", "--out", root / "many")
    result = run_command("-m", "lgm_scale.sample", trained / "bundle", *many, *IMPORT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(list((root / "many").glob("*.png"))) == 5


def test_its_sweep_and_report(root, trained):
    result = run_command("eval/sweep.py", root / "sweep.yaml", *IMPORT)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads((root / "report/results.json").read_text())["rows"]
    assert [row["cell"]["num_tokens"] for row in rows] == [1, 4]
    assert (root / "report/index.html").is_file()
    wrong = run_command("eval/sweep.py", root / "sweep.yaml", "cells=[{num_tokens: 9}]", *IMPORT)
    assert_user_error(wrong, "cells: 9 is not 1 to 4")
