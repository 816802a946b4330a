"""The measurement of reconstructions: every metric in one pass over the images at each K.

Every rank measures its chunks; values come together in the order of the images, so that the numbers
do not depend on how many ranks there are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from composer.utils import dist

from eval.chunks import over_chunks
from eval.features import FeatureExtractor
from eval.generate import refuse_broken
from eval.image_metrics import PerceptualDistance, psnr, ssim
from eval.inception import InceptionFeatures
from eval.moments import Moments, frechet_distance, moments_of
from eval.reconstructor import Images, Reconstructor

__all__ = ["Measurement", "describe_metrics", "rfid_label"]


def rfid_label(num_images: int, num_features: int) -> str:
    """The name of the distance, never without the count that it depends on."""
    label = f"rFID on {num_images} images"
    if num_images > num_features:
        return label
    return (
        f"{label} (covariance of {num_features} features is rank deficient: "
        "compares only with the same images)"
    )


@dataclass
class Measurement:
    """The metrics at any K, in one pass over the reconstructions.

    Args:
        reconstruct: Gives the images and their reconstructions.
        perceptual: For LPIPS; None: off.
        features: For rFID; None: off.
        done: Told the number of images after each chunk.
    """

    reconstruct: Reconstructor
    perceptual: PerceptualDistance | None
    features: FeatureExtractor | None
    done: Callable[[int], object]
    psnr_of: dict[int, np.ndarray] = field(default_factory=dict)
    """PSNR of every image, in order, at every K measured so far."""

    @property
    def images(self) -> Images:
        """The originals."""
        return self.reconstruct.images

    def originals(self) -> tuple[str, Moments | None]:
        """Hash of the originals' own hashes, in order, and the moments of their features."""

        def work(start: int, stop: int) -> dict[str, np.ndarray]:
            images = self.images[start:stop]
            hashes = [hashlib.sha256(image.tobytes()).digest() for image in images]
            values = {"hashes": np.array([np.frombuffer(part, np.uint8) for part in hashes])}
            return values | self._seen(images)

        result = self._over_chunks(work)
        combined = hashlib.sha256(result["hashes"].tobytes()).hexdigest()
        return combined, self._moments(result)

    def at(self, num_tokens: int, reference: Moments | None) -> dict[str, Any]:
        """One row. rFID is on rank 0 alone: it would cost every rank the same seconds.

        Raises: DataError naming images that are not finite.
        """

        def work(start: int, stop: int) -> dict[str, np.ndarray]:
            originals = self.images[start:stop]
            images, finite = self.reconstruct.chunk(num_tokens, start, stop)
            values = {
                "finite": finite,
                "identical": (images == originals).all(axis=(1, 2, 3)),
                "psnr_db": psnr(originals, images),
                "ssim": ssim(originals, images, self.reconstruct.device),
            }
            if self.perceptual is not None:
                values["lpips"] = self.perceptual(originals, images)
            return values | self._seen(images)

        result = self._over_chunks(work)
        refuse_broken(result["finite"], f"reconstructions at K = {num_tokens}")
        self.psnr_of[num_tokens] = result["psnr_db"]
        means = {
            name: math.fsum(result[name]) / len(result[name])
            for name in ("psnr_db", "ssim", "lpips")
            if name in result
        }
        row = {"num_tokens": num_tokens, **means, "num_identical": int(result["identical"].sum())}
        moments = self._moments(result)
        if moments is not None and reference is not None:
            row["rfid_val"] = frechet_distance(moments, reference)
        return row

    def _over_chunks(self, work: Callable[[int, int], dict[str, np.ndarray]]) -> dict[str, Any]:
        return over_chunks(len(self.images), self.reconstruct.batch_size, work, self.done)

    def _seen(self, images: np.ndarray) -> dict[str, np.ndarray]:
        # Networks compute in float32: nothing is lost, and half as much is exchanged.
        return {} if self.features is None else {"features": self.features(images).astype("f4")}

    def _moments(self, result: dict[str, np.ndarray]) -> Moments | None:
        if "features" not in result or dist.get_global_rank() != 0:
            return None
        return moments_of(result["features"])


def describe_metrics(
    num_images: int, perceptual: PerceptualDistance | None, features: InceptionFeatures | None
) -> dict[str, dict[str, Any]]:
    """Every metric that is on: its name for people, and how it is defined."""
    metrics: dict[str, dict[str, Any]] = {
        "psnr_db": {
            "label": "PSNR in dB",
            "definition": "mean over images, float64; an identical image counts as if a single "
            "value were one level off",
        },
        "ssim": {
            "label": "SSIM",
            "definition": "mean over images, float64; uniform 7 x 7 window inside the image, "
            "sample covariance, k1 0.01, k2 0.03, mean over channels",
        },
    }
    if perceptual is not None:
        metrics["lpips"] = {
            "label": "LPIPS (VGG16, rounded pixels)",
            "definition": "mean over images, version 0.1, rounded and clipped images in [-1, 1]",
            "weights_sha256": perceptual.weights_hash,
        }
    if features is not None:
        metrics["rfid_val"] = {
            "label": rfid_label(num_images, features.num_features),
            "definition": "Frechet distance between the validation images and their own "
            "reconstructions, float64 moments",
            "num_images": num_images,
            "features": features.describe(),
        }
    return metrics
