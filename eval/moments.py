"""Mean, covariance and the Frechet distance between two Gaussians, in float64.

Features come in the order of their images, so a result does not depend on who computed them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lgm_scale.errors import DataError

__all__ = ["Moments", "frechet_distance", "moments_of"]


@dataclass(frozen=True)
class Moments:
    """Mean [F] and (unbiased) covariance [F, F] of `count` feature vectors, float64."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int


def moments_of(features: np.ndarray) -> Moments:
    """Moments of features [M, F]. Raises: DataError below two vectors or if one is not finite."""
    features = np.asarray(features, dtype=np.float64)
    if len(features) < 2:
        raise DataError(f"{len(features)} feature vectors have no covariance; needs 2 or more")
    broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(broken):
        raise DataError(f"features of images {broken[:8].tolist()} are not finite")
    mean = features.mean(axis=0)
    centred = features - mean
    return Moments(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), by two symmetric eigenvalue problems:
    no square root of a matrix that is not symmetric, hence no imaginary remainder.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    inner = root @ b.covariance @ root
    overlap = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(min=0)).sum()
    shift = np.square(a.mean - b.mean).sum()
    distance = shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(0.0, float(distance))
