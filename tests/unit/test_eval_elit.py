"""The sweep on a tiny ELIT with random weights: the same evaluator, beside LGM in one report."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file
from small_elit import (
    BUDGETS,
    ELIT,
    PIXELS,
    make_elit_bundle,
    small_network,
    use_stand_in,
)
from small_sweep import (
    CLASSES,
    make_sweep_inputs,
    numbers_of,
    results_of,
    sweep_config,
    sweep_values,
)

from lgm_scale.bundle import read_info
from lgm_scale.config.loading import load_config, to_dict
from lgm_scale.data.images import ImageDataset
from lgm_scale.errors import ConfigError
from lgm_scale.evaluation.commands.sweep import describe
from lgm_scale.evaluation.during_training.subjects import GeneratorSubject
from lgm_scale.evaluation.during_training.sweeps import EvaluationDuringTraining
from lgm_scale.evaluation.report.curves import tradeoff_figure
from lgm_scale.evaluation.report.drawing import LIGHT
from lgm_scale.evaluation.report.writing import write_comparison, write_report
from lgm_scale.evaluation.sweep import samples as generate
from lgm_scale.evaluation.sweep.config import expand
from lgm_scale.evaluation.sweep.measure import measure
from lgm_scale.families.elit.bundle import save_elit_bundle
from lgm_scale.families.elit.config import ELITRun, SpaceConfig
from lgm_scale.families.generator import generator_families
from lgm_scale.pipeline import load_pipeline
from lgm_scale.sampling.config import SamplerConfig

CELLS = [{"num_tokens": [4, 16]}]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with an LGM bundle, an ELIT bundle and validation images."""
    folder = make_sweep_inputs(tmp_path_factory.mktemp("inputs"))
    make_elit_bundle(folder / "elit")
    return folder


def config_of(made: Path, out: Path, **changes):
    return sweep_config(made, out, **{"bundle": str(made / "elit"), "cells": CELLS} | changes)


@pytest.fixture(scope="module")
def swept(made, tmp_path_factory) -> Path:
    """The `out` folder of a finished sweep with its report, not to be changed."""
    out = tmp_path_factory.mktemp("swept") / "elit"
    measure(config_of(made, out))
    write_report(out)
    return out


@pytest.fixture(scope="module")
def swept_lgm(made, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "lgm"
    measure(sweep_config(made, out))
    return out


def problems_of(made: Path, tmp_path: Path, **changes) -> list[str]:
    with pytest.raises(ConfigError) as error:
        config_of(made, tmp_path / "report", **changes)
    return error.value.problems


# --- numbers ----------------------------------------------------------------------------------


def test_every_budget_has_its_row(made, swept):
    results = results_of(swept)
    low, high = results["rows"]
    assert [row["cell"]["num_tokens"] for row in (low, high)] == [4, 16]
    assert 0 < low["work"]["tflops_per_image"] < high["work"]["tflops_per_image"]
    assert low["work"]["decoder_tflops"] == 0
    assert low["metrics"]["pixel_frechet"] != high["metrics"]["pixel_frechet"]
    assert results["reconstructions"] == []
    assert results["parameters"].keys() == {"generator"}
    assert results["num_base_tokens"] == 16
    assert results["training_steps"] == 70
    assert results["off"] == {
        "reconstructions": "Reconstructions are off, and the merge tree with them: this "
        "generator's K is the work of its core, and no image is coded in K tokens"
    }
    # 3 steps at t = 0, 1/3, 2/3, all of them guided
    assert (low["work"]["rows"], low["work"]["guided_evaluations"]) == (6, 3)


def test_the_distance_is_that_of_the_samples_themselves(made, tmp_path):
    """Once more without chunks, sums or rows."""
    from lgm_scale.evaluation.engine.statistics import statistics_of
    from lgm_scale.evaluation.features.pixel_pca import PixelPCA
    from lgm_scale.evaluation.images import StoredImages
    from lgm_scale.evaluation.metrics.scores import frechet_distance

    cells = [{"num_tokens": 16, "uncond_num_tokens": 4, "guidance": "autoguidance"}]
    config = config_of(made, tmp_path / "report", cells=cells)
    results = measure(config)
    assert results is not None
    originals, _ = StoredImages(str(made / "mds"), 16).read(range(15))
    pca = PixelPCA.fit(originals.numpy(), 4)
    pipe = load_pipeline(made / "elit", "cpu")
    settings = expand(config)[0].sampler.settings()
    images = pipe([i % 3 for i in range(11)], 16, progress_bar=False, **settings)
    sides = [torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2), originals]
    expected = frechet_distance(*(statistics_of(pca(side)["pixel_pca"]) for side in sides))
    assert results["rows"][0]["metrics"]["pixel_frechet"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_numbers_are_the_same_bits_at_every_batch_size(made, swept, tmp_path, batch_size):
    out = tmp_path / "report"
    measure(config_of(made, out, batch_size=batch_size))
    assert numbers_of(out) == numbers_of(swept)
    for path in sorted((swept / "rows").glob("samples*.safetensors")):
        here, there = load_file(out / "rows" / path.name), load_file(path)
        assert here["images"].shape == (11, 3, 16, 16)
        assert np.array_equal(here["images"], there["images"])


def test_what_is_done_is_not_done_again(made, swept, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(swept, tmp_path / "report"))
    monkeypatch.setattr(generate, "sample_images", None)  # nothing can be sampled
    results = measure(config_of(made, copy))
    assert results is not None
    assert results["rows"] == results_of(swept)["rows"]


def test_latents_of_an_autoencoder_are_measured_alike(made, tmp_path, monkeypatch):
    use_stand_in(monkeypatch)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "weights.txt").write_text("0.25")
    space = SpaceConfig(kind="sd_vae", image_size=16)
    model = replace(ELIT, patch_size=1, interface=None)
    weights = small_network(model, space).state_dict()
    save_elit_bundle(tmp_path / "sit", model, space, weights, CLASSES, {}, vae=tmp_path / "vae")
    config = config_of(
        made, tmp_path / "out", bundle=str(tmp_path / "sit"), cells=[{"num_tokens": 4}]
    )
    results = measure(config)
    assert results is not None
    (row,) = results["rows"]
    assert row["work"]["decoder_tflops"] == 1000 * 16**2 / 1e12
    assert results["weights"].keys() == {"generator.safetensors", "vae/weights.txt"}
    assert np.isfinite(row["metrics"]["pixel_frechet"])


# --- configuration ----------------------------------------------------------------------------


def test_the_sampler_of_a_grid_has_its_own_defaults(made, tmp_path):
    config = config_of(made, tmp_path / "report", sampler={"cfg_scale": 1.0, "num_steps": 51})
    plain = load_pipeline(made / "elit", "cpu").config(16)
    for cell in expand(config):
        assert cell.sampler == plain
    other = expand(sweep_config(made, tmp_path / "lgm"))[0]
    assert (other.sampler.cfg_interval, other.sampler.timestep_shift) == ((0.15, 1.0), 0.2)
    assert expand(config_of(made, tmp_path / "r"))[0].sampler.num_steps == 4, "what is given counts"


def test_budgets_are_known_before_a_network_is_built(made):
    family, info = generator_families()["spatial_generator"], read_info(made / "elit")
    cells = [(k, SamplerConfig()) for k in range(1, 20)]
    (problem,) = family.length_problems(info, "elit", cells)
    wrong = [k for k in range(1, 20) if k not in BUDGETS]
    assert f"cells: {wrong} are no budgets" in problem
    assert load_pipeline(made / "elit", "cpu").bundle.net.token_lengths == BUDGETS


@pytest.mark.parametrize(
    "cell",
    [{"num_tokens": [4, 5]}, {"num_tokens": 16, "uncond_num_tokens": 5},
     {"num_tokens": 16, "length_schedule": [[0, 5], [0.5, 16]]}],
)  # fmt: skip
def test_a_length_that_is_no_budget_is_refused(made, tmp_path, cell):
    (problem,) = problems_of(made, tmp_path, cells=[cell])
    assert problem == (
        "cells: [5] are no budgets; K is k latents in each of 4 windows, k from 1 to 4: 4, 8, "
        "..., 16"
    )


def test_a_host_without_latents_has_one_length(made, tmp_path):
    make_elit_bundle(tmp_path / "sit", replace(ELIT, interface=None))
    (problem,) = problems_of(made, tmp_path, bundle=str(tmp_path / "sit"))
    assert "cells: [4]; without an interface the network runs at 16 tokens alone" in problem


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"guidance": "autoguidance"}, "cells: guidance: autoguidance needs uncond_num_tokens"),
        ({"guidance": "autoguidance", "uncond_num_tokens": 16}, "cells: uncond_num_tokens: 16; a"),
        ({"guidance": "strong"}, "cells.0.guidance"),
    ],
)
@pytest.mark.parametrize("bundle", ["dit", "elit"])
def test_autoguidance_without_a_weaker_branch_is_refused(made, tmp_path, bundle, settings, text):
    cells = [{"num_tokens": 16, **settings}]
    (problem,) = problems_of(made, tmp_path, bundle=str(made / bundle), cells=cells)
    assert problem.startswith(text)


def test_images_of_another_size_are_refused(made, tmp_path):
    info = json.loads((made / "elit" / "bundle.json").read_text())
    info["models"]["space"]["image_size"] = 32
    copy = Path(shutil.copytree(made / "elit", tmp_path / "elit"))
    (copy / "bundle.json").write_text(json.dumps(info))
    (problem,) = problems_of(made, tmp_path, bundle=str(copy), cells=[{"num_tokens": 16}])
    assert "holds images of 16 pixels, the bundle makes 32" in problem


def test_a_dry_run_shows_the_work_of_each_budget(made, tmp_path):
    cells = [*CELLS, {"num_tokens": 16, "uncond_num_tokens": 4, "guidance": "autoguidance"}]
    text = describe(config_of(made, tmp_path / "report", cells=cells))
    assert "K = 4, w = 1.5, t in [0, 1], 4 points" in text
    assert "K = 16, w = 1.5, t in [0, 1], 4 points, autoguidance at 4" in text
    pipe = load_pipeline(made / "elit", "cpu")
    for k in (4, 16):
        assert f"{pipe.row_flops(k) / 1e12:.4g} at K = {k}" in text
    assert "of decoding: 0" in text
    assert not (tmp_path / "report").exists()


def test_plain_guidance_keeps_the_identity_that_it_had():
    """Finished work of sweeps from before `guidance` counts."""
    from lgm_scale.evaluation.sweep.config import Cell

    plain = SamplerConfig(cfg_scale=1.5, uncond_num_tokens=2)
    assert "guidance" not in Cell(4, plain).values()
    assert Cell(4, replace(plain, guidance="autoguidance")).values()["guidance"] == "autoguidance"  # type: ignore[arg-type]
    assert plain.settings()["guidance"] == "cfg"


# --- report -----------------------------------------------------------------------------------


def test_the_report_leaves_out_what_there_is_not(swept):
    assert {path.name for path in swept.glob("*.png")} == {
        "samples.png", "tradeoff.png", "samples_k0004.png", "samples_k0016.png",
    }  # fmt: skip
    page = re.sub(r"base64,[A-Za-z0-9+/=]+", "", (swept / "index.html").read_text())
    assert "Reconstructions are off" in page
    assert "What is merged" not in page
    assert "the core of one diffusion transformer works on" in page
    assert "the same at every K" in page
    assert "merged like the tokens" not in page


@pytest.mark.slow
def test_both_families_share_a_table_and_a_picture(swept, swept_lgm, tmp_path):
    page = write_comparison([swept_lgm, swept], tmp_path / "both").read_text()
    assert page.count('<table class="sortable">') == 1
    lines = list(csv.DictReader((tmp_path / "both" / "results.csv").open()))
    assert [line["num_tokens"] for line in lines] == ["4", "9", "16", "4", "16"]
    assert {line["noise_scale"] for line in lines} == {
        "corrected", "whole state, the same at every K",
    }  # fmt: skip
    results = [results_of(out)["rows"] for out in (swept_lgm, swept)]
    for line, row in zip(lines, results[0] + results[1], strict=True):
        assert float(line["tflops_per_image"]) == row["work"]["tflops_per_image"]
    with Image.open(tmp_path / "both" / "tradeoff.png") as image:
        assert min(image.size) > 400
    named = [row | {"run_name": name} for rows, name in zip(results, ("lgm", "elit"), strict=True)
             for row in rows]  # fmt: skip
    figure = tradeoff_figure(named, [], LIGHT)
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["lgm, 4 points", "elit, 4 points"]
    marks = [text.get_text() for text in figure.axes[0].texts]
    assert marks == ["K = 4", "K = 9", "K = 16", "K = 4", "K = 16"]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"num_images": 12}, "num_images: 11 against 12"), ({"num_components": 3}, "features"),
     ({"seed": 3}, "seed: 0 against 3")],
)  # fmt: skip
def test_families_that_were_measured_otherwise_are_refused(
    made, swept_lgm, tmp_path, change, named
):
    other = tmp_path / "other"
    measure(config_of(made, other, cells=[{"num_tokens": 4}], **change))
    with pytest.raises(ConfigError, match="was not measured like") as caught:
        write_comparison([swept_lgm, other], tmp_path / "both")
    assert named in str(caught.value)


def test_another_reference_or_number_of_classes_is_refused(swept, swept_lgm, tmp_path):
    copy = Path(shutil.copytree(swept, tmp_path / "copy"))
    results = results_of(swept)
    results["rows"][1]["protocol"]["reference"]["images_sha256"] = "other"
    (copy / "results.json").write_text(json.dumps(results))
    with pytest.raises(ConfigError, match=r"reference\.images_sha256: .* against"):
        write_comparison([swept_lgm, copy], tmp_path / "both")
    results = results_of(swept)
    results["classes"].append("fox")
    (copy / "results.json").write_text(json.dumps(results))
    with pytest.raises(ConfigError, match="number of classes: 3 against 4"):
        write_comparison([swept_lgm, copy], tmp_path / "both")


# --- during training --------------------------------------------------------------------------


class Average:
    """In the place of a run's EMA."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights

    def full_weights(self) -> dict[str, torch.Tensor]:
        return self.weights


def in_training(config: ELITRun, dataset: ImageDataset, average: Any) -> EvaluationDuringTraining:
    return EvaluationDuringTraining(config, GeneratorSubject(config, dataset, average))


def training_run(made: Path, out: Path, **sweep) -> ELITRun:
    path = out.with_suffix(".sweep.yaml")
    values = sweep_values(made, out, **{"cells": CELLS} | sweep)
    for key in ("bundle", "out", "metrics_log"):
        del values[key]
    path.write_text(yaml.safe_dump(values))
    run = {
        "task": "spatial_generator", "run_name": "run", "out": str(out),
        "model": to_dict(ELIT), "space": to_dict(PIXELS),
        "data": {"path": str(made / "mds")}, "lengths": {"choices": [4, 16]},
        "train": {"max_duration": "1ba", "global_batch_size": 4},
        "evaluation": {"sweep": str(path), "interval": "5ba"},
    }  # fmt: skip
    return load_config(run, ELITRun)


@pytest.fixture
def dataset(made) -> ImageDataset:
    return ImageDataset(str(made / "mds"), image_size=16, train=True, seed=0, batch_size=4)


def test_the_evaluation_of_a_run_is_the_sweep_of_its_result(made, swept, dataset, tmp_path):
    config = training_run(made, tmp_path / "run")
    average = Average(small_network().state_dict())
    evaluation = in_training(config, dataset, average)
    rows = evaluation.look(5)
    assert [row["metrics"] for row in rows] == [row["metrics"] for row in results_of(swept)["rows"]]
    lines = (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 5]
    assert results_of(tmp_path / "run" / "evaluation" / "step-00000005")["training_steps"] == 5
    zero = {name: torch.zeros_like(value) for name, value in average.weights.items()}
    average.weights = zero
    assert evaluation.look(10)[0]["metrics"] != rows[0]["metrics"]


def test_what_a_run_cannot_evaluate_is_refused_before_it_begins(made, dataset, tmp_path):
    config = training_run(made, tmp_path / "run", sampler={"uncond_num_tokens": 5})
    with pytest.raises(ConfigError, match=r"cells: \[5\] are no budgets"):
        in_training(config, dataset, Average({}))


def test_a_run_on_latents_knows_its_decoder(made, dataset, tmp_path, monkeypatch):
    use_stand_in(monkeypatch)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "weights.txt").write_text("0.25")
    config = training_run(made, tmp_path / "run", cells=[{"num_tokens": 4}])
    space = SpaceConfig(kind="sd_vae", image_size=16, vae=str(tmp_path / "vae"))
    model = replace(ELIT, patch_size=1, interface=None)
    config = replace(config, model=model, space=space)
    average = Average(small_network(model, space).state_dict())
    evaluation = in_training(config, dataset, average)
    (row,) = evaluation.look(5)
    assert row["protocol"]["weights"].keys() == {"ema_sha256", "vae_sha256"}
    assert row["work"]["decoder_tflops"] > 0
