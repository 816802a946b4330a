"""Mean and covariance of feature vectors, in float64.

Images are summed in parts of fixed ranges, and the parts put together in the order of the images
(`Sums.merge`): floating-point addition is not associative, so this order, and not who computed
which part, is what a result to the last bit depends on. Float32 would not do: a Frechet distance
is a small difference between large traces, and would drown in their rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from lgm_scale.errors import DataError


@dataclass(frozen=True)
class FeatureStatistics:
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
        """Sums over features [M, F]. Raises: DataError naming vectors that are not finite."""
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(broken):
            raise DataError(f"features of images {broken[:8].tolist()} are not finite")
        values = torch.from_numpy(features).to(device, torch.float64)
        mean = values.mean(0)
        values = values - mean  # not in place: they may be the caller's own
        return cls(len(features), mean.cpu().numpy(), (values.T @ values).cpu().numpy())

    def merge(self, other: Sums) -> Sums:
        """Sums over the vectors of both; `other` holds the later images.

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
    def joined(parts: Iterable[Sums]) -> FeatureStatistics:
        """Statistics of all parts, in their order. Raises: DataError below two vectors."""
        total = reduce(Sums.merge, parts)
        if total.count < 2:
            raise DataError(f"{total.count} feature vectors have no covariance; needs 2 or more")
        return FeatureStatistics(total.mean, total.scatter / (total.count - 1), total.count)


def statistics_of(features: np.ndarray) -> FeatureStatistics:
    """Statistics of features [M, F], M >= 2. Raises: DataError for fewer, or one not finite."""
    return Sums.joined([Sums.of(np.ascontiguousarray(features))])
