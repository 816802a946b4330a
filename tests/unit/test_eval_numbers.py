"""The arithmetic of the evaluation: moments, features, PSNR, losses, the sweep's rules."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from eval.cells import Cells

from eval.features import PixelPCA, images_hash
from eval.generate import decode_to_uint8, refuse_broken
from eval.image_metrics import psnr
from eval.moments import Moments, frechet_distance, moments_of
from eval.training_loss import loss_per_length
from lgm_scale.errors import DataError


def random_images(count: int, side: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8)


# --- moments ----------------------------------------------------------------------------------


def test_the_distance_of_two_gaussians_with_common_axes_is_known():
    """|m_a - m_b|^2 + sum (sqrt(a) - sqrt(b))^2 in any rotated basis."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    a, b = rng.uniform(0.1, 5, 12), rng.uniform(0.1, 5, 12)
    mean_a, mean_b = rng.normal(size=12), rng.normal(size=12)
    expected = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    found = frechet_distance(
        Moments(mean_a, basis * a @ basis.T, 10), Moments(mean_b, basis * b @ basis.T, 10)
    )
    assert found == pytest.approx(expected, abs=1e-9)


def test_the_distance_of_two_general_gaussians_in_the_plane_is_known():
    """In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), M = A B."""
    a, b = np.array([[2.0, 0.3], [0.3, 1.0]]), np.array([[0.5, -0.2], [-0.2, 3.0]])
    product = a @ b
    overlap = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = np.trace(a) + np.trace(b) - 2 * overlap
    zero = np.zeros(2)
    assert frechet_distance(Moments(zero, a, 9), Moments(zero, b, 9)) == pytest.approx(
        expected, abs=1e-9
    )


def test_the_distance_is_symmetric_and_zero_to_itself():
    rng = np.random.default_rng(1)
    a, b = (moments_of(rng.normal(size=(200, 6)) * scale) for scale in (1.0, 1.5))
    assert frechet_distance(a, a) < 1e-9
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-9)
    assert frechet_distance(a, b) > 0.1


def test_moments_are_those_of_numpy():
    features = np.random.default_rng(2).normal(size=(50, 5))
    found = moments_of(features)
    np.testing.assert_allclose(found.mean, features.mean(0), atol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(features.T), atol=1e-13)


def test_moments_refuse_one_vector_and_name_broken_ones():
    with pytest.raises(DataError, match="1 feature vectors"):
        moments_of(np.zeros((1, 3)))
    features = np.zeros((5, 3))
    features[3, 1] = np.nan
    with pytest.raises(DataError, match=r"\[3\]"):
        moments_of(features)


# --- features ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "side"), [(40, 8), (40, 2)])  # fewer images than pixels, more
def test_components_are_those_of_a_singular_value_decomposition(count, side):
    images = random_images(count, side)
    pca = PixelPCA.fit(images, 6)
    pixels = images.reshape(count, -1) / 255.0
    _, scale, rows = np.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
    np.testing.assert_allclose(pca.components @ pca.components.T, np.eye(6), atol=1e-9)
    np.testing.assert_allclose(np.abs(pca.components @ rows[:6].T), np.eye(6), atol=1e-9)
    np.testing.assert_allclose(pca.variances, scale[:6] ** 2 / (count - 1), rtol=1e-9)
    assert pca.explained == pytest.approx((scale[:6] ** 2).sum() / (scale**2).sum())


def test_signs_are_fixed():
    pca = PixelPCA.fit(random_images(30), 5)
    largest = np.abs(pca.components).argmax(axis=1)
    assert (pca.components[np.arange(5), largest] > 0).all()


def test_features_of_an_image_do_not_depend_on_its_batch():
    images = random_images(30)
    pca = PixelPCA.fit(images, 5)
    alone = np.concatenate([pca(images[i : i + 1]) for i in range(30)])
    assert np.array_equal(pca(images), alone)
    np.testing.assert_allclose(pca(images).mean(0), 0, atol=1e-12)


def test_images_that_span_too_little_are_refused():
    images = np.repeat(random_images(3), 10, axis=0)
    with pytest.raises(DataError, match="span only 2 dimensions"):
        PixelPCA.fit(images, 5)
    with pytest.raises(DataError, match="span only 0 dimensions"):
        PixelPCA.fit(np.full((9, 3, 4, 4), 7, np.uint8), 5)


def test_the_feature_space_says_what_it_is():
    pca = PixelPCA.fit(random_images(30), 5)
    assert pca.key == "pixel_pca_frechet"
    assert pca.label.endswith("(not FID)")
    described = json.loads(json.dumps(pca.describe()))
    assert described["num_components"] == 5
    assert described["fitted_to"] == images_hash(random_images(30))
    assert images_hash(random_images(30)) != images_hash(random_images(30, seed=1))


# --- pixels -----------------------------------------------------------------------------------


def test_pixels_are_rounded_and_clipped():
    pixels = torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0, 7.0]).reshape(1, 1, 1, 6)
    levels, finite = decode_to_uint8(pixels)
    assert levels.ravel().tolist() == [0, 0, 128, 255, 255, 255]
    assert finite.tolist() == [True]


def test_images_that_are_not_finite_are_named():
    pixels = torch.zeros(4, 3, 2, 2)
    pixels[1, 0, 0, 0], pixels[3, 2, 1, 1] = math.nan, math.inf
    _, finite = decode_to_uint8(pixels)
    with pytest.raises(DataError, match=r"K = 8: images \[1, 3\] of 4 are not finite"):
        refuse_broken(finite, "samples at K = 8")


def test_psnr_is_per_image_and_finite():
    a = random_images(3)
    b = a.copy()
    b[1] = np.where(a[1] < 128, a[1] + 10, a[1] - 10)
    found = psnr(a, b)
    assert found[1] == pytest.approx(20 * math.log10(255 / 10))
    one_level = 10 * math.log10(255**2 * 3 * 8 * 8)  # a single value off by one
    assert found[0] == found[2] == pytest.approx(one_level)


# --- training loss ----------------------------------------------------------------------------


def write_log(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_losses_are_summarised_for_each_length_by_itself(tmp_path):
    rows = [
        {"step": s, "num_tokens": 8 if s % 2 else 32, "loss": float(s), "lr": 1} for s in range(120)
    ]
    found = loss_per_length(write_log(tmp_path / "m.jsonl", rows))
    assert list(found) == [8, 32]
    assert found[8]["steps"] == 60
    assert found[8]["first20"] == pytest.approx(np.arange(1, 40, 2).mean())
    assert found[8]["last20"] == pytest.approx(np.arange(81, 120, 2).mean())
    assert found[8]["ratio"] == pytest.approx(found[8]["last20"] / found[8]["first20"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ('{"step": 1, "loss": 2}', "line 2"),
        ('{"step": 1, "num_tokens": 8, "loss": NaN}', "loss of step 1 is nan"),
    ],
)
def test_a_log_that_is_none_is_refused(tmp_path, line, message):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0, "num_tokens": 8, "loss": 1.0}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        loss_per_length(path)


# --- cells ------------------------------------------------------------------------------------


def test_a_cell_counts_only_under_its_own_protocol(tmp_path):
    cells = Cells(tmp_path / "cells")
    images = {"images": random_images(2)}
    assert cells.find("a", {"seed": 0}) is None
    cells.save("a", {"seed": 0}, {"distance": 1.5}, images)
    assert cells.find("a", {"seed": 0}) == {"distance": 1.5}
    assert cells.find("a", {"seed": 1}) is None
    assert np.array_equal(cells.images("a")["images"], images["images"])
    cells.save("a", {"seed": 1}, {"distance": 2.5}, images)
    assert cells.find("a", {"seed": 0}) is None
    assert cells.find("a", {"seed": 1}) == {"distance": 2.5}
    (tmp_path / "cells" / "a.json").write_text("{")
    assert cells.find("a", {"seed": 1}) is None


def test_a_number_that_is_not_finite_is_never_kept(tmp_path):
    cells = Cells(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        cells.save("a", {}, {"distance": math.nan}, {"images": random_images(1)})
    assert cells.find("a", {}) is None
