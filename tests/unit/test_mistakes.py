"""More than a thousand mistakes: each is one refusal that names it, status 2, and no traceback.

    LGM_MISTAKES=table.md pytest tests/unit/test_mistakes.py

writes what was typed and what was said.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mistakes import Command, Main, Mistake, damaged, mistakes_of_keys, mistakes_of_options
from random_weights import save_random_inception
from small_sweep import CLASSES, make_sweep_inputs
from typed_commands import Said, typed

import launchers.pipeline
import launchers.slurm
import launchers.status
from data_tools import demo_images
from experiments.__main__ import main as experiments_main
from lgm_scale import assets, publish, sample, train, web
from lgm_scale.data.preparation import convert, encode, fashion_mnist, verify
from lgm_scale.evaluation.commands import (
    adaptive,
    alignment,
    conformance,
    preflight,
    reconstruct,
    reference,
    report,
    sweep,
)
from lgm_scale.evaluation.sweep.config import SweepConfig
from lgm_scale.families.base import families
from lgm_scale.release_import.__main__ import main as import_main

QUICKSTART = "yamls/quickstart"
RECIPES = {"tokenizer": "tokenizer", "generator": "dit", "spatial_generator": "elit"}
LEAST = {"generator": 250, "tokenizer": 80, "spatial_generator": 40}
"""Mistakes: of the others only in keys that the generator does not have."""
BESIDE = {
    "parallel.fsdp.": ["parallel.strategy=fsdp"],
    "parallel.deepspeed.": ["parallel.strategy=deepspeed"],
    "lora.": ["lora.base=runs/base/bundle", "lora.num_tokens=32"],
    "search.": ["search.metric=pixel_frechet", "search.num_images=100", "num_images=272"],
}
COMMANDS = (
    "sample", "encode", "convert", "verify", "fashion_mnist", "demo_images", "reconstruct",
    "adaptive", "alignment", "conformance", "reference", "report", "status", "preflight", "sweep",
    "train", "slurm", "pipeline", "experiments", "import tokenizer", "import generator",
    "import lora", "import elit", "many images", "web", "publish", "assets",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = make_sweep_inputs(tmp_path_factory.mktemp("made"))
    np.savez(folder / "samples.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    torch.save({"a": torch.zeros(2)}, folder / "other.pth")
    save_random_inception(folder / "inception.pth")
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text("{}")
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """What is accepted shows itself by its status; the plan that follows has tests of its own."""
    monkeypatch.setattr("lgm_scale.planning.plan.describe", lambda *_: "planned")
    monkeypatch.setattr(sweep, "describe", lambda *_: "planned")


@pytest.mark.slow
@pytest.mark.parametrize("task", RECIPES)
def test_keys_of_a_training(task):
    recipe = f"{QUICKSTART}/{RECIPES[task]}.yaml"
    free = ("objective.timestep_mean",)
    schemas = {name: family.schema for name, family in families().items()}
    like = None if task == "generator" else schemas["generator"]
    mistakes = mistakes_of_keys(schemas[task], [recipe], BESIDE, free, like)
    judge(LEAST[task], train.main, "train", mistakes, "--dry-run")


def test_keys_of_a_sweep():
    # Seeds of samples count modulo 2^64.
    mistakes = mistakes_of_keys(SweepConfig, [f"{QUICKSTART}/sweep.yaml"], BESIDE, ("seed",))
    judge(100, sweep.main, "sweep", mistakes, "--dry-run")


@pytest.mark.parametrize("name", COMMANDS)
def test_options(name, made, tmp_path):
    command = commands(made, tmp_path / "out")[name]
    judge(3, command.main, name, mistakes_of_options(command, tmp_path / "bad"))


@pytest.mark.parametrize(
    ("name", "option", "kind"),
    [
        ("sample", "bundle", "dit"),
        ("encode", "--tokenizer", "tokenizer"),
        ("reconstruct", "--bundle", "tokenizer"),
        ("adaptive", "--images", "mds"),
        ("encode", "--images", "mds"),
    ],
)
def test_damaged_folders(name, option, kind, made, tmp_path):
    command = commands(made, tmp_path / "out")[name]

    def mistakes() -> Iterator[Mistake]:
        for what, copy, file in damaged(made / kind, tmp_path / "copies", unread="labels.npy"):
            yield Mistake(f"{option}: {what}", command.args(**{option: [str(copy)]}), file)

    judge(6, command.main, name, mistakes())


def judge(least: int, main: Main, name: str, mistakes: Iterator[Mistake], *more: str) -> None:
    """Type each, and collect what is wrong with the answers; so many at least are made."""
    complaints, rows = [], []
    for mistake in mistakes:
        said = typed(main, *mistake.args, *more)
        complaints.append(mistake.complaint(said))
        rows.append(_row(name, mistake, said))
    if path := os.environ.get("LGM_MISTAKES"):
        with Path(path).open("a") as file:
            file.writelines(rows)
    assert len(rows) >= least
    assert not (wrong := [text for text in complaints if text]), "\n\n".join(wrong)


def _row(name: str, mistake: Mistake, said: Said) -> str:
    named = mistake.named.split("|")[0]
    lines = [line for line in said.err.splitlines() if named in line] or [said.err]
    text = lines[0].strip().replace("|", "\\|")
    return f"| {name} | {mistake.what} | {said.status} | {text} |\n"


def commands(made: Path, out: Path) -> dict[str, Command]:
    """Every command, with arguments with which it works or comes as far as its mistakes are told.

    What goes on after that is the matter of other tests.
    """
    dit, tokenizer, mds, photos, other, names = (
        [str(made / name)]
        for name in ("dit", "tokenizer", "mds", "photos", "other.pth", "names.txt")
    )
    to = [str(out)]
    through = {"--bundle": tokenizer, "--images": mds, "--lengths": ["4"]}
    folders = {"--bundle": "folder", "--images": "folder"}
    release = {"source": other, "folder": to}
    return {
        "sample": Command(
            sample.main,
            {"bundle": dit, "--classes": ["dog"], "--num-tokens": ["4"], "--num-steps": ["2"],
             "--out": [f"{out}.png"]},
            {"bundle": "folder"}, ("--out",),
            {"--classes": "unicorn", "--device": "gpu0", "--import": "no_module", "--grow": "0-4"},
        ),
        "encode": Command(
            encode.main, {"--tokenizer": tokenizer, "--images": mds, "--out": to},
            {"--tokenizer": "folder", "--images": "folder"}, ("--out",),
            {"--compression": "rar", "--shard-size": "huge"},
        ),
        "convert": Command(
            convert.main, {"source": photos, "--out": to, "--image-size": ["16"]},
            {"source": "folder", "--classes": "file"}, ("--out",),
            {"--compression": "rar"},
        ),
        "assets": Command(assets.main, {}, words={"--import": "no_module", "names": "nothing"}),
        "verify": Command(verify.main, {"folder": mds}, {"folder": "folder"}),
        "fashion_mnist": Command(
            fashion_mnist.main, {"--out": to}, {"--source": "folder"}, ("--out",)
        ),
        "demo_images": Command(demo_images.main, {"--out": to}, {}, ("--out",)),
        "reconstruct": Command(
            reconstruct.main, {**through, "--out": to},
            {**folders, "--vgg16": "file", "--inception": "file", "--reference": "file"},
            ("--out",),
        ),
        "adaptive": Command(
            adaptive.main, {**through, "--target-psnr": ["20"], "--out": [f"{out}.json"]},
            folders, ("--out",),
        ),
        "alignment": Command(
            alignment.main,
            {**through, "--num-images": ["8"], "--neighbors": ["2"], "--out": to},
            folders, ("--out",),
        ),
        "conformance": Command(
            conformance.main,
            {"--samples": [str(made / "samples.npz")], "--reference": [str(made / "samples.npz")],
             "--inception": [str(made / "inception.pth")]},
            {"--inception": "file"},
        ),
        "reference": Command(
            reference.main,
            {"source": mds, "--out": [f"{out}.safetensors"],
             "--inception": [str(made / "inception.pth")]},
            {"source": "folder", "--inception": "file", "--dinov2": "file"}, ("--out",),
        ),
        "report": Command(report.main, {"outs": to}, {"outs": "folder"}),
        "status": Command(
            launchers.status.main, {"run": [str(made / "run")]}, {"run": "folder"}
        ),
        "preflight": Command(
            preflight.main, {"config": [f"{QUICKSTART}/sweep.yaml"]}, {"config": "file"}
        ),
        "sweep": Command(
            sweep.main, {"config": [f"{QUICKSTART}/sweep.yaml"], "--dry-run": []},
            {"config": "file"}, (), {"--import": "no_module"},
        ),
        "train": Command(
            train.main, {"config": [f"{QUICKSTART}/dit.yaml"], "--dry-run": []},
            {"config": "file"}, (), {"--import": "no_module"},
        ),
        "slurm": Command(
            launchers.slurm.main,
            {"--config": [f"{QUICKSTART}/dit.yaml"], "--dry-run": [], "--nodes": ["1"],
             "--cluster": ["cpu"], "--files-elsewhere": []},
            {"--config": "file", "--cluster": "file"}, (),
            {"--job": "bake", "--time": "soon", "--after": "yesterday"},
        ),
        "pipeline": Command(
            launchers.pipeline.main,
            {"pipeline": ["yamls/pipeline/quickstart.yaml"], "--dry-run": []},
            {"pipeline": "file", "--cluster": "file"}, (), {"--from": "dessert"},
        ),
        "experiments": Command(
            experiments_main, {"experiment": ["samplers"]}, {"experiment": "file"},
            free=("--seeds",),
        ),
        "import tokenizer": Command(
            import_main, release, {"source": "file"}, before=("tokenizer",)
        ),
        "import generator": Command(
            import_main,
            {**release, "--tokenizer": tokenizer, "--latent-stats": other},
            {"source": "file", "--tokenizer": "folder"}, before=("generator",),
        ),
        "import lora": Command(
            import_main,
            {**release, "--tokenizer": tokenizer, "--latent-stats": other, "--num-tokens": ["8"]},
            {"source": "file"}, before=("lora",),
        ),
        "import elit": Command(
            import_main, {**release, "--vae": [str(made / "photos")], "--classes": names},
            {"source": "file"}, before=("elit",),
        ),
        "many images": Command(
            sample.main,
            {"bundle": dit, "--num-images": ["2"], "--num-tokens": ["4"], "--num-steps": ["2"],
             "--out": to},
            {"bundle": "folder"}, ("--out",),
            {"--classes": "unicorn", "--device": "gpu0", "--import": "no_module", "--grow": "0-4"},
        ),
        "web": Command(
            web.main, {"bundle": dit, "--port": ["0"]}, {"bundle": "folder"}, (),
            {"--device": "gpu0", "--import": "no_module", "--host": "300.0.0.1"},
        ),
        "publish": Command(
            publish.main,
            {"bundle": dit, "name": ["some-one/model"], "--license": ["mit"],
             "--data-license": ["not stated"], "--dry-run": []},
            {"bundle": "folder", "--results": "file", "--picture": "file"}, (),
            {"name": "model", "--license": "The terms", "--import": "no_module"},
        ),
    }  # fmt: skip
