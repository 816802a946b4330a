"""The sweep on a tiny random generator: resuming, independence, parts, refusals."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from small_pipeline import ROOT, run_command
from small_sweep import (
    CLASSES,
    make_bundles,
    make_images,
    make_sweep_inputs,
    numbers_of,
    results_of,
    sweep_config,
    sweep_file,
)

from lgm_scale.errors import CheckpointError, ConfigError, DataError
from lgm_scale.evaluation.sweep import samples as generate
from lgm_scale.evaluation.sweep.config import METRIC_KEYS, SweepConfig, expand, with_lists
from lgm_scale.evaluation.sweep.measure import measure
from lgm_scale.evaluation.sweep.rules import load_sweep
from lgm_scale.families.tokenizer.bundle import TOKENIZER_NAME


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder with bundles, validation images and a metrics log."""
    return make_sweep_inputs(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="session")
def swept(made, tmp_path_factory) -> Path:
    """The `out` folder of a finished sweep, not to be changed."""
    out = tmp_path_factory.mktemp("swept") / "report"
    measure(sweep_config(made, out))
    return out


@pytest.fixture
def copied(swept, tmp_path) -> Path:
    return Path(shutil.copytree(swept, tmp_path / "report"))


@pytest.fixture
def sampled(monkeypatch) -> list[tuple[int, int]]:
    """(K, image index) of every image that is sampled from now on."""
    images: list[tuple[int, int]] = []
    real = generate.sample_images

    def spy(pipe, indices, num_tokens, *rest):
        images.extend((num_tokens, index) for index in indices.tolist())
        return real(pipe, indices, num_tokens, *rest)

    monkeypatch.setattr(generate, "sample_images", spy)
    return images


# --- results ----------------------------------------------------------------------------------


def test_every_cell_has_its_row_with_the_whole_protocol(swept):
    results = results_of(swept)
    rows = results["rows"]
    assert [row["cell"]["num_tokens"] for row in rows] == [4, 9, 16]
    work = [row["work"]["tflops_per_image"] for row in rows]
    assert work == sorted(work)
    for row in rows:
        protocol = row["protocol"]
        assert protocol["cell"] == row["cell"]
        assert {
            *("cell", "seed", "noise_scale", "weights", "features", "reference", "metrics"),
            *("num_images", "labels", "pixels", "precision", "lgm_scale"),
        } <= set(protocol)
        assert protocol["num_images"] == 11
        assert len(protocol["reference"]["images_sha256"]) == 64
        # of t = 0, 0.09, 0.29 the last is guided
        assert (row["work"]["rows"], row["work"]["rows_if_always_guided"]) == (4, 6)
        assert (row["work"]["steps"], row["work"]["guided_evaluations"]) == (3, 1)
        assert "(not FID), 11 images" in row["names"]["pixel_frechet"]
        assert set(row["run"]["seconds"]) == {"sampling", "decoding", "features"}
    assert set(results["training_loss"]) == {"4", "16"}
    assert results["training_loss"]["4"]["steps"] == 30
    assert [row["num_tokens"] for row in results["reconstructions"]] == [4, 9, 16]
    assert set(results["reconstructions"][0]["metrics"]) == {
        "psnr_db", "ssim", "rpixel_frechet_val",
    }  # fmt: skip


def test_the_distance_is_that_of_the_samples_themselves(made, tmp_path):
    """Once more without chunks, sums or rows."""
    import torch

    from lgm_scale.evaluation.engine.statistics import statistics_of
    from lgm_scale.evaluation.features.pixel_pca import PixelPCA
    from lgm_scale.evaluation.images import StoredImages
    from lgm_scale.evaluation.metrics.scores import frechet_distance
    from lgm_scale.families.lgm.pipeline import LGMPipeline

    config = sweep_config(made, tmp_path / "report", cells=[{"num_tokens": 9}])
    results = measure(config)
    assert results is not None
    originals, _ = StoredImages(str(made / "mds"), 16).read(range(15))
    pca = PixelPCA.fit(originals.numpy(), 4)
    pipe = LGMPipeline.from_bundle(made / "dit", "cpu")
    settings = expand(config)[0].sampler.settings()
    images = pipe([i % 3 for i in range(11)], 9, seed=0, progress_bar=False, **settings)
    sides = [torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2), originals]
    expected = frechet_distance(*(statistics_of(pca(side)["pixel_pca"]) for side in sides))
    assert expected > 1
    assert results["rows"][0]["metrics"]["pixel_frechet"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_numbers_are_the_same_bits_at_every_batch_size(made, swept, tmp_path, batch_size):
    out = tmp_path / "report"
    measure(sweep_config(made, out, batch_size=batch_size))
    assert numbers_of(out) == numbers_of(swept)
    for path in sorted((swept / "rows").glob("samples*.safetensors")):
        here, there = load_file(out / "rows" / path.name), load_file(path)
        assert here["images"].shape == (11, 3, 16, 16)
        assert np.abs(here["images"][0].astype(int) - here["images"][1]).max() > 20
        assert np.array_equal(here["images"], there["images"])


def test_the_chunk_size_changes_nothing_but_rounding(made, swept, tmp_path):
    out = tmp_path / "report"
    measure(sweep_config(made, out, chunk_size=5))
    for name, metrics in numbers_of(swept).items():
        assert numbers_of(out)[name] == pytest.approx(metrics, rel=1e-9)


# --- resuming ---------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again(made, copied, sampled):
    before = results_of(copied)
    measure(sweep_config(made, copied))
    assert sampled == []
    assert results_of(copied)["rows"] == before["rows"]


def test_a_lost_row_is_made_from_its_chunks(made, swept, copied, sampled):
    (row,) = (copied / "rows").glob("samples-k0009*.json")
    row.unlink()
    measure(sweep_config(made, copied))
    assert sampled == []
    assert numbers_of(copied) == numbers_of(swept)


@pytest.mark.parametrize("damage", ["lost", "cut", "changed", "foreign"])
def test_a_lost_or_damaged_chunk_alone_is_done_again(made, swept, copied, sampled, damage):
    (folder,) = (copied / "chunks").glob("samples-k0009*")
    path = folder / "00000004-00000008.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "lost":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        data[-5] ^= 1
        path.write_bytes(data)
    else:
        (other,) = (copied / "chunks").glob("samples-k0004*")
        shutil.copyfile(other / path.name, path)
    (row,) = (copied / "rows").glob("samples-k0009*.json")
    row.unlink()
    measure(sweep_config(made, copied))
    assert sampled == [(9, i) for i in range(4, 8)]
    assert numbers_of(copied) == numbers_of(swept)


@pytest.mark.parametrize(
    "change",
    [{"sampler": {"cfg_scale": 2.0}}, {"seed": 1}, {"sampler": {"num_steps": 5}},
     {"num_components": 3}, {"sampler": {"timestep_shift": 0.5}}, {"quantise": "truncate"},
     {"sampler": {"cfg_interval": [0.0, 0.5]}}, {"sampler": {"cfg_rescale": "none"}},
     {"sampler": {"solver": "heun"}}, {"sampler": {"uncond_num_tokens": 4}}],
)  # fmt: skip
def test_another_protocol_is_done_again(made, swept, copied, sampled, change):
    measure(sweep_config(made, copied, **change))
    assert {k for k, _ in sampled} == {4, 9, 16}
    mine = {key: value for key, value in numbers_of(copied).items() if "samples" in key}
    assert not mine.keys() & numbers_of(swept).keys()


def test_more_cells_and_more_images_keep_what_is_there(made, copied, sampled):
    cells = [{"num_tokens": [4, 6, 9]}]
    measure(sweep_config(made, copied, cells=cells, num_images=14))
    # the last chunk of eleven was short; full chunks are kept
    assert [i for k, i in sampled if k == 4] == list(range(8, 14))
    assert [i for k, i in sampled if k == 6] == list(range(14))
    assert len(results_of(copied)["rows"]) == 3


def test_features_can_be_given_up_when_numbers_are_there(made, swept, tmp_path, sampled):
    out = tmp_path / "report"
    measure(sweep_config(made, out, keep_features=False))
    assert not list((out / "chunks").glob("samples*"))
    assert numbers_of(out) == numbers_of(swept)
    sampled.clear()
    for changes in ({}, {"part": "0/2"}):
        measure(sweep_config(made, out, keep_features=False, **changes))
    assert sampled == [], "numbers that are there need no images"


# --- parts ------------------------------------------------------------------------------------


def test_parts_and_a_reduction_give_what_one_run_gives(made, swept, tmp_path, sampled):
    out = tmp_path / "report"
    for index in (2, 0):
        assert measure(sweep_config(made, out, part=f"{index}/3")) is None
    assert not (out / "results.json").exists()
    with pytest.raises(
        DataError, match=r"chunks \(\d+ images\) are missing, of .*without --reduce"
    ):
        measure(sweep_config(made, out), reduce_only=True)
    measure(sweep_config(made, out, part="1/3"))
    assert sorted(sampled) == [(k, i) for k in (4, 9, 16) for i in range(11)]
    sampled.clear()
    for _ in range(2):  # a reduction changes nothing, however often
        measure(sweep_config(made, out), reduce_only=True)
        assert numbers_of(out) == numbers_of(swept)
    assert sampled == []


def test_a_part_that_is_done_makes_nothing(made, tmp_path, sampled):
    out = tmp_path / "report"
    measure(sweep_config(made, out, part="0/2"))
    first = list(sampled)
    assert len(first) > 0
    measure(sweep_config(made, out, part="0/2"))
    assert sampled == first


def test_a_part_is_not_reduced(made, tmp_path, monkeypatch):
    from lgm_scale.evaluation.commands import sweep

    path = sweep_file(made, tmp_path / "report")
    monkeypatch.setattr("sys.argv", ["sweep", str(path), "part=0/2", "--reduce"])
    with pytest.raises(ConfigError, match="part: 0/2 and --reduce exclude each other"):
        sweep.main()


# --- the door to ADM's evaluator --------------------------------------------------------------


def test_samples_can_be_kept_as_an_npz_in_the_order_of_the_images(made, swept, tmp_path):
    out = tmp_path / "report"
    results = measure(sweep_config(made, out, save_npz=True, cells=[{"num_tokens": 9}]))
    assert results is not None
    with np.load(results["rows"][0]["npz"]) as file:
        images = file["arr_0"]
    assert images.shape == (11, 16, 16, 3)
    assert images.dtype == np.uint8
    (path,) = (swept / "rows").glob("samples-k0009*.safetensors")
    assert np.array_equal(images.transpose(0, 3, 1, 2), load_file(path)["images"])


# --- refusals ---------------------------------------------------------------------------------


def problems_of(made: Path, tmp_path: Path, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        sweep_config(made, tmp_path / "report", **changes)
    return caught.value.problems


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "nowhere"}, "bundle: nowhere is no bundle"),
        ({"images": "nowhere"}, "images: nowhere does not exist"),
        ({"metrics_log": "nowhere"}, "metrics_log: nowhere is not a file"),
        ({"inception": "nowhere.pth"}, r"inception: nowhere\.pth is not a file; .*--fetch inc"),
        ({"reference": "nowhere.npz"}, r"reference: nowhere\.npz is not a file"),
        ({"cells": [{"num_tokens": [3, 4, 17]}]}, r"cells: lengths \[3, 17\] outside \[4, 16\]"),
        ({"cells": [{"num_tokens": [4, 4]}]}, r"cells: K = 4, w = 1.5, 4 points occurs 2 times"),
        ({"cells": [{"num_tokens": 4}, {"num_tokens": 4, "cfg_scale": 1.5}]}, "cells: K = 4, .* 2"),
        ({"cells": []}, "cells: is empty"),
        ({"num_images": 1, "num_components": 1}, "num_images: 1 have no covariance"),
        ({"num_images": 4}, "num_images: 4 images cannot fill 4 dimensions"),
        ({"num_components": 15, "num_images": 99}, "num_components: 15 components"),
        ({"num_components": 0}, "inception: nothing can be measured"),
        ({"batch_size": 0}, "batch_size: 0 must be"),
        ({"chunk_size": 0}, "chunk_size: 0 must be"),
        ({"part": "3/3"}, "part: '3/3' is not i/n"),
        ({"part": "first"}, "part: 'first' is not i/n"),
        ({"sampler": {"num_steps": 1}}, "cells: num_steps: 1"),
        ({"sampler": {"cfg_scale": 0.5}}, "cells: cfg_scale: 0.5"),
        ({"sampler": {"cfg_interval": [0.5, 0.2]}}, "cells: cfg_interval"),
        ({"sampler": {"timestep_shift": 0.0}}, "cells: timestep_shift"),
        ({"cells": [{"num_tokens": 16, "length_schedule": [[0, 4], [0.1, 8]]}]},
         "cells: length_schedule: it ends at 8"),
        ({"search": {"num_images": 99}, "metrics": list(METRIC_KEYS)},
         r"search\.num_images: 99 must be between 2 and"),
        ({"search": {"num_images": 5}}, r"search\.metric: fid is not among"),
        ({"num_image": 5}, "num_image: unknown key; did you mean 'num_images'"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused(made, tmp_path, change, message):
    problems = problems_of(made, tmp_path, **change)
    assert len(problems) == 1, problems
    assert re.match(message, problems[0]), problems[0]


def test_a_misspelt_setting_of_a_cell_is_refused_by_name(made, tmp_path):
    problems = problems_of(made, tmp_path, cells=[{"num_tokens": 4, "num_step": 5}])
    assert "cells.0.num_step: unknown key; did you mean 'num_steps'?" in problems


def test_every_problem_is_told_at_once(made, tmp_path):
    cells = [{"num_tokens": 99, "num_steps": 1}]
    problems = problems_of(made, tmp_path, cells=cells, images="gone", seed="x")
    told = {problem.split(":")[0] for problem in problems}
    assert told == {"cells", "images", "seed"}


def test_a_tokenizer_bundle_is_refused(made, tmp_path):
    (problem,) = problems_of(made, tmp_path, bundle=str(made / "tokenizer"))
    assert "is a tokenizer bundle; a generator or spatial_generator bundle is needed" in problem


def test_a_bundle_of_strangers_is_refused(made, tmp_path):
    import json

    bundle = Path(shutil.copytree(made / "dit", tmp_path / "dit"))
    info = json.loads((bundle / "bundle.json").read_text())
    info["models"]["tokenizer"]["latent_dim"] = 8
    info["classes"] = [*CLASSES, "fox"]
    (bundle / "bundle.json").write_text(json.dumps(info))
    problems = problems_of(made, tmp_path, bundle=str(bundle), images=None, num_components=0,
                           inception=str(bundle / "bundle.json"), metrics=["fid"])  # fmt: skip
    assert any("latent_dim 8 and a generator with latent_dim 4" in text for text in problems)
    assert any("names 4 classes and its generator has 3" in text for text in problems)


def test_a_tokenizer_that_was_put_into_the_bundle_later_is_refused(made, tmp_path):
    bundle = Path(shutil.copytree(made / "dit", tmp_path / "dit"))
    make_bundles(tmp_path / "other", {})
    data = bytearray((tmp_path / "other" / "tokenizer" / TOKENIZER_NAME).read_bytes())
    data[-1] ^= 1
    (bundle / TOKENIZER_NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match="differs from its hash"):
        measure(sweep_config(made, tmp_path / "report", bundle=str(bundle)))


def test_images_of_another_size_or_other_classes_are_refused(made, tmp_path):
    make_images(tmp_path / "large", side=24)
    (problem,) = problems_of(made, tmp_path, images=str(tmp_path / "large" / "mds"))
    assert "holds images of 24 pixels, the bundle makes 16" in problem
    make_images(tmp_path / "other", classes=("cat_one", "dog", "fox"))
    (problem,) = problems_of(made, tmp_path, images=str(tmp_path / "other" / "mds"))
    assert "['eel', 'fox']" in problem


def test_a_bundle_that_does_not_say_its_noise_is_refused(made, tmp_path):
    make_bundles(tmp_path, {})
    config = sweep_config(made, tmp_path / "report", bundle=str(tmp_path / "dit"))
    with pytest.raises(CheckpointError, match="noise_scale"):
        measure(config)


def test_a_method_that_the_bundle_cannot_do_is_refused_before_any_work(made, tmp_path, sampled):
    cells = [{"num_tokens": 4}, {"num_tokens": 16, "length_schedule": [[0, 4], [0.05, 16]]}]
    with pytest.raises(CheckpointError, match="no contrasts"):
        measure(sweep_config(made, tmp_path / "report", cells=cells))
    assert sampled == []


def test_samples_that_are_not_finite_are_counted_named_and_not_kept(made, tmp_path, monkeypatch):
    real = generate.sample_images

    def broken(pipe, indices, num_tokens, *rest):
        images, finite = real(pipe, indices, num_tokens, *rest)
        return images, finite & ((indices != 5) | (num_tokens != 9))

    monkeypatch.setattr(generate, "sample_images", broken)
    out = tmp_path / "report"
    with pytest.raises(DataError, match=r"K = 9, .*: 1 of 4 images are not finite .*: \[5\]"):
        measure(sweep_config(made, out))
    (folder,) = (out / "chunks").glob("samples-k0009*")
    assert [path.name for path in folder.glob("*.safetensors")] == ["00000000-00000004.safetensors"]
    assert not (out / "results.json").exists()


# --- configuration ----------------------------------------------------------------------------


def test_a_value_stands_for_a_list_of_one_and_lists_multiply(made, tmp_path):
    cells = [
        {"num_tokens": [8, 16], "cfg_scale": [1.5, 2.0], "cfg_interval": [[0, 1], [0.15, 1]]},
        {"num_tokens": 16, "length_schedule": [[0, 8], [0.3, 16]], "cfg_interval": [0.2, 0.9]},
    ]
    config = sweep_config(made, tmp_path / "r", cells=cells, sampler={"num_steps": 25})
    found = expand(config)
    assert len(found) == 2 * 2 * 2 + 1
    assert {cell.sampler.num_steps for cell in found} == {25}
    assert found[0].sampler.cfg_interval == (0.0, 1.0)
    assert found[-1].sampler.length_schedule == ((0.0, 8), (0.3, 16))
    assert found[-1].sampler.cfg_interval == (0.2, 0.9)
    assert "grows 0:8 0.3:16" in found[-1].label
    raw = with_lists({"cells": [{"num_tokens": 4, "length_schedule": []}]})
    assert raw["cells"] == [{"num_tokens": [4], "length_schedule": [[]]}]


@pytest.mark.parametrize("name", ["quickstart/sweep.yaml", "demo/sweep.yaml", "eval_sweep.yaml"])
def test_the_sweeps_that_come_along_are_well_formed(name):
    text = (ROOT / "yamls" / name).read_text()
    assert all(word in text for word in ("Command", "Hardware", "Time", "Result", f"yamls/{name}"))
    values = yaml.safe_load(text)
    assert set(values) <= set(SweepConfig.__dataclass_fields__)
    with pytest.raises(ConfigError) as caught:  # its files are not here: no other problem
        load_sweep(str(ROOT / "yamls" / name), ["bundle=gone", "images=gone", "metrics_log=null"])
    told = {problem.split(":")[0] for problem in caught.value.problems}
    assert told <= {"bundle", "images", "inception", "dinov2", "vgg16", "reference"}


# --- the command ------------------------------------------------------------------------------


def test_a_user_error_ends_with_status_two_and_no_traceback(made, tmp_path):
    path = sweep_file(made, tmp_path / "report")
    done = run_command("eval/sweep.py", path, "batch_size=0", "bundle=gone")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 2 problems in")
    assert "Traceback" not in done.stderr


def test_a_dry_run_shows_the_work_and_makes_nothing(made, tmp_path):
    done = run_command("eval/sweep.py", sweep_file(made, tmp_path / "report"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "TFLOPs per image" in done.stdout
    assert "K = 9, w = 1.5, 4 points" in done.stdout
    assert not (tmp_path / "report").exists()
