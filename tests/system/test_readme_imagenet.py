"""The README's ImageNet commands, read out of the README, on a small folder of that shape."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from file_server import served_files, serving, use_served_files
from forked_commands import run_forked
from PIL import Image
from small_pipeline import ROOT

from lgm_scale.evaluation.features.inception import SPATIAL_DIM
from lgm_scale.published import PUBLISHED
from lgm_scale.storage.files import file_hash

CLASSES = ("n01440764", "n01443537")
SIDE = 32  # the commands' own is 256
TINY = ["model.size=tiny", "model.latent_dim=8", "model.num_base_tokens=16"]
SHORT = [
    *("train.max_duration=2ba", "train.global_batch_size=4", "train.precision=fp32"),
    *("data.num_samples=8", "data.num_workers=0", "lengths.choices=[8,4]"),
]
SHRUNK = {
    "yamls/tokenizer_b.yaml": [
        *TINY, *SHORT, f"model.image_size={SIDE}", "model.patch_size=8", "model.codebook_size=32",
        "model.pretrained_encoder=null", "lengths.weights=null", "optimizer.warmup=0",
        "objective.representation=0", "objective.adversarial=0",
    ],
    "yamls/dit_xl.yaml": [*TINY, *SHORT, f"model.num_classes={len(CLASSES)}"],
    "yamls/eval_sweep.yaml": [
        "cells=[{num_tokens: 8, cfg_scale: 1.5}]", "sampler.num_steps=3", "num_images=10",
        "precision=fp32", "metrics=[fid,is]",
    ],
    "data_tools/images_to_mds.py": ["--image-size", str(SIDE), "--workers", "1"],
    "lgm_scale.sample": ["--classes", "0", "1", "--num-tokens", "4", "8"],
    "lgm_scale.assets": ["--yes"],
}  # fmt: skip
"""What is appended to a command that has this word; the first that fits."""
NOT_SHRUNK = ("lgm_scale.assets", "eval/preflight.py")


def commands() -> list[str]:
    """Lines of the section's block, continued ones joined."""
    section = (ROOT / "README.md").read_text().split("## ImageNet", 1)[1].split("\n## ", 1)[0]
    block = re.search(r"```sh\n(.*?)```", section, re.S)
    assert block is not None
    text = block[1].replace("\\\n", " ")
    lines = [part.strip() for line in text.splitlines() for part in line.split(" && ")]
    return [line for line in lines if line]


def appended(words: list[str]) -> list[str]:
    """What makes a command small."""
    if "eval/preflight.py" in words:
        return []
    names = [name for name in NOT_SHRUNK if name in words] or words
    return next((SHRUNK[name] for name in names if name in SHRUNK), [])


@pytest.fixture
def checkout(tmp_path) -> Path:
    """An empty folder with nothing but the clone's own files."""
    folder = tmp_path / "clone"
    folder.mkdir()
    own = ("lgm_scale", "eval", "data_tools", "launchers", "yamls", "Makefile", "pyproject.toml")
    for name in own:
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """A folder per class in train/ and val/, four JPEGs of 256 pixels in each."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                rough = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                image = Image.fromarray(rough).resize((256, 256))
                image.save(folder / f"{name}_{index}.JPEG")
    return root


@pytest.fixture(scope="module")
def published(tmp_path_factory, vgg16_file, inception_file) -> tuple[Path, dict[str, str | None]]:
    """Files of the published names: random weights, statistics of nothing, or no weights at all
    where the shrunk commands read none; and their sums."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("dino_critic", "dinov2_b", "dinov2_l"):
        (folder / PUBLISHED[name].name).write_text(f"no weights: {name}")
    for name, path in (("vgg16", vgg16_file), ("inception", inception_file)):
        (folder / PUBLISHED[name].name).hardlink_to(path)
    rng = np.random.default_rng(1)
    np.savez(
        folder / PUBLISHED["adm_imagenet256"].name,
        arr_0=rng.integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8),
        mu=rng.normal(size=2048), sigma=np.eye(2048),
        mu_s=rng.normal(size=SPATIAL_DIM), sigma_s=np.eye(SPATIAL_DIM),
    )  # fmt: skip
    names = {name: file.name for name, file in PUBLISHED.items()}
    sums: dict[str, str | None] = {
        name: file_hash(folder / file) for name, file in names.items() if (folder / file).is_file()
    }
    return folder, sums | {"adm_imagenet256": None}


@pytest.mark.slow
@pytest.mark.system
def test_the_commands_of_the_readme_lead_from_a_clone_to_the_table(checkout, imagenet, published):
    lines, ran = commands(), []
    assert lines[0] == "make install"
    plan = subprocess.run(
        [*("make", "--always-make", "--dry-run", "--no-print-directory", "install")],
        cwd=checkout, capture_output=True, text=True, check=True,
        env={k: v for k, v in os.environ.items() if k not in ("VENV", "MAKEFLAGS", "TORCH")},
    ).stdout  # fmt: skip
    environment = dict(os.environ)
    with serving(published[0]) as server:
        environment |= served_files(server, published[1])
        for line in lines[1:]:
            words = [
                re.sub(r"\$(\w+)", lambda found: environment[found[1]], word)
                for word in shlex.split(line, comments=True)
            ]
            if words[0] == "source":  # what `make install` makes
                assert f"test -x {Path(words[1]).parent}/python" in plan
                continue
            if words[0] == "export":
                assert words[1] == "IMAGENET=/data/imagenet"
                environment["IMAGENET"] = str(imagenet)
                continue
            is_composer = words[:2] == ["composer", "-n"]
            assert is_composer or words[0] == "python", line
            words = words[3:] if is_composer else words[1:]
            done = run_forked(
                [*words, *appended(words)], checkout, environment=environment,
                ranks=int(is_composer), prepare=use_served_files,
            )  # fmt: skip
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            ran.append((line, done.stdout))
    said = dict(ran)
    assert "this run can start" in next(out for line, out in ran if "--dry-run" in line)
    assert "missing" not in said["python eval/preflight.py yamls/eval_sweep.yaml --strict"]
    rows = json.loads((checkout / "runs/dit_xl/sweep/results.json").read_text())["rows"]
    assert {"fid", "is"} <= rows[0]["metrics"].keys()
    assert rows[0]["cell"]["num_tokens"] == 8
    assert rows[0]["names"]["fid"].startswith("gFID")  # the test's weights pass for published
    assert (checkout / "runs/dit_xl/sweep/index.html").is_file()
    assert (checkout / "grid.png").is_file()
    assert {path for path, _ in server.asked} == {
        f"/{PUBLISHED[name].name}" for name in published[1]
    }


@pytest.mark.slow
@pytest.mark.system
def test_the_pipeline_lacks_nothing_once_the_readme_s_files_are_there(
    checkout, imagenet, published
):
    text = (ROOT / "yamls/pipeline/imagenet256.yaml").read_text()
    assert text.count("/data/imagenet/") == 2
    (checkout / "mine.yaml").write_text(text.replace("/data/imagenet/", f"{imagenet}/"))
    (checkout / "assets").mkdir()
    for name in published[1]:
        place = checkout / PUBLISHED[name].path
        place.symlink_to(published[0] / PUBLISHED[name].name)
    words = ["launchers/pipeline.py", "mine.yaml", "--dry-run"]
    done = run_forked(words, checkout)
    assert done.returncode == 0, done.stderr
    stages = ["convert", "reference", "validation", "tokenizer", "encode", "generator", "sweep"]
    assert [line.split()[0] for line in done.stdout.splitlines()[:7]] == stages
    place.unlink()
    done = run_forked(words, checkout)
    assert done.returncode == 2
    assert f"--fetch {name}`" in done.stderr
