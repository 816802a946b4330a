"""The judge in the package: a classifier of Fashion-MNIST as a feature space of the evaluator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small_sweep import make_images, results_of, sweep_config
from test_fashion_mnist import convert, write_files

from lgm_scale.data.fashion_mnist import CLASSES, DEBIAN_FOLDER, read_split
from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.commands import reference
from lgm_scale.evaluation.features.fashion_mnist import WEIGHTS, FashionFeatures
from lgm_scale.evaluation.images import ValidationImages
from lgm_scale.evaluation.report.writing import write_report
from lgm_scale.evaluation.sweep.measure import measure
from lgm_scale.families.lgm.bundle import save_lgm_bundle
from lgm_scale.families.lgm.config import LGMModelConfig
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.network import build_merge_dit
from lgm_scale.families.tokenizer.bundle import save_tokenizer_bundle
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import build_tokenizer

METRICS = ["fashion_accuracy", "fashion_frechet", "fashion_precision", "fashion_recall"]
LABEL = "(Fashion-MNIST classifier, not FID)"


def make_bundle(folder: Path, classes: tuple[str, ...] = CLASSES) -> None:
    torch.manual_seed(0)
    small = TokenizerModelConfig(
        size="tiny", image_size=32, patch_size=8, num_base_tokens=16, latent_dim=4,
        num_codebooks=4, codebook_size=8,
    )  # fmt: skip
    tokenizer = build_tokenizer(small)
    save_tokenizer_bundle(
        folder / "tokenizer", small, tokenizer.state_dict(), tokenizer.merge_tree(), {}
    )
    config = LGMModelConfig(size="tiny", latent_dim=4, num_base_tokens=16, num_classes=10)
    weights, stats = (
        build_merge_dit(config).state_dict(),
        LatentStats(torch.zeros(4), torch.ones(4)),
    )
    training = {"config": {"objective": {"noise_scale": "corrected"}}}
    save_lgm_bundle(folder / "dit", config, weights, stats, classes, folder / "tokenizer", training)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A generator with random weights, and images of noise: `mds` holds those for validation."""
    folder = tmp_path_factory.mktemp("fashion")
    make_bundle(folder)
    convert(write_files(folder / "idx"), folder / "data")
    (folder / "data" / "val").rename(folder / "mds")
    (folder / "metrics.jsonl").touch()
    return folder


@pytest.fixture(scope="module")
def training_reference(made) -> Path:
    out = made / "train.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        words = [str(made / "data" / "train"), "--fashion-mnist", "--out", str(out)]
        patch.setattr("sys.argv", ["reference", *words, "--name", "training images"])
        assert reference.main() == 0
    return out


def config_for(made: Path, out: Path, **changes):
    values = {"metrics": METRICS, "num_components": 0, "cells": [{"num_tokens": [4]}]}
    return sweep_config(made, out, **values | changes)


def test_the_shipped_classifier_says_how_it_was_made_and_how_good_it_is():
    with safe_open(WEIGHTS, "pt") as file:
        found = file.metadata()
    assert found["command"].startswith("python -m experiments.fashion_classifier --out ")
    accuracy, _, count = found["accuracy"].partition(" on ")
    assert count == "10000 validation images"
    assert float(accuracy) >= 0.92
    assert WEIGHTS.stat().st_size < 2_000_000


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_it_recognises_real_images():
    found = read_split(DEBIAN_FOLDER, "val")
    images = torch.from_numpy(found.images[:400])[:, None].expand(-1, 3, -1, -1)
    logits = FashionFeatures()(images)["fashion_logits"]
    assert (logits.argmax(1) == found.labels[:400]).mean() > 0.88


def test_its_features_have_the_same_bits_in_any_batch():
    space = FashionFeatures()
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    whole = space(images)
    assert {name: v.shape for name, v in whole.items()} == {
        name: (7, dim) for name, dim in space.outputs.items()
    }
    for name, values in whole.items():
        parts = [space(part)[name] for part in images.split(3)]
        assert np.array_equal(np.concatenate(parts), values)


@pytest.mark.slow
def test_samples_reconstructions_and_real_images_are_judged(made, training_reference, tmp_path):
    config = config_for(
        made, tmp_path / "out", reference=str(training_reference), save_npz=True, num_images=20
    )
    results = measure(config)
    assert results is not None
    (row,) = results["rows"]
    assert set(row["metrics"]) == set(METRICS)
    assert all(LABEL in name and "20 images" in name for name in row["names"].values())
    pixels = torch.from_numpy(np.load(row["npz"])["arr_0"]).permute(0, 3, 1, 2)
    found = FashionFeatures()(pixels)["fashion_logits"].argmax(1)
    assert row["metrics"]["fashion_accuracy"] == (found == np.arange(20) % 10).mean()

    floor = results_of(tmp_path / "out")["floor"]
    images, labels = ValidationImages(made / "mds", 32).read(range(11))
    found = FashionFeatures()(images)["fashion_logits"].argmax(1)
    assert floor["metrics"]["fashion_accuracy"] == (found == labels).mean()
    assert set(floor["metrics"]) == set(METRICS)
    assert floor["protocol"]["reference"]["images"] == row["protocol"]["reference"]["images"]

    (reconstructed,) = results["reconstructions"]
    assert LABEL in reconstructed["names"]["rfashion_frechet_reference"]
    assert 0 <= reconstructed["metrics"]["fashion_accuracy"] <= 1
    page = write_report(tmp_path / "out").read_text()
    line = page.split("Real validation images against the same reference:")[1].split("</p>")[0]
    assert line.count("(Fashion-MNIST classifier, not FID), 11 images <b>") == 4
    assert "Real validation images" in (tmp_path / "out" / "results.md").read_text()
    again = measure(config)
    assert again is not None
    assert (again["rows"], again["floor"]) == (results["rows"], results["floor"])


def test_validation_images_as_the_reference_have_no_floor(made, tmp_path):
    results = measure(config_for(made, tmp_path / "out", metrics=["fashion_frechet"]))
    assert results is not None
    assert "floor" not in results
    assert list(results["rows"][0]["metrics"]) == ["fashion_frechet"]
    assert "fashion_mnist" in json.dumps(results["rows"][0]["protocol"]["features"])


def test_it_judges_nothing_but_fashion_mnist(made, tmp_path, monkeypatch):
    make_bundle(tmp_path, tuple(reversed(CLASSES)))
    with pytest.raises(ConfigError, match="metrics: fashion_accuracy is for generators of Fashion"):
        config_for(made, tmp_path / "out", bundle=str(tmp_path / "dit"), images=None)
    make_images(tmp_path / "small", side=16)
    words = ["reference", str(tmp_path / "small" / "mds"), "--fashion-mnist"]
    monkeypatch.setattr("sys.argv", [*words, "--out", str(tmp_path / "r.safetensors")])
    with pytest.raises(ConfigError, match=r"--fashion-mnist: .* 16 pixels; its classifier looks"):
        reference.main()


def test_a_missing_reference_is_made_with_the_options_of_these_metrics(made, tmp_path):
    with pytest.raises(ConfigError, match=r"reference SOURCE --out \S+ --fashion-mnist`"):
        config_for(made, tmp_path / "out", reference=str(tmp_path / "r.safetensors"))
