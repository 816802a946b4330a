"""Scores of a set of features, by torch-fidelity's own functions: IS, KID, precision and recall."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["IS_SPLITS", "KID_SUBSETS", "inception_score", "kernel_distance", "precision_recall"]

IS_SPLITS = 10
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
NEIGHBOURS = 3
SHUFFLE_SEED = 2020


def inception_score(logits: np.ndarray) -> tuple[float, float]:
    """Mean and deviation over 10 splits. Shapes: [M, 1008], in the order of the images.

    Images are shuffled first (a fixed permutation): in splits of images sorted by class, each
    would hold a few classes only, and the score would be far too low.

    Source: Salimans et al. 2016; exp of the mean KL(p(y|x) | p(y)) in each split.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    found = isc_features_to_metric(
        torch.from_numpy(logits), splits=IS_SPLITS, shuffle=True, rng_seed=SHUFFLE_SEED
    )
    return found["inception_score_mean"], found["inception_score_std"]


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
