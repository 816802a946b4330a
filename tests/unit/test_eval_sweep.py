"""The sweep on a tiny random generator: resuming, independence, refusals, the report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file

from data_tools.images_to_mds import convert_folder
from eval import measure as measure_module
from eval.measure import measure
from eval.report import write_report
from eval.sweep_config import SweepConfig, load_sweep
from lgm_scale.bundle import (
    build_generator,
    build_tokenizer,
    save_generator_bundle,
    save_tokenizer_bundle,
)
from lgm_scale.config import GeneratorModelConfig, TokenizerModelConfig
from lgm_scale.data.latents import LatentStats
from lgm_scale.errors import CheckpointError, ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
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
    config = GeneratorModelConfig(
        size="tiny", latent_dim=4, num_base_tokens=16, num_blocks=4, num_classes=3
    )
    net = build_generator(config)
    for parameter in net.parameters():  # its outputs start at zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    stats = LatentStats(torch.zeros(4), torch.ones(4))
    save_generator_bundle(
        folder / "dit", config, net.state_dict(), stats, CLASSES, folder / "tokenizer", training
    )


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder with bundles, validation images and a metrics log."""
    folder = tmp_path_factory.mktemp("sweep")
    make_images(folder)
    training = {"steps": 60, "config": {"objective": {"noise_scale": "corrected"}}}
    make_bundles(folder, training)
    rows = [{"step": s, "num_tokens": [4, 16][s % 2], "loss": 1 / (s + 1)} for s in range(60)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def values_of(made: Path, out: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "bundle": str(made / "dit"),
        "images": str(made / "mds"),
        "out": str(out),
        "lengths": [4, 9, 16],
        "num_images": 11,
        "batch_size": 4,
        "num_steps": 4,
        "cfg_scale": 1.5,
        "num_components": 4,
        "metrics_log": str(made / "metrics.jsonl"),
        "commands": ["make the <images>", "make the generator"],
    }
    return values | changes


def configured(made: Path, out: Path, **changes: Any) -> SweepConfig:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values_of(made, out, **changes)))
    return load_sweep(str(path), [])


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def distances(out: Path) -> list[tuple[float, float]]:
    return [
        (row["samples"]["distance"], row["reconstructions"]["distance"])
        for row in results_of(out)["rows"]
    ]


@pytest.fixture(scope="session")
def swept(made, tmp_path_factory) -> Path:
    """The `out` folder of a finished sweep, not to be changed."""
    out = tmp_path_factory.mktemp("swept") / "report"
    measure(configured(made, out))
    write_report(out)
    return out


# --- results ----------------------------------------------------------------------------------


def test_every_length_has_its_row_with_the_whole_protocol(swept):
    results = results_of(swept)
    assert [row["num_tokens"] for row in results["rows"]] == [4, 9, 16]
    work = [row["samples"]["gflops_per_image"] for row in results["rows"]]
    assert work == sorted(work)
    for row in results["rows"]:
        protocol = row["protocol"]["samples"]
        assert protocol["num_tokens"] == row["num_tokens"]
        assert {"cfg_scale", "cfg_interval", "cfg_rescale", "num_steps", "timestep_shift", "solver",
                "seed", "num_images", "noise_scale", "bundle_files", "features",
                "reference"} <= set(protocol)  # fmt: skip
        assert protocol["reference"]["class_counts"] == [5, 5, 5]
        assert row["samples"]["num_forwards"] == 4  # of t = 0, 0.09, 0.29 the last is guided
    losses = [row["training_loss"] for row in results["rows"]]
    assert losses[1] is None
    assert losses[0]["steps"] == 30
    assert losses[0]["ratio"] < 1
    assert set(results["versions"]) == {"lgm_scale", "torch"}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_results_do_not_depend_on_the_batch(made, swept, tmp_path, batch_size):
    """Products of other shapes may differ in their last bits; rounding to 8 bits takes most of it.
    A value at the edge of rounding could still flip, hence the tolerance."""
    out = tmp_path / "report"
    measure(configured(made, out, batch_size=batch_size))
    np.testing.assert_allclose(distances(out), distances(swept), rtol=1e-4)
    for k in (4, 9, 16):
        here, there = (
            load_file(folder / "cells" / f"samples_k{k:04d}.safetensors")["images"].astype(int)
            for folder in (out, swept)
        )
        assert here.shape == (3, 3, 16, 16)
        assert np.abs(here[0] - here[1]).max() > 20
        assert np.abs(here - there).max() <= 1


@pytest.mark.slow
@pytest.mark.system
def test_two_ranks_give_the_same_bits(made, swept, tmp_path):
    out = tmp_path / "report"
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(values_of(made, out)))
    composer = Path(sys.executable).with_name("composer")
    command = [str(composer), "-n", "2", "eval/sweep.py", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert distances(out) == distances(swept)
    assert results_of(out)["rows"][0]["samples"]["ranks"] == 2
    for cell in sorted((swept / "cells").glob("*.safetensors")):
        here, there = load_file(out / "cells" / cell.name), load_file(cell)
        assert all(np.array_equal(here[name], there[name]) for name in there), cell.name


# --- resuming ---------------------------------------------------------------------------------


def counted(monkeypatch) -> list[int]:
    """The K of every chunk that is sampled from now on."""
    calls: list[int] = []
    real = measure_module.sample_images

    def spy(bundle, indices, num_tokens, *rest):
        calls.append(num_tokens)
        return real(bundle, indices, num_tokens, *rest)

    monkeypatch.setattr(measure_module, "sample_images", spy)
    return calls


@pytest.fixture
def copied(swept, tmp_path) -> Path:
    return Path(shutil.copytree(swept, tmp_path / "report"))


def test_what_is_done_is_not_done_again(made, copied, monkeypatch):
    before = results_of(copied)
    calls = counted(monkeypatch)
    measure(configured(made, copied))
    assert calls == []
    assert results_of(copied)["rows"] == before["rows"]


def test_a_lost_length_alone_is_done_again(made, swept, copied, monkeypatch):
    (copied / "cells" / "samples_k0009.json").unlink()
    calls = counted(monkeypatch)
    measure(configured(made, copied))
    assert set(calls) == {9}
    assert distances(copied) == distances(swept)


@pytest.mark.parametrize(
    "change",
    [{"cfg_scale": 2.0}, {"seed": 1}, {"num_steps": 5}, {"num_images": 12}, {"num_components": 3},
     {"timestep_shift": 0.5}, {"cfg_interval": [0.0, 0.5]}, {"cfg_rescale": "none"}],
)  # fmt: skip
def test_another_protocol_is_done_again(made, swept, copied, monkeypatch, change):
    calls = counted(monkeypatch)
    measure(configured(made, copied, **change))
    assert set(calls) == {4, 9, 16}
    assert distances(copied) != distances(swept)


def test_more_lengths_keep_those_that_are_there(made, copied, monkeypatch):
    calls = counted(monkeypatch)
    measure(configured(made, copied, lengths=[4, 6, 9, 16], batch_size=5))
    assert set(calls) == {6}
    assert len(results_of(copied)["rows"]) == 4


# --- the report -------------------------------------------------------------------------------


def test_the_report_is_complete_and_loads_nothing(swept):
    for name in ("samples", "reconstructions", "merge_tree", "tradeoff"):
        with Image.open(swept / f"{name}.png") as image:
            assert min(image.size) > 200
    page = (swept / "index.html").read_text()
    assert "http" not in page
    assert not re.search(r'(src|href|srcset)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 8
    assert "prefers-color-scheme: dark" in page
    assert "make the &lt;images&gt;" in page
    assert "not trained" in page


def test_the_distance_is_never_given_a_name_it_has_not(swept):
    text = (swept / "index.html").read_text()
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text) + (swept / "results.json").read_text()
    assert "not FID" in text
    assert "fid" not in re.sub("not FID", "", text).lower()


def test_the_report_is_drawn_again_from_what_is_stored(swept, copied):
    for path in (*copied.glob("*.png"), copied / "index.html"):
        path.unlink()
    assert write_report(copied) == copied / "index.html"
    assert (copied / "index.html").read_bytes() == (swept / "index.html").read_bytes()
    (copied / "cells" / "samples_k0009.safetensors").unlink()
    with pytest.raises(DataError, match=r"samples_k0009\.safetensors"):
        write_report(copied)


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"results\.json is missing"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match="damaged"):
        write_report(tmp_path)


# --- refusals ---------------------------------------------------------------------------------


def problems_of(made: Path, tmp_path: Path, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        configured(made, tmp_path / "report", **changes)
    return caught.value.problems


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "nowhere"}, "bundle: nowhere is no bundle"),
        ({"images": "nowhere"}, "images: nowhere does not exist"),
        ({"metrics_log": "nowhere"}, "metrics_log: nowhere is not a file"),
        ({"lengths": [3, 4, 17]}, r"lengths: \[3, 17\] outside \[4, 16\]"),
        ({"lengths": [4, 4]}, r"lengths: \[4\] occur more than once"),
        ({"lengths": []}, "lengths: is empty"),
        ({"num_images": 1, "num_components": 1}, "num_images: 1 have no covariance"),
        ({"num_images": 4}, "num_images: 4 images cannot fill 4 dimensions"),
        ({"num_components": 15, "num_images": 99}, "num_components: 15 components"),
        ({"num_components": 0}, "num_components: 0 must be"),
        ({"batch_size": 0}, "batch_size: 0 must be"),
        ({"num_steps": 1}, "num_steps: 1"),
        ({"cfg_scale": 0.5}, "cfg_scale: 0.5"),
        ({"cfg_interval": [0.5, 0.2]}, "cfg_interval:"),
        ({"timestep_shift": 0.0}, "timestep_shift:"),
        ({"cfg_rescale": "some"}, "cfg_rescale:"),
        ({"num_image": 5}, "num_image: unknown key; did you mean 'num_images'"),
    ],
)
def test_a_wrong_value_is_refused(made, tmp_path, change, message):
    problems = problems_of(made, tmp_path, **change)
    assert len(problems) == 1, problems
    assert re.match(message, problems[0])


def test_every_problem_is_told_at_once(made, tmp_path):
    problems = problems_of(made, tmp_path, num_steps=1, lengths=[99], images="gone", seed="x")
    assert {problem.split(":")[0] for problem in problems} == {
        "num_steps", "lengths", "images", "seed",
    }  # fmt: skip


def test_a_tokenizer_bundle_is_refused(made, tmp_path):
    (problem,) = problems_of(made, tmp_path, bundle=str(made / "tokenizer"))
    assert "is a tokenizer bundle; a generator bundle is needed" in problem


def test_images_of_another_size_or_other_classes_are_refused(made, tmp_path):
    make_images(tmp_path / "large", side=24)
    (problem,) = problems_of(made, tmp_path, images=str(tmp_path / "large" / "mds"))
    assert "holds images of 24 pixels, the bundle makes 16" in problem
    make_images(tmp_path / "other", classes=("cat_one", "dog", "fox"))
    (problem,) = problems_of(made, tmp_path, images=str(tmp_path / "other" / "mds"))
    assert "['eel', 'fox']" in problem


def test_a_bundle_that_does_not_say_its_noise_is_refused(made, tmp_path):
    make_bundles(tmp_path, {})
    config = configured(made, tmp_path / "report", bundle=str(tmp_path / "dit"))
    with pytest.raises(CheckpointError, match="noise_scale"):
        measure(config)


def test_samples_that_are_not_finite_are_refused_and_not_kept(made, tmp_path, monkeypatch):
    real = measure_module.sample_images

    def broken(bundle, indices, num_tokens, *rest):
        images, finite = real(bundle, indices, num_tokens, *rest)
        return images, finite & (indices.numpy() != 5) if num_tokens == 9 else finite

    monkeypatch.setattr(measure_module, "sample_images", broken)
    with pytest.raises(DataError, match=r"samples at K = 9: images \[5\] of 11 are not finite"):
        measure(configured(made, tmp_path / "report"))
    kept = {path.name for path in (tmp_path / "report" / "cells").glob("samples*.json")}
    assert kept == {"samples_k0004.json"}


# --- the command ------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def run_sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "eval/sweep.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


@pytest.mark.system
def test_a_user_error_ends_with_status_two_and_no_traceback(made, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(values_of(made, tmp_path / "report")))
    done = run_sweep(str(path), "num_steps=1", "bundle=gone")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 2 problems in")
    assert "Traceback" not in done.stderr


@pytest.mark.system
def test_a_dry_run_shows_the_work_and_makes_nothing(made, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(values_of(made, tmp_path / "report")))
    done = run_sweep(str(path), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "GFLOPs per image" in done.stdout
    assert not (tmp_path / "report").exists()


def test_the_quickstart_sweep_is_well_formed():
    values = yaml.safe_load((ROOT / "yamls" / "quickstart" / "sweep.yaml").read_text())
    assert values["lengths"] == [8, 16, 32, 64]
    assert values["commands"][-1] == "composer eval/sweep.py yamls/quickstart/sweep.yaml"
    assert set(values) <= set(SweepConfig.__dataclass_fields__)
