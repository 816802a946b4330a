"""Mean, covariance and the Frechet distance between two Gaussians, in float64.

Sums of parts are put together in the order of the images (`Sums.merge`), so a result does not
depend on who computed them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from scipy.linalg import eigvalsh

from lgm_scale.errors import DataError

__all__ = ["Moments", "Sums", "frechet_distance", "moments_of", "symmetric_distance"]

log = logging.getLogger("lgm_scale")

CROSS_CHECK = 1e-3
"""Difference of two routes to one distance, from which on it is reported."""


@dataclass(frozen=True)
class Moments:
    """Mean [F] and (unbiased) covariance [F, F] of `count` feature vectors, float64.

    `count` is None where a file of statistics does not say.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None


@dataclass(frozen=True)
class Sums:
    """Mean [F] and scatter [F, F] (sum of squares about the mean) of `count` vectors, float64."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, device: torch.device | str = "cpu") -> Sums:
        """Sums of features [M, F]. Raises: DataError naming vectors that are not finite."""
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(broken):
            raise DataError(f"features of images {broken[:8].tolist()} are not finite")
        values = torch.from_numpy(features).to(device, torch.float64)
        mean = values.mean(0)
        values = values - mean  # not in place: they may be the caller's own
        return cls(len(features), mean.cpu().numpy(), (values.T @ values).cpu().numpy())

    def merge(self, other: Sums) -> Sums:
        """Sums of both, of which this one comes first.

        Source: Chan, Golub and LeVeque 1979: no cancellation where the mean is large.
        """
        count = self.count + other.count
        shift = other.mean - self.mean
        weight = self.count * other.count / count
        return Sums(
            count,
            self.mean + shift * (other.count / count),
            self.scatter + other.scatter + np.outer(shift, shift) * weight,
        )

    @staticmethod
    def joined(parts: Iterable[Sums]) -> Moments:
        """Moments of all parts, in their order. Raises: DataError below two vectors."""
        total = reduce(Sums.merge, parts)
        if total.count < 2:
            raise DataError(f"{total.count} feature vectors have no covariance; needs 2 or more")
        return Moments(total.mean, total.scatter / (total.count - 1), total.count)


def moments_of(features: np.ndarray) -> Moments:
    """Moments of features [M, F]. Raises: DataError below two vectors or if one is not finite."""
    if len(features) < 2:
        raise DataError(f"{len(features)} feature vectors have no covariance; needs 2 or more")
    return Sums.joined([Sums.of(np.ascontiguousarray(features))])


def frechet_distance(a: Moments, b: Moments, name: str = "distance") -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians.

    |mean_a - mean_b|^2 + tr(A + B) - 2 sum sqrt(eigenvalues of A B), no matrix square root. A
    second, symmetric route checks it; a difference above 1e-3 is logged under `name`.
    """
    values = np.linalg.eigvals(a.covariance @ b.covariance)
    overlap = float(np.sqrt(values.astype(np.complex128)).real.sum())
    distance = _distance(a, b, overlap)
    check = symmetric_distance(a, b)
    if abs(distance - check) > CROSS_CHECK:
        log.warning(
            "%s: two routes to it differ, %.6f and %.6f (%s and %s images in %d dimensions); "
            "digits from there on mean nothing",
            name, distance, check, a.count, b.count, len(a.mean),
        )  # fmt: skip
    return distance


def symmetric_distance(a: Moments, b: Moments) -> float:
    """The same from a symmetric eigenvalue problem, A B x = w x reduced by a Cholesky factor.

    Where B has not full rank: the eigenvalues of R' B R with R the square root of A.
    """
    try:
        values = eigvalsh(a.covariance, b.covariance, type=2, driver="gv", check_finite=False)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(a.covariance)
        root = vectors * np.sqrt(values.clip(min=0))
        inner = root.T @ b.covariance @ root
        values = np.linalg.eigvalsh((inner + inner.T) / 2)
    return _distance(a, b, float(np.sqrt(values.clip(min=0)).sum()))


def _distance(a: Moments, b: Moments, overlap: float) -> float:
    shift = np.square(a.mean - b.mean).sum()
    total = shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(0.0, float(total))
