"""The arithmetic of the evaluation: statistics, features, PSNR, losses, the sweep's rules."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lgm_scale.errors import DataError
from lgm_scale.evaluation.engine.rows import RowStore
from lgm_scale.evaluation.engine.statistics import FeatureStatistics, Sums, statistics_of
from lgm_scale.evaluation.features.extraction import refuse_broken
from lgm_scale.evaluation.features.pixel_pca import PixelPCA, images_hash
from lgm_scale.evaluation.metrics import scores as scores_module
from lgm_scale.evaluation.metrics.scores import frechet_distance, symmetric_distance
from lgm_scale.evaluation.sweep.results import loss_per_length
from lgm_scale.pixels import finite_images, psnr, to_uint8


def features_of(pca: PixelPCA, images: np.ndarray) -> np.ndarray:
    return pca(torch.from_numpy(images))["pixel_pca"]


def random_images(count: int, side: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8)


# --- statistics ----------------------------------------------------------------------------------


def test_the_distance_of_two_gaussians_with_common_axes_is_known():
    """|m_a - m_b|^2 + sum (sqrt(a) - sqrt(b))^2 in any rotated basis."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    a, b = rng.uniform(0.1, 5, 12), rng.uniform(0.1, 5, 12)
    mean_a, mean_b = rng.normal(size=12), rng.normal(size=12)
    expected = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    found = frechet_distance(
        FeatureStatistics(mean_a, basis * a @ basis.T, 10),
        FeatureStatistics(mean_b, basis * b @ basis.T, 10),
    )
    assert found == pytest.approx(expected, abs=1e-9)


def test_the_distance_of_two_general_gaussians_in_the_plane_is_known():
    """In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), M = A B."""
    a, b = np.array([[2.0, 0.3], [0.3, 1.0]]), np.array([[0.5, -0.2], [-0.2, 3.0]])
    product = a @ b
    overlap = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = np.trace(a) + np.trace(b) - 2 * overlap
    zero = np.zeros(2)
    found = frechet_distance(FeatureStatistics(zero, a, 9), FeatureStatistics(zero, b, 9))
    assert found == pytest.approx(expected, abs=1e-9)


def test_the_distance_is_symmetric_and_zero_to_itself():
    rng = np.random.default_rng(1)
    a, b = (statistics_of(rng.normal(size=(200, 6)) * scale) for scale in (1.0, 1.5))
    assert frechet_distance(a, a) < 1e-9
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-9)
    assert frechet_distance(a, b) > 0.1


def test_moments_are_those_of_numpy():
    features = np.random.default_rng(2).normal(size=(50, 5))
    found = statistics_of(features)
    np.testing.assert_allclose(found.mean, features.mean(0), atol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(features.T), atol=1e-13)


def test_moments_refuse_one_vector_and_name_broken_ones():
    with pytest.raises(DataError, match="1 feature vectors"):
        statistics_of(np.zeros((1, 3)))
    features = np.zeros((5, 3))
    features[3, 1] = np.nan
    with pytest.raises(DataError, match=r"\[3\]"):
        statistics_of(features)


def test_sums_of_parts_are_those_of_the_whole():
    """Also where the mean is far away: sums of squares would lose eight digits there."""
    features = np.random.default_rng(2).normal(size=(300, 5)) + 1e6
    parts = [Sums.of(features[start : start + 70].copy()) for start in range(0, 300, 70)]
    found, whole = Sums.joined(parts), statistics_of(features)
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(features.T), atol=1e-9)
    assert found.count == 300


def test_both_routes_agree_with_closed_forms_of_full_and_short_rank():
    rng = np.random.default_rng(4)
    a, b = rng.uniform(0.1, 5, 40), rng.uniform(0.1, 5, 40)
    a[:15] = 0  # short rank: Cholesky has no factor
    basis, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    zero = np.zeros(40)
    sides = [FeatureStatistics(zero, basis * values @ basis.T, 9) for values in (a, b)]
    expected = np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(*sides) == pytest.approx(expected, abs=1e-6)
    assert symmetric_distance(*sides) == pytest.approx(expected, abs=1e-6)


def test_a_difference_between_the_routes_is_reported(monkeypatch, caplog):
    rng = np.random.default_rng(1)
    a, b = (statistics_of(rng.normal(size=(200, 6)) * scale) for scale in (1.0, 1.5))
    frechet_distance(a, b, "FID")
    assert not caplog.records
    monkeypatch.setattr(scores_module, "symmetric_distance", lambda a, b: 7.0)
    frechet_distance(a, b, "FID")
    assert "FID: two routes to it differ" in caplog.text


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
    alone = np.concatenate([features_of(pca, images[i : i + 1]) for i in range(30)])
    assert np.array_equal(features_of(pca, images), alone)
    np.testing.assert_allclose(features_of(pca, images).mean(0), 0, atol=1e-12)


def test_images_that_span_too_little_are_refused():
    images = np.repeat(random_images(3), 10, axis=0)
    with pytest.raises(DataError, match="span only 2 dimensions"):
        PixelPCA.fit(images, 5)
    with pytest.raises(DataError, match="span only 0 dimensions"):
        PixelPCA.fit(np.full((9, 3, 4, 4), 7, np.uint8), 5)


def test_the_feature_space_says_what_it_is():
    pca = PixelPCA.fit(random_images(30), 5)
    assert pca.outputs == {"pixel_pca": 5}
    described = json.loads(json.dumps(pca.describe()))
    assert described["num_components"] == 5
    assert described["fitted_to"] == images_hash(random_images(30))
    assert images_hash(random_images(30)) != images_hash(random_images(30, seed=1))


# --- pixels -----------------------------------------------------------------------------------


def test_pixels_are_rounded_and_clipped():
    pixels = torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0, 7.0]).reshape(1, 1, 1, 6)
    assert to_uint8(pixels).flatten().tolist() == [0, 0, 128, 255, 255, 255]
    assert finite_images(pixels).tolist() == [True]


def test_truncation_is_half_a_level_darker_and_rounding_meets_every_level():
    levels = torch.arange(256)
    exact = (levels / 127.5 - 1).reshape(1, 1, 1, 256)
    assert to_uint8(exact).flatten().tolist() == levels.tolist()
    between = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shift = to_uint8(between, truncate=True).double() - to_uint8(between).double()
    assert set(shift.tolist()) == {-1.0, 0.0}
    assert shift.mean() == pytest.approx(-0.5, abs=0.02)
    just_below = torch.tensor([0.999]) * 2 - 1
    assert (int(to_uint8(just_below)), int(to_uint8(just_below, truncate=True))) == (255, 254)


def test_images_that_are_not_finite_are_named():
    pixels = torch.zeros(4, 3, 2, 2)
    pixels[1, 0, 0, 0], pixels[3, 2, 1, 1] = math.nan, math.inf
    finite = finite_images(pixels).numpy()
    with pytest.raises(DataError, match=r"K = 8: 2 of 4 images are not finite .*: \[101, 103\]"):
        refuse_broken(finite, "samples at K = 8", 100)


def test_psnr_is_per_image_and_finite():
    a = random_images(3)
    b = a.copy()
    b[1] = np.where(a[1] < 128, a[1] + 10, a[1] - 10)
    found = psnr(torch.from_numpy(a), torch.from_numpy(b))
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


# --- rows -------------------------------------------------------------------------------------


def test_a_row_counts_only_under_its_own_protocol(tmp_path):
    rows = RowStore(tmp_path / "rows")
    images = {"images": random_images(2)}
    assert rows.find("a", {"seed": 0}) is None
    saved = rows.save("a", {"seed": 0}, {"metrics": {"fid": 1.5}}, images)
    assert rows.find("a", {"seed": 0}) == saved
    assert saved["metrics"] == {"fid": 1.5}
    assert rows.find("a", {"seed": 1}) is None
    assert np.array_equal(rows.pictures(saved["key"])["images"], images["images"])
    other = rows.save("a", {"seed": 1}, {"metrics": {"fid": 2.5}}, images)
    assert rows.find("a", {"seed": 0}) == saved
    (tmp_path / "rows" / f"{other['key']}.json").write_text("{")
    assert rows.find("a", {"seed": 1}) is None


def test_a_number_that_is_not_finite_is_never_kept(tmp_path):
    rows = RowStore(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        rows.save("a", {}, {"metrics": {"fid": math.nan}}, {"images": random_images(1)})
    assert rows.find("a", {}) is None
