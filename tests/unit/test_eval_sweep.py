"""The sweep on a tiny random generator: resuming, independence, parts, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_sweep import (
    make_bundles,
    numbers_of,
    results_of,
    sweep_config,
    sweep_file,
)
from typed_commands import typed

from lgm_scale.errors import CheckpointError, ConfigError, DataError
from lgm_scale.evaluation.commands import sweep
from lgm_scale.evaluation.sweep import samples as generate
from lgm_scale.evaluation.sweep.config import expand
from lgm_scale.evaluation.sweep.measure import measure
from lgm_scale.families.tokenizer.bundle import TOKENIZER_NAME


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
    measure(sweep_config(made, copied, cells=[{"num_tokens": 9}], **change))
    assert {k for k, _ in sampled} == {9}
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


@pytest.mark.slow
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


def test_a_tokenizer_that_was_put_into_the_bundle_later_is_refused(made, tmp_path):
    bundle = Path(shutil.copytree(made / "dit", tmp_path / "dit"))
    make_bundles(tmp_path / "other", {})
    data = bytearray((tmp_path / "other" / "tokenizer" / TOKENIZER_NAME).read_bytes())
    data[-1] ^= 1
    (bundle / TOKENIZER_NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match="differs from its hash"):
        measure(sweep_config(made, tmp_path / "report", bundle=str(bundle)))


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


# --- the command ------------------------------------------------------------------------------


def test_a_dry_run_shows_the_work_and_makes_nothing(made, tmp_path):
    said = typed(sweep.main, sweep_file(made, tmp_path / "report"), "--dry-run")
    assert said.status == 0, said.err
    assert "TFLOPs per image" in said.out
    assert "K = 9, w = 1.5, 4 points" in said.out
    assert not (tmp_path / "report").exists()
