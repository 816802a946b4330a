"""References: every published form, what is refused, and how ours is made."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_sweep import make_images, make_sweep_inputs, sweep_config

from lgm_scale.errors import ConfigError, DataError, LGMError, MissingAssetError
from lgm_scale.evaluation.commands import preflight, reference
from lgm_scale.evaluation.engine.statistics import statistics_of
from lgm_scale.evaluation.features.inception import SPATIAL_DIM
from lgm_scale.evaluation.images import NpzImages, open_source
from lgm_scale.evaluation.references.files import Reference, load_reference, save_reference
from lgm_scale.evaluation.sweep.config import METRIC_KEYS
from lgm_scale.evaluation.sweep.measure import measure


def statistics(dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=dim), np.diag(rng.uniform(0.5, 2, dim))


@pytest.fixture(scope="module")
def adm(tmp_path_factory) -> Path:
    """An npz as ADM's: statistics of many images, pixels of a few."""
    path = tmp_path_factory.mktemp("adm") / "VIRTUAL_small.npz"
    (mu, sigma), (mu_s, sigma_s) = statistics(2048), statistics(SPATIAL_DIM, 1)
    images = np.random.default_rng(2).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    np.savez(path, arr_0=images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    return path


def test_adm_statistics_are_read_with_hash_and_resolution(adm):
    found = load_reference(adm)
    assert np.array_equal(found.statistics["inception_pool"].mean, statistics(2048)[0])
    assert np.array_equal(
        found.statistics["inception_spatial"].covariance, statistics(SPATIAL_DIM, 1)[1]
    )
    assert found.image_size == 16
    assert len(found.description["sha256"]) == 64
    assert found.name == "VIRTUAL_small (ADM)"


@pytest.mark.parametrize("keys", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
def test_mean_and_covariance_are_read_by_their_usual_names(tmp_path, keys):
    mu, sigma = statistics(2048)
    np.savez(tmp_path / "s.npz", **{keys[0]: mu.astype("f4"), keys[1]: sigma.astype("f4")})
    found = load_reference(tmp_path / "s.npz").statistics["inception_pool"]
    assert found.mean.dtype == found.covariance.dtype == np.float64
    np.testing.assert_allclose(found.mean, mu, rtol=1e-6)


def test_edm2_statistics_are_read_without_executing_anything(tmp_path):
    fid, dino = statistics(2048), statistics(1024, 3)
    values: dict[str, Any] = {
        "fid": {"mu": fid[0], "sigma": fid[1]}, "num_images": 50000,
        "fd_dinov2": {"mu": dino[0], "sigma": dino[1]},
    }  # fmt: skip
    (tmp_path / "img.pkl").write_bytes(pickle.dumps(values))
    found = load_reference(tmp_path / "img.pkl")
    assert set(found.statistics) == {"inception_pool", "dinov2"}
    assert np.array_equal(found.statistics["dinov2"].mean, dino[0])


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("where", ["top", "inside"])
def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path, where):
    trap = Trap(tmp_path / "sprung")
    values = trap if where == "top" else {"fid": {"mu": np.zeros(2048), "sigma": trap}}
    (tmp_path / "img.pkl").write_bytes(pickle.dumps(values))
    with pytest.raises(DataError, match=r"it asks for .*which is not executed"):
        load_reference(tmp_path / "img.pkl")
    assert not (tmp_path / "sprung").exists()


def test_an_npz_of_objects_is_refused(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.array([Trap(tmp_path / "sprung")], dtype=object), sigma=0)
    with pytest.raises(DataError, match="cannot be read as npz"):
        load_reference(tmp_path / "s.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mu, sigma: (mu[:64], sigma[:64, :64]), "64 dimensions, not 2048"),
        (lambda mu, sigma: (mu, sigma[:, :9]), "do not fit"),
        (lambda mu, sigma: (mu * np.nan, sigma), "not finite"),
        (lambda mu, sigma: (mu, sigma + np.eye(2048, k=1)), "not symmetric"),
        (lambda mu, sigma: (mu, -sigma), "negative variances"),
    ],
)
def test_numbers_that_cannot_be_statistics_are_refused(tmp_path, change, message):
    mu, sigma = change(*statistics(2048))
    np.savez(tmp_path / "s.npz", mu=mu, sigma=sigma)
    with pytest.raises(DataError, match=message):
        load_reference(tmp_path / "s.npz")


@pytest.mark.parametrize("name", ["gone.npz", "folder", "text.txt", "broken.npz", "broken.pkl"])
def test_files_that_are_no_reference_are_refused_by_name(tmp_path, name):
    (tmp_path / "folder").mkdir()
    for text in ("text.txt", "broken.npz", "broken.pkl", "broken.safetensors"):
        (tmp_path / text).write_text("no statistics")
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load_reference(tmp_path / name)


def test_ours_is_written_and_read_whole(tmp_path):
    rows = np.random.default_rng(0).normal(size=(9, 4))
    made = Reference(
        "mine", {"dinov2": statistics_of(rows)}, {"inception_pool": rows.astype("f4")}, 16,
        {"dinov2": "ab" * 32}, {"crop": "none"},
    )  # fmt: skip
    save_reference(tmp_path / "r.safetensors", made)
    found = load_reference(tmp_path / "r.safetensors")
    assert np.array_equal(
        found.statistics["dinov2"].covariance, made.statistics["dinov2"].covariance
    )
    assert np.array_equal(found.features["inception_pool"], made.features["inception_pool"])
    assert (found.name, found.image_size, found.weights) == ("mine", 16, made.weights)
    assert found.statistics["dinov2"].count == 9
    assert found.description["crop"] == "none"


# --- images -----------------------------------------------------------------------------------


def test_a_folder_an_npz_and_shards_give_the_same_images(tmp_path):
    make_images(tmp_path, per_class=2)
    folder, identity = open_source(tmp_path / "photos", 16)
    shards, _ = open_source(tmp_path / "mds", None)
    pixels, _ = folder.read(range(6))
    assert identity["image_size"] == 16
    assert len(shards) == len(folder) == 6
    stored = shards.read([4, 1])[0].double()  # as JPEG: nearly the same
    assert (stored - pixels[[4, 1]]).abs().mean() < 12
    assert (stored - pixels[[1, 4]]).abs().mean() > 50
    np.savez(tmp_path / "s.npz", labels=np.zeros(2), arr_0=pixels.permute(0, 2, 3, 1).numpy())
    assert torch.equal(NpzImages(tmp_path / "s.npz").read([5, 0])[0], pixels[[5, 0]])


def test_a_compressed_npz_and_a_folder_without_a_size_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "s.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="is compressed"):
        NpzImages(tmp_path / "s.npz")
    with pytest.raises(ConfigError, match="--image-size: missing"):
        open_source(tmp_path, None)


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["reference", *map(str, arguments)])
    assert reference.main() == 0


@pytest.mark.slow
def test_images_are_put_through_the_networks_for_what_is_missing(
    tmp_path, monkeypatch, adm, inception_file, capsys
):
    """ADM's own statistics stay; its few images give features alone."""
    out = tmp_path / "r.safetensors"
    run(monkeypatch, adm, "--out", out, "--inception", inception_file, "--keep-features", 4)
    found = load_reference(out)
    assert np.array_equal(found.statistics["inception_pool"].mean, statistics(2048)[0])
    assert found.features["inception_pool"].shape == (4, 2048)
    assert found.weights.keys() == {"inception"}
    assert "4 vectors of inception_pool" in capsys.readouterr().out
    assert not Path(f"{out}.work").exists()


def test_statistics_alone_are_converted_without_a_network(tmp_path, monkeypatch):
    mu, sigma = statistics(2048)
    np.savez(tmp_path / "s.npz", mu=mu, sigma=sigma)
    run(monkeypatch, tmp_path / "s.npz", "--out", tmp_path / "r.safetensors")
    assert load_reference(tmp_path / "r.safetensors").statistics.keys() == {"inception_pool"}


def test_images_without_a_network_and_wrong_options_are_refused(tmp_path, monkeypatch):
    make_images(tmp_path, per_class=1)
    with pytest.raises(ConfigError, match="--inception: missing, and so is --dinov2"):
        run(monkeypatch, tmp_path / "mds", "--out", tmp_path / "r.safetensors")
    with pytest.raises(ConfigError) as caught:
        run(monkeypatch, tmp_path / "mds", "--out", "r.npz", "--inception", "gone",
            "--chunk-size", 0)  # fmt: skip
    assert [text.split(":")[0] for text in caught.value.problems] == [
        "--out", "--chunk-size", "--inception",
    ]  # fmt: skip


# --- with a sweep -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_sweep_inputs(tmp_path_factory.mktemp("sweep"))


@pytest.mark.slow
def test_a_reference_of_another_resolution_or_network_is_refused(made, tmp_path, inception_file):
    rows = np.random.default_rng(0).normal(size=(9, 4))
    cases = {
        "images of 24 pixels, the bundle makes 16": Reference(
            "r", {"dinov2": statistics_of(rows)}, {}, 24
        ),
        "4 dimensions of inception_pool, the features here 2048": Reference(
            "r", {"inception_pool": statistics_of(rows)}, {}, 16
        ),
        "other inception weights": Reference(
            "r", {"dinov2": statistics_of(rows)}, {}, 16, {"inception": "ab" * 32}
        ),
    }
    for message, bad in cases.items():
        save_reference(tmp_path / "r.safetensors", bad)
        config = sweep_config(
            made, tmp_path / "out", reference=str(tmp_path / "r.safetensors"),
            inception=str(inception_file), metrics=["fid"],
        )  # fmt: skip
        with pytest.raises(DataError, match=message):
            measure(config)


def test_a_missing_statistic_disables_its_metric_with_one_line(made, tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(9, 4))
    save_reference(
        tmp_path / "r.safetensors",
        Reference("mine", {"pixel_pca": statistics_of(rows)}),
    )
    results = measure(
        sweep_config(
            made,
            tmp_path / "out",
            reference=str(tmp_path / "r.safetensors"),
            cells=[{"num_tokens": 4}],
            metrics=list(METRIC_KEYS),
        )
    )
    assert results is not None
    assert set(results["rows"][0]["metrics"]) == {"pixel_frechet"}
    assert set(results["reconstructions"][0]["metrics"]) == {
        "psnr_db", "ssim", "rpixel_frechet_val", "rpixel_frechet_reference",
    }  # fmt: skip
    assert "against mine" in results["reconstructions"][0]["names"]["rpixel_frechet_reference"]
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("FID is off: `inception` is not given") for line in printed) == 1
    assert sum(line.startswith("KID is off") for line in printed) == 1


# --- preflight --------------------------------------------------------------------------------


def test_preflight_lists_every_file_with_state_hash_and_use(
    made, tmp_path, adm, inception_file, monkeypatch, capsys
):
    text, bad = preflight.report(
        {"inception": str(inception_file), "reference": str(adm), "images": str(made / "mds"),
         "vgg16": str(tmp_path / "gone.pth")}
    )  # fmt: skip
    assert bad == ["inception", "vgg16"]
    lines = text.splitlines()
    states = dict(line.split(maxsplit=1) for line in lines if not line.startswith(" "))
    assert states == {"inception": "wrong", "dinov2": "not given", "vgg16": "missing",
                      "reference": "there", "images": "there"}  # fmt: skip
    assert "not the published weights" in text
    assert "statistics of inception_spatial" in text
    assert "15 images of 16 pixels" in text
    assert "sha256 begins with 6726825d (torch-fidelity, in its name)" in text
    assert text.count("unlocks") == text.count("https://") + 1 == 5
    for name in ("inception", "dinov2_l", "vgg16"):
        assert f"    get      python -m lgm_scale.assets --fetch {name}" in lines
    monkeypatch.setattr("sys.argv", ["preflight", "--strict"])
    assert preflight.main() == 0  # nothing is given: nothing is wrong
    path = tmp_path / "s.yaml"
    path.write_text(f"vgg16: {tmp_path / 'gone.pth'}\n")
    monkeypatch.setattr("sys.argv", ["preflight", str(path), "--strict"])
    with pytest.raises(MissingAssetError, match="vgg16"):
        preflight.main()
    assert f"looked for at {tmp_path / 'gone.pth'}" in capsys.readouterr().out


# --- DINOv2 -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov2_file(tmp_path_factory) -> Path:
    """DINOv2 ViT-S with random weights, under the names of its authors' file."""
    import timm

    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0)
    state = {name: torch.randn_like(value) * 0.05 for name, value in vit.state_dict().items()}
    state["mask_token"] = torch.zeros(1, 384)  # is in the file, and not used
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vits14_pretrain.pth"
    torch.save(state, path)
    return path


@pytest.mark.slow
def test_dinov2_features_are_the_class_token_of_antialiased_images(dinov2_file):
    import torch.nn.functional as F

    from lgm_scale.evaluation.features.dinov2 import DINOv2Features, resample_positions
    from lgm_scale.evaluation.metrics.catalogue import metric_name

    space = DINOv2Features(dinov2_file)
    images = torch.randint(0, 256, (5, 3, 40, 40), dtype=torch.uint8)
    found = space(images)["dinov2"]
    assert found.shape == (5, 384)
    assert space.outputs == {"dinov2": 384}
    pixels = F.interpolate(
        images.float(), (224, 224), mode="bicubic", antialias=True, align_corners=False
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406],
                                                          [0.229, 0.224, 0.225]))  # fmt: skip
    with torch.inference_mode():
        tokens = space.net.forward_features((pixels / 255 - mean) / std)
    np.testing.assert_allclose(found, tokens[:, 0].numpy(), atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    alone = space(images[4:])["dinov2"]
    assert np.array_equal(found[4:], alone), "an image depends on its batch"
    table = torch.randn(1, 1 + 37 * 37, 8)
    assert resample_positions(table, 37) is table
    small = resample_positions(table, 16)
    assert small.shape == (1, 1 + 256, 8)
    assert torch.equal(small[:, 0], table[:, 0])
    flat = resample_positions(torch.ones(1, 1 + 37 * 37, 2), 16)
    torch.testing.assert_close(flat, torch.ones(1, 257, 2))
    assert "FD-DINOv2" not in metric_name("fd_dinov2", 50_000, space.describe())
    large = space.describe() | {"network": "DINOv2 ViT (large), class token"}
    assert metric_name("fd_dinov2", 50_000, large) == "FD-DINOv2-50K"


def test_a_file_that_is_no_dinov2_is_refused(tmp_path):
    from lgm_scale.evaluation.features.dinov2 import DINOv2Features

    for state in ({"pos_embed": torch.zeros(1, 5, 7)}, {"pos_embed": torch.zeros(1, 257, 384)}):
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(LGMError, match=r"weights\.pth"):
            DINOv2Features(tmp_path / "weights.pth")


def test_a_metric_is_called_by_its_published_name_only_where_it_is_that_metric():
    from lgm_scale.evaluation.metrics.catalogue import metric_name

    published = {"weights_sha256": "6726825d" + "0" * 56}
    other = {"weights_sha256": "ab" * 32}
    assert metric_name("fid", 50_000, published, "g") == "gFID-50K"
    assert metric_name("fid", 10_000, published, "g") == "gFID-10K"
    assert metric_name("fid", 272, published, "r") == "rFID-272"
    assert metric_name("fid", 49_999, published) == "FID-49999"
    unknown = metric_name("fid", 50_000, other, "g")
    assert "not FID" in unknown
    assert "abababab" in unknown
    assert "gFID" not in unknown


def test_images_of_a_folder_are_cropped_as_adm_does(tmp_path):
    Image.new("RGB", (40, 30), (9, 8, 7)).save(tmp_path / "a.png")
    source, identity = open_source(tmp_path, 16)
    pixels, _ = source.read([0])
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels[0, :, 5, 5].tolist() == [9, 8, 7]
    assert "centre crop" in identity["crop"]
