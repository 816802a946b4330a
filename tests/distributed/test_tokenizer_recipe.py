"""The published tokenizer recipe, scaled down to two CPU ranks: every loss on, random assets."""

from __future__ import annotations

import io
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from small_pipeline import run_command
from streaming import MDSWriter

from lgm_scale.data.manifest import Manifest, write_manifest

SMALL = [
    "data.num_samples=16",
    "data.num_workers=0",
    "model.size=tiny",
    "model.image_size=32",
    "model.patch_size=8",
    "model.num_base_tokens=16",
    "model.codebook_size=64",
    "model.pretrained_encoder=null",
    "lengths.choices=[8,16]",
    "lengths.weights=null",
    "assets.dinov2_size=s",
    "objective.adversarial_start=1",
    "objective.perceptual_warmup=2",
    "optimizer.warmup=0",
    "train.max_duration=3ba",
    "train.global_batch_size=4",
    "train.precision=fp32",
    "logging.interval=1",
    "checkpoint.interval=3ba",
]


def write_images(folder: Path) -> None:
    with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
        for index in range(16):
            pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "PNG")
            writer.write({"image": data.getvalue(), "label": index % 2})
    write_manifest(folder, Manifest("images", 16, ("a", "b"), (8, 8)))


def train(folder: Path, ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    write_images(folder / "images")
    places = [f"out={folder / 'out'}", f"data.path={folder / 'images'}"]
    command = ["lgm_scale/train.py", "yamls/tokenizer_b.yaml", *places, *SMALL, *overrides]
    return run_command(*command, ranks=ranks)


@pytest.mark.slow
@pytest.mark.system
def test_two_ranks_train_with_every_loss_on(tmp_path):
    done = train(tmp_path, 2, "assets.allow_random_assets=true")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "RANDOM WEIGHTS" in output
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["num_tokens"] for row in rows] == [8, 16, 8]
    assert {"alignment", "entropy", "representation", "perceptual"} < rows[0].keys()
    assert {"adversarial", "adaptive_weight", "critic_lecam", "critic_consistency"} < rows[2].keys()
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    random = ["assets.vgg16", "assets.dino_critic", "assets.dinov2_teacher"]
    assert all(row["random_assets"] == random for row in rows)
    info = json.loads((tmp_path / "out/bundle/bundle.json").read_text())
    assert info["training"]["random_assets"] == random
    with safe_open(str(tmp_path / "out/bundle/tokenizer.safetensors"), "pt") as weights:
        parts = {name.split(".")[0] for name in weights.keys()}  # noqa: SIM118  # no mapping
    assert parts == {"encoder", "to_latent", "quantizer", "merging", "decoder"}


@pytest.mark.slow
@pytest.mark.system
def test_missing_assets_end_the_command_with_status_2(tmp_path):
    done = train(tmp_path, 0)
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "assets.vgg16: assets/vgg16-397923af.pth is not a file" in output
    assert "Traceback" not in output
