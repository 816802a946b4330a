"""The reconstruction command: what it measures, what it refuses, and that ranks do not matter."""

from __future__ import annotations

import hashlib
import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from eval.reconstruction_metrics import Measurement, rfid_label
from eval.reconstructor import Reconstructor, StoredImages, load_images
from PIL import Image
from skimage.metrics import structural_similarity
from small_pipeline import SmallPipeline, assert_user_error, run_command

from eval import reconstruct
from eval.image_metrics import PerceptualDistance, psnr
from eval.moments import frechet_distance, moments_of
from eval.reconstruct import switched_off
from lgm_scale.bundle import build_tokenizer, load_tokenizer, save_tokenizer_bundle
from lgm_scale.config import TokenizerModelConfig
from lgm_scale.errors import ConfigError, DataError, LGMError, MissingAssetError
from lgm_scale.merging import MergeTree


def arguments(pipeline: SmallPipeline, out: Path, *more: object) -> list[str]:
    return [
        *("--bundle", str(pipeline.tokenizer)),
        *("--images", str(pipeline.images)),
        *("--out", str(out)),
        *("--batch-size", "16"),
        *map(str, more),
    ]


def measured(monkeypatch, pipeline: SmallPipeline, out: Path, *more: object) -> dict:
    monkeypatch.setattr("sys.argv", ["reconstruct", *arguments(pipeline, out, *more)])
    assert reconstruct.main() == 0
    return json.loads((out / "reconstruction.json").read_text())


def test_without_files_two_metrics_are_off_and_say_why(
    small_pipeline, tmp_path, monkeypatch, capsys
):
    results = measured(monkeypatch, small_pipeline, tmp_path / "out")
    assert set(results["protocol"]["metrics"]) == {"psnr_db", "ssim"}
    assert [row["num_tokens"] for row in results["rows"]] == [4, 8, 16]
    assert all("lpips" not in row and "rfid_val" not in row for row in results["rows"])
    off = results["protocol"]["off"]
    for name, parts in {
        "lpips": ("LPIPS is off", "--vgg16", "https://download.pytorch.org/models/vgg16-"),
        "rfid_val": ("rFID is off", "--inception", "weights-inception-2015-12-05-6726825d.pth"),
    }.items():
        assert all(part in off[name] for part in parts)
        assert "\n" not in off[name]
    printed = capsys.readouterr()
    assert all(line in printed.out + printed.err for line in off.values())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "reconstruction.json",
        "reconstruction.png",
    }
    with Image.open(tmp_path / "out" / "reconstruction.png") as image:
        assert min(image.size) > 200


@pytest.fixture(scope="module")
def reconstructor(small_pipeline) -> Reconstructor:
    tokenizer = load_tokenizer(small_pipeline.tokenizer)
    images, _ = load_images(str(small_pipeline.images), 32)
    tree = MergeTree.load(small_pipeline.tokenizer / "merge_tree.safetensors")
    return Reconstructor(tokenizer, tree, images, 16)


class MeanColours:
    """A feature space of three dimensions."""

    key, label = "colours", "Frechet distance of mean colours"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images.mean(axis=(2, 3)).round(2)

    def describe(self) -> dict:
        return {}


def test_the_distance_is_from_the_originals_to_their_reconstructions(reconstructor):
    chunks: list[int] = []
    measurement = Measurement(reconstructor, None, MeanColours(), chunks.append)
    pixels_hash, reference = measurement.originals()
    row = measurement.at(6, reference)
    images = np.asarray(reconstructor.images[:])
    sides = [MeanColours()(x) for x in (images, reconstructor(6))]
    expected = frechet_distance(*(moments_of(x) for x in sides))
    assert expected > 1
    assert row["rfid_val"] == pytest.approx(expected, rel=1e-5)
    assert sum(chunks) == 2 * len(images)
    hashes = b"".join(hashlib.sha256(image.tobytes()).digest() for image in images)
    assert pixels_hash == hashlib.sha256(hashes).hexdigest()


def test_reconstructions_that_are_not_finite_are_named(reconstructor, monkeypatch):
    real = Reconstructor.chunk

    def broken(self, num_tokens, start, stop):
        images, finite = real(self, num_tokens, start, stop)
        return images, finite & (np.arange(start, stop) != 21)

    monkeypatch.setattr(Reconstructor, "chunk", broken)
    with pytest.raises(DataError, match=r"reconstructions at K = 8: images \[21\] of 68"):
        Measurement(reconstructor, None, None, lambda _: None).at(8, None)


def test_numbers_are_those_of_the_reconstructions(
    small_pipeline, tmp_path, monkeypatch, vgg16_file, reconstructor
):
    results = measured(
        monkeypatch, small_pipeline, tmp_path / "out", "--lengths", 6, "--vgg16", vgg16_file
    )
    images, made = np.asarray(reconstructor.images[:]), reconstructor(6)
    (row,) = results["rows"]
    similar = [
        structural_similarity(x, y, channel_axis=0) for x, y in zip(images, made, strict=True)
    ]
    assert row["num_tokens"] == 6
    assert row["psnr_db"] == pytest.approx(psnr(images, made).mean(), rel=1e-12)
    assert row["ssim"] == pytest.approx(np.mean(similar), abs=1e-6)
    assert row["lpips"] == pytest.approx(
        PerceptualDistance(vgg16_file, "cpu")(images, made).mean(), rel=1e-4
    )
    assert row["num_identical"] == 0
    protocol = results["protocol"]
    assert protocol["num_images"] == len(images)
    assert "rounded pixels" in protocol["metrics"]["lpips"]["label"]
    assert len(protocol["metrics"]["lpips"]["weights_sha256"]) == 64
    assert set(protocol["bundle_files"]) == {"tokenizer.safetensors", "merge_tree.safetensors"}


def test_a_target_says_what_choosing_k_per_image_saves(
    small_pipeline, tmp_path, monkeypatch, capsys
):
    options = ("--lengths", 4, 8, "--target-psnr", -100, 100)
    results = measured(monkeypatch, small_pipeline, tmp_path / "out", *options)
    assert [row["num_tokens"] for row in results["rows"]] == [4, 8, 16]  # N is always measured
    easy, hard = results["adaptive"]
    assert (easy["reached"], easy["mean_tokens"]) == (1.0, 4.0)
    assert (hard["reached"], hard["mean_tokens"]) == (0.0, 16.0)
    assert easy["mean_psnr"] == pytest.approx(results["rows"][0]["psnr_db"])
    assert "target -100.00 dB, reached by 100.0%: mean K 4.0" in capsys.readouterr().out


@pytest.mark.parametrize("control", ["truncate", "tome", "none"])
def test_length_controls_without_a_tree_are_measured_too(
    small_pipeline, tmp_path, monkeypatch, control
):
    config = TokenizerModelConfig(
        size="tiny",
        image_size=32,
        patch_size=8,
        num_base_tokens=16,
        latent_dim=8,
        codebook_size=32,
        length_control=control,
    )
    torch.manual_seed(1)
    net = build_tokenizer(config)
    save_tokenizer_bundle(tmp_path / "bundle", config, net.state_dict(), None, {})
    pipeline = types.SimpleNamespace(tokenizer=tmp_path / "bundle", images=small_pipeline.images)
    results = measured(monkeypatch, pipeline, tmp_path / "out")  # type: ignore[arg-type]
    lengths = [row["num_tokens"] for row in results["rows"]]
    assert lengths == {"truncate": [1, 2, 4, 8, 16], "tome": [4, 8, 16], "none": [16]}[control]
    assert "merge_tree.safetensors" not in results["protocol"]["bundle_files"]


def test_stored_images_are_those_of_the_data_set(small_pipeline):
    images, _ = load_images(str(small_pipeline.images), 32)
    stored = StoredImages(str(small_pipeline.images), 32)
    assert len(stored) == len(images)
    assert np.array_equal(stored[5:9], images[5:9])
    assert stored[5:9] is stored[5:9]  # read once


def few_images(pipeline: SmallPipeline, folder: Path) -> Path:
    """Four images: Inception takes a sixth of a second for each."""
    from data_tools.images_to_mds import convert_folder

    images, _ = load_images(str(pipeline.images), 32)
    for index, image in enumerate(images[:4]):
        (folder / "photos" / "thing").mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image.transpose(1, 2, 0))
        picture.save(folder / "photos" / "thing" / f"{index}.png")
    convert_folder(folder / "photos", folder / "mds", 32)
    return folder / "mds"


@pytest.mark.slow
@pytest.mark.system
def test_two_ranks_give_the_same_bits(
    small_pipeline, tmp_path, monkeypatch, vgg16_file, inception_file
):
    few = few_images(small_pipeline, tmp_path)
    options = ["--images", few, "--batch-size", 1, "--lengths", 8]
    options += ["--vgg16", vgg16_file, "--inception", inception_file]
    alone = measured(monkeypatch, small_pipeline, tmp_path / "alone", *options)
    done = run_command(
        "eval/reconstruct.py", *arguments(small_pipeline, tmp_path / "both", *options), ranks=2
    )
    assert done.returncode == 0, done.stderr[-3000:]
    both = json.loads((tmp_path / "both" / "reconstruction.json").read_text())
    assert both["run"]["ranks"] == 2
    assert both["rows"] == alone["rows"]
    assert both["protocol"] == alone["protocol"]
    assert [row["num_tokens"] for row in both["rows"]] == [8]
    metric = both["protocol"]["metrics"]["rfid_val"]
    assert metric["label"].startswith("rFID on 4 images (")
    assert len(metric["features"]["weights_sha256"]) == 64
    assert all(row["rfid_val"] > 0 and math.isfinite(row["rfid_val"]) for row in both["rows"])
    assert both["protocol"]["off"] == {}


def test_the_label_says_the_count_and_that_the_rank_is_short():
    assert rfid_label(50000, 2048) == "rFID on 50000 images"
    assert rfid_label(544, 2048).startswith("rFID on 544 images (")
    assert "rank deficient" in rfid_label(544, 2048)
    assert "rank deficient" in rfid_label(2048, 2048)  # the mean takes one


# --- refusals ---------------------------------------------------------------------------------


def refused(monkeypatch, pipeline: SmallPipeline, out: Path, *more: object) -> LGMError:
    monkeypatch.setattr("sys.argv", ["reconstruct", *arguments(pipeline, out, *more)])
    with pytest.raises(LGMError) as caught:
        reconstruct.main()
    return caught.value


def test_every_problem_of_the_command_line_is_told_at_once(small_pipeline, tmp_path, monkeypatch):
    error = refused(
        monkeypatch, small_pipeline, tmp_path / "o", "--lengths", 3, 8, 8, 17, "--batch-size", 0
    )
    assert isinstance(error, ConfigError)
    assert [problem.split(" ")[0] for problem in error.problems] == [
        "--lengths:",
        "--lengths:",
        "--batch-size:",
    ]
    assert "[3, 17] outside [4, 16]" in error.problems[0]
    assert "[8] occur more than once" in error.problems[1]
    assert not (tmp_path / "o").exists()


def test_images_of_another_size_are_refused(small_pipeline, tmp_path, monkeypatch):
    from data_tools.images_to_mds import convert_folder

    (tmp_path / "photos" / "thing").mkdir(parents=True)
    Image.new("RGB", (24, 24)).save(tmp_path / "photos" / "thing" / "0.png")
    convert_folder(tmp_path / "photos", tmp_path / "mds", 24)
    (tmp_path / "weights").touch()
    error = refused(
        monkeypatch, small_pipeline, tmp_path / "o",
        "--images", tmp_path / "mds", "--inception", tmp_path / "weights",
    )  # fmt: skip
    assert isinstance(error, ConfigError)
    assert "holds images of 24 pixels, the bundle makes 32" in error.problems[0]
    assert "rFID needs 2 or more" in error.problems[1]


def test_a_folder_that_is_no_bundle_is_refused(small_pipeline, tmp_path, monkeypatch):
    error = refused(monkeypatch, small_pipeline, tmp_path / "o", "--bundle", tmp_path)
    assert "is no bundle" in str(error)


def test_a_file_in_place_of_the_folder_is_refused(small_pipeline, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert "--out:" in str(refused(monkeypatch, small_pipeline, tmp_path / "file"))


@pytest.mark.parametrize("option", ["--vgg16", "--inception"])
def test_a_given_path_that_is_no_file_is_refused(small_pipeline, tmp_path, monkeypatch, option):
    error = refused(monkeypatch, small_pipeline, tmp_path / "o", option, tmp_path / "gone.pth")
    assert isinstance(error, MissingAssetError)
    assert f"{option}: {tmp_path / 'gone.pth'} is not a file" in str(error)
    assert "https://" in str(error)


def test_files_that_are_there_switch_their_metrics_on(tmp_path):
    (tmp_path / "file").touch()
    path = str(tmp_path / "file")
    assert set(switched_off(None, None)) == {"lpips", "rfid_val"}
    assert set(switched_off(path, None)) == {"rfid_val"}
    assert set(switched_off(None, path)) == {"lpips"}
    assert switched_off(path, path) == {}


@pytest.mark.system
def test_a_damaged_weights_file_ends_with_status_two(small_pipeline, tmp_path):
    (tmp_path / "weights.pth").write_text("<html>not found</html>")
    done = run_command(
        "-m", "eval.reconstruct",
        *arguments(small_pipeline, tmp_path / "out", "--inception", tmp_path / "weights.pth"),
    )  # fmt: skip
    assert_user_error(done, "weights.pth cannot be read as weights")
