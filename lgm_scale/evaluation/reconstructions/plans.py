"""Reconstructions as jobs and rows: every metric in one pass over the images at each K.

The sweep and the command `reconstruct` share this. The validation images are a job of their own:
what reconstructions are compared with, and samples too where no other reference is given.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from lgm_scale import __version__
from lgm_scale.errors import DataError
from lgm_scale.evaluation.engine.chunks import Job
from lgm_scale.evaluation.engine.parts import from_rank_zero
from lgm_scale.evaluation.engine.stages import Engine, RowPlan
from lgm_scale.evaluation.engine.statistics import FeatureStatistics
from lgm_scale.evaluation.features.extraction import OriginalFeatures
from lgm_scale.evaluation.features.spaces import Spaces
from lgm_scale.evaluation.images import ValidationImages, spread
from lgm_scale.evaluation.metrics.catalogue import (
    FASHION,
    METRICS,
    compute,
    count_name,
    describe_metrics,
    metric_name,
    select,
)
from lgm_scale.evaluation.metrics.image_metrics import PerceptualDistance
from lgm_scale.evaluation.metrics.scores import class_accuracy, frechet_distance
from lgm_scale.evaluation.reconstructions.images import ReconstructionScores
from lgm_scale.evaluation.references.files import Reference
from lgm_scale.merging.tree import MergeTree
from lgm_scale.protocols import ImageTokenizer

MEASURED = ("fid", "fd_dinov2", "fashion_accuracy", "fashion_frechet", "pixel_frechet")
WHERE = "`python -m lgm_scale.evaluation.commands.preflight` says where it is to be had"
NUM_SHOWN = 8
PSNR = "mean over images, float64; an identical image counts as if one value were one level off"
SSIM = (
    "mean over images, float64; uniform 7 x 7 window inside the image, sample covariance, k1 0.01, "
    "k2 0.03, mean over channels"
)


class _Features(Mapping[str, np.ndarray]):
    """Features of the validation images, read when they are asked for."""

    def __init__(self, engine: Engine, job: Job, names: Sequence[str]) -> None:
        self.engine, self.job, self.names = engine, job, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self.engine.features(self.job, [name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class ReconstructionPlans:
    """Jobs and rows of the reconstructions of a tokenizer; nothing where there are no images.

    Without a tokenizer the validation images are still a reference, and nothing is reconstructed.

    Args:
        tokenizer: Frozen, in eval mode, on its device; None for a generator without one.
        tree: Its merge tree; None for a length control without one.
        files: Hashes of the files of both, or whatever else identifies them.
        perceptual: Measures LPIPS; None: LPIPS is off.
        reference: A second reference, such as ADM's; None: the validation images alone.
    """

    tokenizer: ImageTokenizer | None
    tree: MergeTree | None
    files: dict[str, Any]
    images: ValidationImages | None
    device: torch.device
    spaces: Spaces
    perceptual: PerceptualDistance | None
    reference: Reference | None
    chunk_size: int
    batch_size: int
    metrics: Sequence[str]
    _validation: Reference | None = field(default=None, init=False)
    _scores: ReconstructionScores | None = field(default=None, init=False)

    @property
    def on(self) -> tuple[str, ...]:
        """What is measured of reconstructions besides PSNR and SSIM, as keys of METRICS."""
        outputs = self.spaces.outputs
        return tuple(k for k in MEASURED if k in self.metrics and METRICS[k].feature in outputs)

    @property
    def distances(self) -> tuple[str, ...]:
        """Those of them that are distances."""
        return tuple(key for key in self.on if METRICS[key].needs == "statistics")

    @property
    def sums(self) -> tuple[str, ...]:
        """Features whose statistics are needed."""
        return tuple(METRICS[key].feature for key in self.distances)

    @property
    def off(self) -> dict[str, str]:
        """Metric -> the line that says why it is off."""
        if self.tokenizer is None:
            return {
                "reconstructions": "Reconstructions are off, and the merge tree with them: this "
                "generator's K is the work of its core, and no image is coded in K tokens"
            }
        if self.images is None:
            return {"reconstructions": "Reconstructions are off: `images` is not given"}
        lines = {}
        if self.perceptual is None:
            lines["lpips"] = f"LPIPS is off: `vgg16` is not given; {WHERE}"
        if "fid" in self.metrics and "fid" not in self.on:
            lines["rfid_val"] = f"rFID is off: `inception` is not given; {WHERE}"
        return lines

    # --- jobs ---------------------------------------------------------------------------------

    def jobs(self, lengths: Sequence[int]) -> list[Job]:
        """The validation images, and their reconstructions at each K."""
        if self.images is None:
            return []
        coded = lengths if self.tokenizer is not None else ()
        return [self._originals(), *(self._job(k) for k in coded)]

    def _originals(self) -> Job:
        assert self.images is not None
        stored = self.images
        protocol = {
            "kind": "images",
            "lgm_scale": __version__,
            "images": self.images.description,
            "features": self.spaces.describe(),
        }
        originals = OriginalFeatures(stored, self.spaces.all, self.device, self.batch_size)
        return Job("images", protocol, len(stored), self.chunk_size, originals)

    def _job(self, num_tokens: int) -> Job:
        assert self.images is not None
        assert self.tokenizer is not None
        if self._scores is None:
            self._scores = ReconstructionScores(
                self.tokenizer, self.tree, self.images, self.spaces.all, self.perceptual,
                self.batch_size, shown=self._shown(),
            )  # fmt: skip
        protocol = {
            "kind": "reconstructions",
            "lgm_scale": __version__,
            "weights": self.files,
            "num_tokens": num_tokens,
            "images": self.images.description,
            "pixels": "(x + 1) / 2, clipped to [0, 1], rounded to 8 bits",
            "precision": "fp32",
            "features": self.spaces.describe(),
            "lpips": None if self.perceptual is None else self.perceptual.weights_hash,
        }
        count = len(self.images)
        name = f"reconstructions-k{num_tokens:04d}"
        return Job(name, protocol, count, self.chunk_size, partial(self._scores, num_tokens))

    def _shown(self) -> tuple[int, ...]:
        """The first validation image of a few classes, spread over all that there are."""
        assert self.images is not None
        manifest = self.images.dataset.manifest
        assert manifest is not None
        starts = np.cumsum([0, *manifest.class_counts[:-1]])
        present = [
            int(start) for start, count in zip(starts, manifest.class_counts, strict=True) if count
        ]
        return tuple(present[i] for i in spread(len(present), NUM_SHOWN))

    # --- what the validation images are, as a reference ---------------------------------------

    def ready(self, engine: Engine, needed: bool) -> bool:
        """Whether numbers can be computed: the reference's chunks are there, if it is `needed`."""
        if not needed:
            return True
        if self.images is None:
            return False
        job = self._originals()
        there = from_rank_zero(
            lambda: all(engine.chunks.path(job, bounds).is_file() for bounds in job.bounds)
        )
        if there:
            self.reduce(engine)
        return there

    def reduce(self, engine: Engine) -> None:
        """Turn the chunks of the validation images into a reference. Every rank must call it."""
        if self.images is None:
            return
        job, features = self._originals(), self._statistics_features()
        engine.make_sums([(job, features)])
        hashes = engine.features(job, ["hashes"])["hashes"]
        description = self.images.description | {
            "images_sha256": hashlib.sha256(hashes.tobytes()).hexdigest()
        }
        self._validation = Reference(
            name="validation images",
            statistics=engine.statistics(job, features),
            features=_Features(engine, job, list(self.spaces.outputs)),
            image_size=self.images.description["image_size"],
            description=description,
        )

    def _statistics_features(self) -> tuple[str, ...]:
        wanted = {
            METRICS[key].feature for key in self.metrics if METRICS[key].needs == "statistics"
        }
        return tuple(sorted(wanted & self.spaces.outputs.keys()))

    @property
    def validation(self) -> Reference:
        """The validation images as a reference; after `reduce`."""
        if self._validation is None:
            raise DataError("reference: missing, and so are validation images; give one of them")
        return self._validation

    def _labels(self, engine: Engine) -> np.ndarray:
        return engine.features(self._originals(), ["labels"])["labels"]

    # --- rows ---------------------------------------------------------------------------------

    def plans(self, lengths: Sequence[int]) -> list[RowPlan]:
        """One row per K; after `reduce`."""
        if self.images is None or self.tokenizer is None:
            return []
        return [self._plan(k) for k in lengths]

    def floor_plan(self) -> RowPlan | None:
        """The validation images themselves, judged like samples by the classifier in the package.

        None where it does not judge, or the samples are compared with these very images.
        """
        wanted = [key for key in self.metrics if key in FASHION]
        if self.reference is None or self.images is None or not wanted:
            return None
        reference, job = self.reference, self._originals()
        selection = select(wanted, self.spaces.outputs, reference, job.count)
        protocol = {
            **job.protocol,
            "num_images": job.count,
            "reference": reference.description,
            "metrics": describe_metrics(selection, job.count, reference),
            "selected": list(selection.on),
        }

        def finish(plan: RowPlan, engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
            numbers = compute(
                selection, self.validation.statistics, partial(engine.features, job), reference,
                engine.device, self._labels(engine),
            )  # fmt: skip
            names = {key: metric_name(key, job.count, {}) for key in selection.on}
            row = {"kind": "real", "num_images": job.count, "metrics": numbers, "names": names}
            return row, {}

        return RowPlan("validation", job, protocol, (), finish, "real validation images")

    def _plan(self, num_tokens: int) -> RowPlan:
        job = self._job(num_tokens)
        outer = None if self.reference is None else self.reference.description
        definitions = {"psnr_db": PSNR, "ssim": SSIM}
        if self.perceptual is not None:
            definitions["lpips"] = (
                "version 0.1, VGG16, mean over images, rounded and clipped images in [-1, 1]"
            )
        protocol = {
            **job.protocol,
            "num_images": job.count,
            "images_sha256": self.validation.description["images_sha256"],
            "reference": outer,
            "definitions": definitions,
            "selected": list(self.on),
        }
        finish = partial(self._finish, num_tokens)
        title = f"K = {num_tokens}, reconstructions"
        return RowPlan(job.name, job, protocol, self.sums, finish, title)

    def _finish(
        self, num_tokens: int, plan: RowPlan, engine: Engine
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        scores = ["psnr_db", "ssim", *(["lpips"] if self.perceptual is not None else [])]
        found = engine.features(plan.job, [*scores, "identical"])
        numbers = {name: math.fsum(found[name]) / plan.job.count for name in scores}
        names = {"psnr_db": "PSNR in dB", "ssim": "SSIM", "lpips": "LPIPS (VGG16, rounded pixels)"}
        names = {key: value for key, value in names.items() if key in numbers}
        statistics = engine.statistics(plan.job, plan.sums)
        for key in self.distances:
            feature = METRICS[key].feature
            space = self.spaces.described(feature)
            text = metric_name(key, plan.job.count, space, "r")
            against = {"val": self.validation}
            if self.reference is not None and feature in self.reference.statistics:
                against["reference"] = self.reference
            for short, reference in against.items():
                name = f"r{key}_{short}"
                other = reference.statistics[feature]
                numbers[name] = frechet_distance(statistics[feature], other, name)
                names[name] = (
                    f"{text}, against {reference.name}{_rank(plan.job.count, statistics[feature])}"
                )
        if "fashion_accuracy" in self.on:
            logits = engine.features(plan.job, ["fashion_logits"])["fashion_logits"]
            numbers["fashion_accuracy"] = class_accuracy(logits, self._labels(engine))
            names["fashion_accuracy"] = metric_name("fashion_accuracy", plan.job.count, {})
        seconds, devices = engine.seconds(plan.job)
        row = {
            "kind": "reconstructions",
            "num_tokens": num_tokens,
            "num_images": plan.job.count,
            "metrics": numbers,
            "names": names,
            "num_identical": int(found["identical"].sum()),
            "run": {"seconds": seconds, "devices": devices},
        }
        return row, self._pictures(plan.job, engine)

    def psnr(self, num_tokens: int, engine: Engine) -> np.ndarray:
        """PSNR of every image at K, in order: [M]."""
        return engine.features(self._job(num_tokens), ["psnr_db"])["psnr_db"]

    def _pictures(self, job: Job, engine: Engine) -> dict[str, np.ndarray]:
        names = {
            "images": "shown_pixels", "originals": "shown_originals", "labels": "shown_labels"
        }  # fmt: skip
        parts = [
            engine.chunks.read(job, bounds, names.values()).arrays
            for bounds in job.bounds
            if any(bounds[0] <= index < bounds[1] for index in self._shown())
        ]
        return {key: np.concatenate([p[name] for p in parts]) for key, name in names.items()}


def _rank(count: int, statistics: FeatureStatistics) -> str:
    if count > len(statistics.mean):
        return ""
    return (
        f" ({count_name(count)} images in {len(statistics.mean)} dimensions: rank deficient, "
        "compares only with the same images)"
    )
