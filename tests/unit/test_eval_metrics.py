"""Metrics of image pairs, and Inception's features, against other implementations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from random_weights import torchmetrics_lpips
from safetensors.torch import save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lgm_scale.errors import CheckpointError
from lgm_scale.evaluation.features.extraction import FeatureSpace
from lgm_scale.evaluation.features.inception import InceptionFeatures
from lgm_scale.evaluation.metrics.image_metrics import PerceptualDistance, ssim
from lgm_scale.pixels import psnr


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


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
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(ssim(*tensors(a, b)), expected, atol=1e-9)


def test_ssim_of_equal_images_is_one_and_of_constant_ones_is_known():
    a, _ = smooth_pairs(2, 16)
    np.testing.assert_allclose(ssim(*tensors(a, a)), 1, atol=1e-12)
    dark, light = (np.full((1, 3, 9, 9), level, np.uint8) for level in (51, 102))
    expected = (2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4)
    assert ssim(*tensors(dark, light)) == pytest.approx(expected)


def test_psnr_is_that_of_scikit_image():
    a, b = smooth_pairs(4, 32)
    expected = [peak_signal_noise_ratio(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(*tensors(a, b)), expected, rtol=1e-6)


@pytest.mark.slow
def test_lpips_is_that_of_torchmetrics_on_rounded_pixels(vgg16_file):
    path, theirs = vgg16_file, torchmetrics_lpips()
    a, b = smooth_pairs(3, 32)
    with torch.no_grad():
        pair = [torch.from_numpy(images).float() / 127.5 - 1 for images in (a, b)]
        expected = theirs(*pair).flatten()
    found = PerceptualDistance(path, "cpu")(*tensors(a, b))
    assert found.dtype == np.float64
    assert expected.max() > 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_vgg16_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "vgg.safetensors"
    save_file({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="does not fit the network"):
        PerceptualDistance(path, "cpu")


# --- Inception --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def extractor(inception_file) -> InceptionFeatures:
    return InceptionFeatures(inception_file)


@pytest.mark.slow
def test_inception_features_are_those_of_torch_fidelity(inception_file, extractor):
    from torch_fidelity.utils import create_feature_extractor

    space: FeatureSpace = extractor
    images = torch.from_numpy(smooth_pairs(4, 32)[0])
    theirs = create_feature_extractor(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        cuda=False,
        feature_extractor_weights_path=str(inception_file),
    )
    with torch.inference_mode():
        pool, logits = theirs(images)
    found = space(images)
    assert {name: values.shape[1] for name, values in found.items()} == space.outputs
    assert np.array_equal(found["inception_pool"], pool.numpy())
    assert np.array_equal(found["inception_logits"], logits.numpy())
    assert np.abs(found["inception_pool"][0] - found["inception_pool"][2]).max() > 1e-3
    assert space(images[:0])["inception_pool"].shape == (0, 2048)
    described = json.loads(json.dumps(space.describe()))
    assert len(described["weights_sha256"]) == 64


@pytest.mark.slow
def test_features_of_an_image_are_the_same_bits_in_every_batch(extractor):
    images = torch.from_numpy(smooth_pairs(9, 32)[0])
    whole, alone = extractor(images), [extractor(images[i : i + 1]) for i in (0, 4, 8)]
    for name, values in whole.items():
        assert np.array_equal(values[[0, 4, 8]], np.concatenate([each[name] for each in alone]))


def test_spatial_features_are_laid_out_rows_first_channels_last(extractor):
    """ADM flattens (y, x, channel). The other order gives numbers of the right size, and wrong."""
    seen: list[torch.Tensor] = []
    hook = extractor.net.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    found = extractor(torch.from_numpy(smooth_pairs(1, 32)[0]))["inception_spatial"]
    hook.remove()
    middle = seen[0][0].numpy()  # [192, 17, 17]
    assert found.shape == (1, 17 * 17 * 7)
    for y, x, channel in ((0, 0, 0), (0, 1, 0), (1, 0, 6), (16, 16, 3), (5, 11, 2)):
        assert found[0, (y * 17 + x) * 7 + channel] == middle[channel, y, x]
    assert not np.array_equal(found[0], middle[:7].reshape(-1))


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
