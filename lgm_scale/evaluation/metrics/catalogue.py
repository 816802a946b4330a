"""Which metrics there are, what each needs, what it may be called, and their numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from lgm_scale.evaluation.engine.statistics import FeatureStatistics
from lgm_scale.evaluation.metrics.scores import (
    IS_SPLITS,
    KID_SUBSETS,
    NEIGHBOURS,
    class_accuracy,
    describe_inception_score,
    frechet_distance,
    inception_score,
    kernel_distance,
    kid_subset_size,
    precision_recall,
)
from lgm_scale.evaluation.references.files import Reference
from lgm_scale.published import PUBLISHED

log = logging.getLogger("lgm_scale")

Need = Literal["statistics", "features", "nothing"]


@dataclass(frozen=True)
class Metric:
    """One metric: the feature it reads, and what of the reference."""

    key: str
    name: str
    feature: str
    needs: Need
    better: Literal["lower", "higher"]


METRICS = {
    metric.key: metric
    for metric in (
        Metric("fid", "FID", "inception_pool", "statistics", "lower"),
        Metric("sfid", "sFID", "inception_spatial", "statistics", "lower"),
        Metric("is", "IS", "inception_logits", "nothing", "higher"),
        Metric("kid", "KID", "inception_pool", "features", "lower"),
        Metric("precision", "Precision", "inception_pool", "features", "higher"),
        Metric("recall", "Recall", "inception_pool", "features", "higher"),
        Metric("fd_dinov2", "FD-DINOv2", "dinov2", "statistics", "lower"),
        Metric("fashion_accuracy", "Class accuracy", "fashion_logits", "nothing", "higher"),
        Metric("fashion_frechet", "Classifier distance", "fashion_pool", "statistics", "lower"),
        Metric("fashion_precision", "Classifier precision", "fashion_pool", "features", "higher"),
        Metric("fashion_recall", "Classifier recall", "fashion_pool", "features", "higher"),
        Metric("pixel_frechet", "Pixel distance", "pixel_pca", "statistics", "lower"),
    )
}

FASHION = tuple(key for key in METRICS if key.startswith("fashion_"))
"""Those of the classifier in the package, which is loaded if one of them is wanted."""
NEIGHBOURHOODS = (("precision", "recall"), ("fashion_precision", "fashion_recall"))


def count_name(count: int) -> str:
    """How a number of images is said in a metric's name: 50K, 10K, 272."""
    return f"{count // 1000}K" if count and count % 1000 == 0 else str(count)


def metric_name(key: str, count: int, space: Mapping[str, Any], prefix: str = "") -> str:
    """What a metric may be called: never without its count, never FID on other weights.

    `count` images were generated, `space` describes the feature space, `prefix` is g or r before
    FID.
    """
    metric = METRICS[key]
    weights = str(space.get("weights_sha256", ""))
    if key == "pixel_frechet":
        return (
            f"Frechet distance in {space['num_components']} principal components of validation "
            f"pixels (not FID), {count_name(count)} images"
        )
    if key in FASHION:
        return f"{metric.name} (Fashion-MNIST classifier, not FID), {count_name(count)} images"
    published = metric.feature == "dinov2" or weights.startswith(
        PUBLISHED["inception"].sha256 or ""
    )
    if key == "fd_dinov2" and "(large)" not in space["network"]:
        return f"Frechet distance in {space['network'].split(',')[0]}-{count_name(count)}"
    if published:
        return f"{prefix}{metric.name}-{count_name(count)}"
    return (
        f"{metric.name}-like on unpublished Inception weights {weights[:8]} (not {metric.name}), "
        f"{count_name(count)} images"
    )


@dataclass(frozen=True)
class Selection:
    """Metrics that are on, and for the others the one line that says why not."""

    on: tuple[str, ...]
    off: dict[str, str]

    @property
    def statistics_features(self) -> tuple[str, ...]:
        """Features whose statistics are needed."""
        return _features(METRICS[key] for key in self.on if METRICS[key].needs == "statistics")

    @property
    def whole_features(self) -> tuple[str, ...]:
        """Features that are needed vector by vector."""
        return _features(METRICS[key] for key in self.on if METRICS[key].needs != "statistics")


def _features(metrics: Iterable[Metric]) -> tuple[str, ...]:
    return tuple(sorted({metric.feature for metric in metrics}))


def select(
    wanted: Iterable[str], outputs: Mapping[str, int], reference: Reference, count: int
) -> Selection:
    """Choose among the wanted metrics those that features, reference and count allow.

    `outputs` are the features there are, with their dimensions; `count` images were generated.
    """
    on, off = [], {}
    for key in wanted:
        reason = _why_off(METRICS[key], outputs, reference, count)
        if reason is None:
            on.append(key)
        else:
            off[key] = f"{METRICS[key].name} is off: {reason}"
    return Selection(tuple(on), off)


def _why_off(
    metric: Metric, outputs: Mapping[str, int], reference: Reference, count: int
) -> str | None:
    if metric.feature not in outputs:
        space = metric.feature.split("_")[0]
        key = {"pixel": "num_components", "inception": "inception", "dinov2": "dinov2"}[space]
        return (
            f"`{key}` is not given; `python -m lgm_scale.evaluation.commands.preflight` lists what "
            "is needed"
        )
    held = {"statistics": reference.statistics, "features": reference.features}
    if metric.needs in held and metric.feature not in held[metric.needs]:
        return (
            f"the reference {reference.name} holds no {metric.needs} of {metric.feature}; make "
            "one with `python -m lgm_scale.evaluation.commands.reference`"
        )
    if metric.key.endswith(("precision", "recall")) and count <= NEIGHBOURS:
        return f"{count} images have no {NEIGHBOURS} neighbours each"
    if metric.key == "is" and count < IS_SPLITS:
        return f"{count} images are too few for a score; {IS_SPLITS} are needed"
    return None


def warn_few_images(selection: Selection, outputs: Mapping[str, int], count: int) -> None:
    """Say loudly where there are fewer images than dimensions."""
    for feature in selection.statistics_features:
        if count <= outputs[feature]:
            log.warning(
                "FEW IMAGES: %d in %d dimensions (%s): the covariance has not full rank, and the "
                "distance compares with nothing but runs of the very same count",
                count, outputs[feature], feature,
            )  # fmt: skip


def compute(
    selection: Selection,
    statistics: Mapping[str, FeatureStatistics],
    features: Callable[[Sequence[str]], Mapping[str, np.ndarray]],
    reference: Reference,
    device: torch.device | str = "cpu",
    labels: np.ndarray | None = None,
) -> dict[str, float]:
    """Compute the selected metrics, and the deviations of those that have one.

    `statistics` and `features` (whole ones, in the order of the images) are of the generated side.
    `labels` [M] are the classes of its images, where class accuracy is selected.
    """
    numbers: dict[str, float] = {}
    for key in selection.on:
        metric = METRICS[key]
        if metric.needs == "statistics":
            name = metric.feature
            numbers[key] = frechet_distance(
                statistics[name], reference.statistics[name], metric.name
            )
    held = features(selection.whole_features) if selection.whole_features else {}
    if "is" in selection.on:
        numbers["is"], numbers["is_std"] = inception_score(held["inception_logits"])
    if "kid" in selection.on:
        other = reference.features["inception_pool"]
        numbers["kid"], numbers["kid_std"] = kernel_distance(held["inception_pool"], other)
    if "fashion_accuracy" in selection.on:
        assert labels is not None
        numbers["fashion_accuracy"] = class_accuracy(held["fashion_logits"], labels)
    for pair in NEIGHBOURHOODS:
        if set(pair) & set(selection.on):
            name = METRICS[pair[0]].feature
            found = precision_recall(held[name], reference.features[name], device)
            both = dict(zip(pair, found, strict=True))
            numbers |= {key: value for key, value in both.items() if key in selection.on}
    return numbers


def describe_metrics(selection: Selection, count: int, reference: Reference) -> dict[str, Any]:
    """Constants behind the numbers, for the protocol."""
    described: dict[str, Any] = {"moments": "float64, unbiased covariance"}
    if "is" in selection.on:
        described["is"] = describe_inception_score(count)
    if "kid" in selection.on:
        size = kid_subset_size(count, len(reference.features["inception_pool"]))
        described["kid"] = f"{KID_SUBSETS} subsets of {size}"
    if any(set(pair) & set(selection.on) for pair in NEIGHBOURHOODS):
        described["precision_recall"] = f"{NEIGHBOURS} neighbours"
    return described
