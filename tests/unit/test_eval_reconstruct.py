"""Reconstruction metrics against other implementations, and the command that takes them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import save_random_inception, save_random_vgg16
from safetensors.torch import save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from small_pipeline import SmallPipeline, assert_user_error, run_command
from torch import nn

from eval import reconstruct
from eval.features import FeatureExtractor
from eval.image_metrics import PerceptualDistance, psnr, ssim
from eval.inception import InceptionFeatures
from eval.moments import frechet_distance, moments_of
from eval.reconstruct import switched_off
from eval.reconstruction_metrics import rfid_label
from eval.reconstructor import StoredImages, load_images
from lgm_scale.errors import CheckpointError, ConfigError, LGMError, MissingAssetError
from lgm_scale.models.frozen import LPIPS


def smooth_pairs(count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Images with structure, and the same with noise of several strengths."""
    rng = np.random.default_rng(3)
    waves = np.linspace(0, 9, side)
    base = 128 + 90 * np.sin(waves[:, None] + rng.uniform(0, 6, (count, 3, 1, 1))) * np.cos(waves)
    noise = rng.normal(size=base.shape) * np.linspace(1, 60, count)[:, None, None, None]
    a, b = (np.clip(x, 0, 255).round().astype(np.uint8) for x in (base, base + noise))
    return a, b


# --- metrics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [7, 32, 45])
def test_ssim_is_that_of_scikit_image(side):
    a, b = smooth_pairs(4, side)
    expected = [
        structural_similarity(x / 255, y / 255, channel_axis=0, data_range=1.0)
        for x, y in zip(a, b, strict=True)
    ]
    assert max(expected) - min(expected) > 0.1
    np.testing.assert_allclose(ssim(a, b), expected, atol=1e-9)


def test_ssim_of_equal_images_is_one_and_of_constant_ones_is_known():
    a, _ = smooth_pairs(2, 16)
    np.testing.assert_allclose(ssim(a, a), 1, atol=1e-12)
    dark, light = (np.full((1, 3, 9, 9), level, np.uint8) for level in (51, 102))
    expected = (2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4)
    assert ssim(dark, light) == pytest.approx(expected)


def test_psnr_is_that_of_scikit_image():
    a, b = smooth_pairs(4, 32)
    expected = [peak_signal_noise_ratio(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-6)


@pytest.fixture(scope="session")
def vgg16(tmp_path_factory) -> tuple[Path, nn.Module]:
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.pth"
    return path, save_random_vgg16(path)


def test_lpips_is_that_of_torchmetrics_on_rounded_pixels(vgg16):
    path, theirs = vgg16
    a, b = smooth_pairs(3, 32)
    with torch.no_grad():
        pair = [torch.from_numpy(images).float() / 127.5 - 1 for images in (a, b)]
        expected = theirs(*pair).flatten()
    found = PerceptualDistance(path, "cpu")(a, b)
    assert found.dtype == np.float64
    assert expected.max() > 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_vgg16_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "vgg.safetensors"
    save_file({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="does not fit the network"):
        PerceptualDistance(path, "cpu")
    assert len(LPIPS().features) == 30


# --- Inception --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def inception(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    save_random_inception(path)
    return path


@pytest.fixture(scope="session")
def extractor(inception) -> InceptionFeatures:
    return InceptionFeatures(inception)


def test_inception_features_are_those_of_torch_fidelity(inception, extractor):
    from torch_fidelity.utils import create_feature_extractor

    space: FeatureExtractor = extractor
    images, _ = smooth_pairs(3, 32)
    theirs = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=str(inception)
    )
    with torch.inference_mode():
        (expected,) = theirs(torch.from_numpy(images))
    found = space(images)
    assert found.dtype == np.float64
    assert found.shape == (3, 2048)
    assert np.array_equal(found, expected.double().numpy())
    assert np.abs(found[0] - found[2]).max() > 1e-3
    assert space(images[:0]).shape == (0, 2048)
    described = json.loads(json.dumps(space.describe()))
    assert len(described["weights_sha256"]) == 64
    assert "fid" not in (space.key + space.label).lower()


def test_the_distance_is_that_of_torch_fidelity(extractor):
    """Both lose digits where there are fewer images than features, hence the tolerance.

    Of 256 features: eigenvalues of 2048 take ten seconds.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    sides = [extractor(images)[:, :256] for images in smooth_pairs(6, 32)]
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in sides]
    expected = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    found = frechet_distance(*(moments_of(x) for x in sides))
    assert expected > 1e-3
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_inception_weights_that_are_none_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="does not fit inception-v3-compat"):
        InceptionFeatures(path)
    path.write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        InceptionFeatures(path)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_weights_file_executes_nothing(tmp_path):
    torch.save({"fc.weight": Trap(tmp_path / "sprung")}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        InceptionFeatures(tmp_path / "weights.pth")
    assert not (tmp_path / "sprung").exists()


def test_the_label_says_the_count_and_that_the_rank_is_short():
    assert rfid_label(50000, 2048) == "rFID on 50000 images"
    assert rfid_label(544, 2048).startswith("rFID on 544 images (")
    assert "rank deficient" in rfid_label(544, 2048)
    assert "rank deficient" in rfid_label(2048, 2048)  # the mean takes one


# --- the command ------------------------------------------------------------------------------


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


def test_numbers_are_those_of_the_reconstructions(small_pipeline, tmp_path, monkeypatch, vgg16):
    from eval.reconstructor import Reconstructor
    from lgm_scale.bundle import load_tokenizer
    from lgm_scale.merging import MergeTree

    results = measured(
        monkeypatch, small_pipeline, tmp_path / "out", "--lengths", 6, "--vgg16", vgg16[0]
    )
    tokenizer = load_tokenizer(small_pipeline.tokenizer)
    images, _ = load_images(str(small_pipeline.images), 32)
    tree = MergeTree.load(small_pipeline.tokenizer / "merge_tree.safetensors")
    made = Reconstructor(tokenizer, tree, images, 16)(6)
    (row,) = results["rows"]
    similar = [
        structural_similarity(x, y, channel_axis=0) for x, y in zip(images, made, strict=True)
    ]
    assert row["num_tokens"] == 6
    assert row["psnr_db"] == pytest.approx(psnr(images, made).mean(), rel=1e-12)
    assert row["ssim"] == pytest.approx(np.mean(similar), abs=1e-6)
    assert row["lpips"] == pytest.approx(
        PerceptualDistance(vgg16[0], "cpu")(images, made).mean(), rel=1e-4
    )
    assert row["num_identical"] == 0
    protocol = results["protocol"]
    assert protocol["num_images"] == len(images)
    assert "rounded pixels" in protocol["metrics"]["lpips"]["label"]
    assert len(protocol["metrics"]["lpips"]["weights_sha256"]) == 64
    assert set(protocol["bundle_files"]) == {"tokenizer.safetensors", "merge_tree.safetensors"}


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
def test_two_ranks_give_the_same_bits(small_pipeline, tmp_path, monkeypatch, vgg16, inception):
    few = few_images(small_pipeline, tmp_path)
    options = ["--images", few, "--batch-size", 1, "--lengths", 8]
    options += ["--vgg16", vgg16[0], "--inception", inception]
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
