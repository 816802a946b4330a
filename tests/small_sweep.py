"""A sweep small enough for tests: a tiny random generator, images of noise, configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from lgm_scale.data.preparation.convert import convert_folder
from lgm_scale.evaluation.sweep.config import SweepConfig
from lgm_scale.evaluation.sweep.rules import load_sweep
from lgm_scale.families.lgm.bundle import save_lgm_bundle
from lgm_scale.families.lgm.config import LGMModelConfig
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.network import build_merge_dit
from lgm_scale.families.tokenizer.bundle import save_tokenizer_bundle
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import build_tokenizer

CLASSES = ("cat_one", "dog", "eel")


def make_images(folder: Path, side: int = 16, per_class: int = 5, classes=CLASSES) -> None:
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    convert_folder(folder / "photos", folder / "mds", image_size=side)


def make_bundles(folder: Path, training: dict[str, Any]) -> None:
    torch.manual_seed(0)
    small = TokenizerModelConfig(
        size="tiny", image_size=16, patch_size=4, num_base_tokens=16, latent_dim=4,
        num_codebooks=4, codebook_size=8,
    )  # fmt: skip
    tokenizer = build_tokenizer(small)
    for name, weight in tokenizer.decoder.vit.blocks.named_parameters():
        if "norm" not in name:  # fresh ones hardly look at the latents
            weight.data *= 8
    save_tokenizer_bundle(
        folder / "tokenizer", small, tokenizer.state_dict(), tokenizer.merge_tree(), {}
    )
    config = LGMModelConfig(
        size="tiny", latent_dim=4, num_base_tokens=16, num_blocks=4, num_classes=3
    )
    net = build_merge_dit(config)
    for parameter in net.parameters():  # its outputs start at zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    stats = LatentStats(torch.zeros(4), torch.ones(4))
    save_lgm_bundle(
        folder / "dit", config, net.state_dict(), stats, CLASSES, folder / "tokenizer", training
    )


def make_sweep_inputs(folder: Path) -> Path:
    """Bundles, validation images and a metrics log below a folder."""
    make_images(folder)
    training = {"steps": 60, "config": {"objective": {"noise_scale": "corrected"}}}
    make_bundles(folder, training)
    rows = [{"step": s, "num_tokens": [4, 16][s % 2], "loss": 1 / (s + 1)} for s in range(60)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sweep_values(made: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Keys of a sweep over three lengths; samples and reconstructions in the space of pixels."""
    values = {
        "bundle": str(made / "dit"),
        "images": str(made / "mds"),
        "out": str(out),
        "cells": [{"num_tokens": [4, 9, 16]}],
        "sampler": {"num_steps": 4, "cfg_scale": 1.5},
        "num_images": 11,
        "batch_size": 3,
        "chunk_size": 4,
        "num_components": 4,
        "metrics": ["pixel_frechet"],
        "metrics_log": str(made / "metrics.jsonl"),
        "commands": ["make the <images>", "make the generator"],
    }
    sampler = values["sampler"] | changes.pop("sampler", {})  # type: ignore[operator]
    return values | {"sampler": sampler} | changes


def sweep_file(made: Path, out: Path, **changes: Any) -> Path:
    """The same as a YAML file."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(sweep_values(made, out, **changes)))
    return path


def sweep_config(made: Path, out: Path, **changes: Any) -> SweepConfig:
    return load_sweep(str(sweep_file(made, out, **changes)), [])


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def numbers_of(out: Path) -> dict[str, dict[str, float]]:
    """Metrics of every row, by its name."""
    results = results_of(out)
    rows = [*results["rows"], *results["searched"], *results["reconstructions"]]
    return {row["key"]: row["metrics"] for row in rows}
