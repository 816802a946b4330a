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
from PIL import Image
from skimage.metrics import structural_similarity
from small_pipeline import SmallPipeline, run_command
from typed_commands import refusal

from lgm_scale.errors import ConfigError, DataError, LGMError, MissingAssetError
from lgm_scale.evaluation.commands import reconstruct
from lgm_scale.evaluation.engine.stages import Engine
from lgm_scale.evaluation.engine.statistics import FeatureStatistics, statistics_of
from lgm_scale.evaluation.features.spaces import Spaces
from lgm_scale.evaluation.images import StoredImages, ValidationImages
from lgm_scale.evaluation.metrics.image_metrics import PerceptualDistance
from lgm_scale.evaluation.metrics.scores import frechet_distance
from lgm_scale.evaluation.reconstructions import images as image_work
from lgm_scale.evaluation.reconstructions import plans
from lgm_scale.evaluation.reconstructions.images import decode_at, encode
from lgm_scale.evaluation.reconstructions.plans import ReconstructionPlans
from lgm_scale.families.tokenizer.bundle import load_tokenizer, save_tokenizer_bundle
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import build_tokenizer
from lgm_scale.merging.tree import MergeTree
from lgm_scale.pixels import psnr, to_uint8


def arguments(pipeline: SmallPipeline, out: Path, *more: object) -> list[str]:
    return [
        *("--bundle", str(pipeline.tokenizer)),
        *("--images", str(pipeline.images)),
        *("--out", str(out)),
        *("--batch-size", "16", "--chunk-size", "20"),
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
    assert [row["num_tokens"] for row in results["rows"]] == [4, 8, 16]
    assert all(set(row["metrics"]) == {"psnr_db", "ssim"} for row in results["rows"])
    off = results["off"]
    for name, parts in {
        "lpips": ("LPIPS is off", "vgg16", "commands.preflight"),
        "rfid_val": ("rFID is off", "inception", "commands.preflight"),
    }.items():
        assert all(part in off[name] for part in parts)
        assert "\n" not in off[name]
    printed = capsys.readouterr()
    assert all(line in printed.out for line in off.values())
    with Image.open(tmp_path / "out" / "reconstruction.png") as image:
        assert min(image.size) > 200


class MeanColours:
    """A feature space of three dimensions, in place of Inception's pool features."""

    outputs = {"inception_pool": 3}  # noqa: RUF012

    def __call__(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        return {"inception_pool": images.float().mean((2, 3)).numpy()}

    def describe(self) -> dict:
        return {"space": "inception", "weights_sha256": "colours"}


@pytest.fixture(scope="module")
def reconstructor(small_pipeline) -> ReconstructionPlans:
    images = ValidationImages(small_pipeline.images, 32)
    return ReconstructionPlans(
        tokenizer=load_tokenizer(small_pipeline.tokenizer),
        tree=MergeTree.load(small_pipeline.tokenizer / "merge_tree.safetensors"),
        files={},
        images=images,
        device=torch.device("cpu"),
        spaces=Spaces([MeanColours()], images),
        perceptual=None,
        reference=None,
        chunk_size=20,
        batch_size=16,
        metrics=("fid",),
    )


def pairs(plans: ReconstructionPlans, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All originals and their reconstructions, without chunks."""
    assert plans.images is not None
    images, _ = plans.images.read(range(68))
    z = encode(plans.tokenizer, images)
    made = decode_at(plans.tokenizer, plans.tree, z, num_tokens, 68)
    return images, to_uint8(made)


def test_the_distance_is_from_the_originals_to_their_reconstructions(reconstructor, tmp_path):
    engine = Engine(tmp_path, torch.device("cpu"), quiet=True)
    rows, savings = reconstruct.measure(reconstructor, engine, [6], [])
    sides = [MeanColours()(x)["inception_pool"] for x in pairs(reconstructor, 6)]
    expected = frechet_distance(*(statistics_of(x) for x in sides))
    assert expected > 1
    assert rows[0]["metrics"]["rfid_val"] == pytest.approx(expected, rel=1e-5)
    assert "against validation images" in rows[0]["names"]["rfid_val"]
    assert savings == []


def test_reconstructions_that_are_not_finite_are_named(reconstructor, monkeypatch, tmp_path):
    real = image_work.finite_images
    seen: list[int] = []

    def broken(pixels):
        seen.append(len(pixels))
        finite = real(pixels)
        if sum(seen) == 36:  # the second chunk's first batch: images 20 to 35
            finite[1] = False
        return finite

    monkeypatch.setattr(image_work, "finite_images", broken)
    engine = Engine(tmp_path, torch.device("cpu"), quiet=True)
    with pytest.raises(DataError, match=r"reconstructions at K = 8: 1 of 20 .*: \[21\]"):
        reconstruct.measure(reconstructor, engine, [8], [])


def test_latents_are_kept_for_the_next_length_up_to_a_bound(small_pipeline, tmp_path, monkeypatch):
    encoded = []
    real = image_work.encode
    monkeypatch.setattr(image_work, "encode", lambda *args: encoded.append(0) or real(*args))
    options = ("--lengths", 4, 8)
    free = measured(monkeypatch, small_pipeline, tmp_path / "free", *options)
    assert len(encoded) == 7  # the batches of 68 images in chunks of 20; once for both lengths
    encoded.clear()
    latents = 16 * 8 * 4  # bytes of an image
    monkeypatch.setattr(image_work, "LATENTS_KEPT", 20 * latents)
    bound = measured(monkeypatch, small_pipeline, tmp_path / "bound", *options)
    assert len(encoded) == 7 + 5  # two batches fit
    assert [row["metrics"] for row in bound["rows"]] == [row["metrics"] for row in free["rows"]]


def test_an_interrupted_measurement_goes_on(small_pipeline, tmp_path, monkeypatch):
    first = measured(monkeypatch, small_pipeline, tmp_path / "out", "--lengths", 8)
    (folder,) = (tmp_path / "out" / "chunks").glob("reconstructions*")
    (folder / "00000020-00000040.safetensors").unlink()
    (row,) = (tmp_path / "out" / "rows").glob("*.json")
    row.unlink()
    calls = []
    real = image_work.decode_at

    def counted(*args):
        calls.append(args[-1])
        return real(*args)

    monkeypatch.setattr(image_work, "decode_at", counted)
    again = measured(monkeypatch, small_pipeline, tmp_path / "out", "--lengths", 8)
    assert calls == [16, 4]
    assert again["rows"][0]["metrics"] == first["rows"][0]["metrics"]


@pytest.mark.slow
def test_numbers_are_those_of_the_reconstructions(
    small_pipeline, tmp_path, monkeypatch, vgg16_file, reconstructor
):
    results = measured(
        monkeypatch, small_pipeline, tmp_path / "out", "--lengths", 6, "--vgg16", vgg16_file
    )
    originals, reconstructed = pairs(reconstructor, 6)
    images, made = originals.numpy(), reconstructed.numpy()
    (row,) = results["rows"]
    metrics, protocol = row["metrics"], row["protocol"]
    similar = [
        structural_similarity(x, y, channel_axis=0) for x, y in zip(images, made, strict=True)
    ]
    assert row["num_tokens"] == 6
    assert metrics["psnr_db"] == pytest.approx(
        float(psnr(originals, reconstructed).mean()), rel=1e-12
    )
    assert metrics["ssim"] == pytest.approx(np.mean(similar), abs=1e-6)
    assert metrics["lpips"] == pytest.approx(
        PerceptualDistance(vgg16_file, "cpu")(originals, reconstructed).mean(), rel=1e-4
    )
    assert row["num_identical"] == 0
    assert protocol["num_images"] == len(images)
    assert "rounded pixels" in row["names"]["lpips"]
    assert len(protocol["lpips"]) == 64
    assert set(protocol["weights"]) == {"tokenizer.safetensors", "merge_tree.safetensors"}
    hashes = b"".join(hashlib.sha256(image.tobytes()).digest() for image in images)
    assert protocol["images_sha256"] == hashlib.sha256(hashes).hexdigest()


def test_a_target_says_what_choosing_k_per_image_saves(
    small_pipeline, tmp_path, monkeypatch, capsys
):
    options = ("--lengths", 4, 8, "--target-psnr", 0.01, 100)
    results = measured(monkeypatch, small_pipeline, tmp_path / "out", *options)
    assert [row["num_tokens"] for row in results["rows"]] == [4, 8, 16]  # N is always measured
    easy, hard = results["adaptive"]
    assert (easy["reached"], easy["mean_tokens"]) == (1.0, 4.0)
    assert (hard["reached"], hard["mean_tokens"]) == (0.0, 16.0)
    assert easy["mean_psnr"] == pytest.approx(results["rows"][0]["metrics"]["psnr_db"])
    assert "target 0.01 dB, reached by 100.0%: mean K 4.0" in capsys.readouterr().out


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
    assert "merge_tree.safetensors" not in results["rows"][0]["protocol"]["weights"]


def test_stored_images_are_those_of_the_data_set(small_pipeline):
    stored = StoredImages(str(small_pipeline.images), 32)
    assert len(stored) == 68
    images, labels = stored.read([5, 67])
    assert images.shape == (2, 3, 32, 32)
    assert torch.equal(images[1], stored.dataset[67]["images"])
    assert labels.tolist() == [1, 16]


def few_images(pipeline: SmallPipeline, folder: Path) -> Path:
    """Four images: Inception takes a sixth of a second for each."""
    from lgm_scale.data.preparation.convert import convert_folder

    images, _ = StoredImages(str(pipeline.images), 32).read(range(4))
    for index, image in enumerate(images.numpy()):
        (folder / "photos" / "thing").mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image.transpose(1, 2, 0))
        picture.save(folder / "photos" / "thing" / f"{index}.png")
    convert_folder(folder / "photos", folder / "mds", 32)
    return folder / "mds"


def _of_few_features(statistics: FeatureStatistics) -> FeatureStatistics:
    mean, covariance = statistics.mean[:64], statistics.covariance[:64, :64]
    return FeatureStatistics(mean, covariance, statistics.count)


def take_distances_of_few_features() -> None:
    """Eigenvalues of 2,048 take five seconds."""
    real = plans.frechet_distance
    plans.frechet_distance = lambda a, b, name: real(*map(_of_few_features, (a, b)), name)


@pytest.mark.slow
@pytest.mark.system
def test_two_ranks_give_the_same_bits(
    small_pipeline, tmp_path, monkeypatch, vgg16_file, inception_file
):
    few = few_images(small_pipeline, tmp_path)
    options = ["--images", few, "--batch-size", 1, "--lengths", 8]
    options += ["--vgg16", vgg16_file, "--inception", inception_file]
    both = arguments(small_pipeline, tmp_path / "both", *options)
    done = run_command(
        "eval/reconstruct.py", *both, ranks=2, prepare=take_distances_of_few_features
    )
    monkeypatch.setattr(plans, "frechet_distance", plans.frechet_distance)  # goes back to it
    take_distances_of_few_features()
    alone = measured(monkeypatch, small_pipeline, tmp_path / "alone", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads((tmp_path / "both" / "reconstruction.json").read_text())
    assert shared["run"]["ranks"] == 2
    (here,), (there,) = shared["rows"], alone["rows"]
    assert (here["metrics"], here["protocol"]) == (there["metrics"], there["protocol"])
    assert here["num_tokens"] == 8
    assert "not FID" in here["names"]["rfid_val"]
    assert "rank deficient" in here["names"]["rfid_val"]
    assert here["metrics"]["rfid_val"] > 0
    assert math.isfinite(here["metrics"]["rfid_val"])
    assert shared["off"] == {}


# --- refusals ---------------------------------------------------------------------------------


def refused(monkeypatch, pipeline: SmallPipeline, out: Path, *more: object) -> LGMError:
    monkeypatch.setattr("sys.argv", ["reconstruct", *arguments(pipeline, out, *more)])
    with pytest.raises(LGMError) as caught:
        reconstruct.main()
    return caught.value


def test_every_problem_of_the_command_line_is_told_at_once(small_pipeline, tmp_path, monkeypatch):
    error = refused(
        monkeypatch, small_pipeline, tmp_path / "o", "--lengths", 3, 8, 8, 17, "--batch-size", 0,
        "--fashion-mnist",
    )  # fmt: skip
    assert isinstance(error, ConfigError)
    assert [problem.split(" ")[0] for problem in error.problems] == [
        "--lengths:",
        "--lengths:",
        "--batch-size:",
        "--fashion-mnist:",
    ]
    assert "[3, 17] outside [4, 16]" in error.problems[0]
    assert "[8] occur more than once" in error.problems[1]
    assert not (tmp_path / "o").exists()


def test_images_of_another_size_are_refused(small_pipeline, tmp_path, monkeypatch):
    from lgm_scale.data.preparation.convert import convert_folder

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


def test_a_damaged_weights_file_ends_with_status_two(small_pipeline, tmp_path):
    (tmp_path / "weights.pth").write_text("<html>not found</html>")
    given = arguments(small_pipeline, tmp_path / "out", "--inception", tmp_path / "weights.pth")
    assert "weights.pth cannot be read as weights" in refusal(reconstruct.main, *given)
