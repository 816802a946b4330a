"""Scores of sets of features: the Frechet distance, IS, KID, precision and recall.

All but the distance are computed by torch-fidelity's own functions.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from scipy.linalg import eigvalsh

from lgm_scale.evaluation.engine.statistics import FeatureStatistics

log = logging.getLogger("lgm_scale")

CROSS_CHECK = 1e-3
"""Difference between two routes to one distance from which on it is reported."""
IS_SPLITS, IS_SPLIT_SIZE = 10, 5000
FIXED_IS_SPLITS = f"{IS_SPLITS} splits after a fixed shuffle"
"""What the protocol says of 50,000 images or more; of any number in sweeps of earlier versions."""
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
NEIGHBOURS = 3
SHUFFLE_SEED = 2020


def inception_score(logits: np.ndarray) -> tuple[float, float]:
    """Mean and deviation over splits. Shapes: [M, 1008], in the order of the images.

    From 50,000 images on 10 splits; below, splits of 5000, the last one shorter, as ADM and the
    method's release have them. A score grows with its split: of 1000 images each it is far lower.
    Images are shuffled first (a fixed permutation): in splits of images sorted by class, each
    would hold a few classes only, and the score would be far too low.

    Source: Salimans et al. 2016; exp of the mean KL(p(y|x) | p(y)) in each split.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    if len(logits) >= IS_SPLITS * IS_SPLIT_SIZE:
        found = isc_features_to_metric(
            torch.from_numpy(logits), splits=IS_SPLITS, shuffle=True, rng_seed=SHUFFLE_SEED
        )
        return found["inception_score_mean"], found["inception_score_std"]
    shuffled = torch.from_numpy(logits)[
        np.random.RandomState(SHUFFLE_SEED).permutation(len(logits))
    ]
    scores = [
        isc_features_to_metric(part, splits=1, shuffle=False)["inception_score_mean"]
        for part in shuffled.split(IS_SPLIT_SIZE)
    ]
    return float(np.mean(scores)), float(np.std(scores))


def describe_inception_score(count: int) -> str:
    """The splits of so many images, for the protocol."""
    if count >= IS_SPLITS * IS_SPLIT_SIZE:
        return FIXED_IS_SPLITS
    return f"splits of {IS_SPLIT_SIZE} after a fixed shuffle"


def class_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that a classifier gives their own class. Shapes: [M, C], [M]."""
    return float((logits.argmax(axis=1) == labels).mean())


def kid_subset_size(*counts: int) -> int:
    """1000 as published, or all that the smaller set has."""
    return min(KID_SUBSET_SIZE, *counts)


def kernel_distance(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """KID: mean and deviation of the squared MMD over 100 subsets. Shapes: [M, F], [R, F].

    Source: Binkowski et al. 2018, cubic polynomial kernel.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    found = kid_features_to_metric(
        torch.from_numpy(features),
        torch.from_numpy(reference),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=kid_subset_size(len(features), len(reference)),
        rng_seed=SHUFFLE_SEED,
        verbose=False,
    )
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def precision_recall(
    features: np.ndarray, reference: np.ndarray, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall with 3 neighbours. Shapes: [M, F], [R, F].

    Precision: share of the images inside the reference's manifold; recall: the other way round.

    Source: Kynkaanniemi et al. 2019, as in ADM's evaluator.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(
        torch.from_numpy(features).to(device),
        torch.from_numpy(reference).to(device),
        prc_neighborhood=NEIGHBOURS,
        save_cpu_ram=True,
        verbose=False,
    )
    return found["precision"], found["recall"]


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics, name: str = "distance") -> float:
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


def symmetric_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet distance by a symmetric eigenvalue problem: A B x = w x, by Cholesky.

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


def _distance(a: FeatureStatistics, b: FeatureStatistics, overlap: float) -> float:
    shift = np.square(a.mean - b.mean).sum()
    total = shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(0.0, float(total))
