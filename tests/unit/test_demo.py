"""What `make quickstart` and `make demo` run, and the generator of the second in the package."""

from __future__ import annotations

import os
import shlex
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_pipeline import ROOT
from small_sweep import make_images
from typed_commands import typed

from experiments.demo_bundle import main as make_demo_bundle
from lgm_scale import sample
from lgm_scale.bundle import DEMO, read_info
from lgm_scale.config.loading import read_yaml
from lgm_scale.errors import CheckpointError
from lgm_scale.evaluation.commands import reconstruct, sweep
from lgm_scale.pipeline import load_pipeline


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


def test_the_generator_in_the_package_makes_the_same_picture_again(tmp_path, monkeypatch):
    """Without a network: nothing may be asked for. A folder of that name comes first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", None)
    first, again = (load_pipeline("demo")("ankle_boot", num_tokens=8, seed=0) for _ in range(2))
    assert first.shape == (1, 32, 32, 3)
    assert np.array_equal(first, again)
    assert 20 < first.std() < 120  # neither blank nor noise
    assert first[:, :, :2].mean() < 32  # the black frame of its training images
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 10e6
    assert "Fashion-MNIST" in read_info(DEMO)["data"]
    (tmp_path / "demo").mkdir()
    with pytest.raises(CheckpointError, match="demo is no bundle"):
        load_pipeline("demo")


def test_evaluation_takes_the_generator_in_the_package(tmp_path):
    images = tmp_path / "mds"
    make_images(tmp_path, 32, per_class=1, classes=read_info(DEMO)["classes"])
    (sweep_yaml := tmp_path / "sweep.yaml").write_text(
        f"{{bundle: demo, out: {tmp_path}/report, images: {images}, num_images: 10,"
        " metrics: [fashion_accuracy], cells: [{num_tokens: 8, cfg_scale: 3.0}]}"
    )
    said = typed(sweep.main, sweep_yaml, "--dry-run")
    assert said.status == 0, said.err
    assert "bundle: demo" in said.out
    options = ("--bundle", "demo", "--images", images, "--lengths", "8")
    said = typed(reconstruct.main, *options, "--out", tmp_path / "reconstructed")
    assert said.status == 0, said.err
    assert (tmp_path / "reconstructed" / "reconstruction.json").is_file()


def test_readmes_first_command_draws_every_class(tmp_path, monkeypatch, capsys):
    line = next(
        line for line in (ROOT / "README.md").read_text().splitlines() if "sample demo" in line
    )
    command = line.split("&&")[1].split("#")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", command.split("-m ")[1].split())
    assert sample.main() == 0
    assert "grid.png: 10 classes at 3 lengths" in capsys.readouterr().out
    assert (tmp_path / "grid.png").is_file()


def test_the_command_that_ships_it_halves_weights_and_sets_the_sampler(tmp_path):
    sweep, copy = tmp_path / "sweep.yaml", tmp_path / "copy"
    make_images(tmp_path, 32, per_class=1, classes=read_info(DEMO)["classes"])
    sweep.write_text(
        f"{{bundle: {DEMO}, out: {tmp_path}/report, images: {tmp_path}/mds, num_images: 10,"
        " metrics: [fashion_accuracy], cells: [{num_tokens: 8, cfg_scale: 3.0}]}"
    )
    make_demo_bundle([str(sweep), str(copy)])
    assert read_info(copy)["files"] == read_info(DEMO)["files"]  # what is halved stays
    assert read_info(copy)["sampling"]["8"]["cfg_scale"] == 3.0
    assert {each.dtype for each in load_file(copy / "generator.safetensors").values()} == {
        torch.float16
    }
