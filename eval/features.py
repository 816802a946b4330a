"""Feature spaces in which samples and validation images are compared.

An extractor maps uint8 images to vectors and describes itself; `PixelPCA` needs nothing but the
validation images. Others (networks with weights of their own) can stand beside it: the sweep uses
only what `FeatureExtractor` names.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lgm_scale.errors import DataError

__all__ = ["FeatureExtractor", "PixelPCA", "images_hash"]

ROUNDING = 1e-12  # of sums of squares; one level of one pixel is 1.5e-5


class FeatureExtractor(Protocol):
    """Images to vectors, each image for itself."""

    @property
    def key(self) -> str:
        """Name of the distance in this space, in results.json."""
        ...

    @property
    def label(self) -> str:
        """The same, for people."""
        ...

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features. Shapes: uint8 [B, 3, S, S] -> float64 [B, F]."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a result must be kept with to be comparable; JSON values."""
        ...


@dataclass(frozen=True)
class PixelPCA:
    """Principal components of the validation images' pixels.

    Needs no network and no download, and sees colour, layout and coarse shape. Distances in it
    compare lengths and runs on the same validation images; they say nothing beside published
    numbers.

    Shapes: mean [P], components [F, P] orthonormal rows, variances [F] descending, all float64,
    P = 3 S S pixels in [0, 1].
    """

    mean: np.ndarray
    components: np.ndarray
    variances: np.ndarray
    explained: float
    """Share of the pixels' variance that the components hold."""
    fitted_to: str
    """Hash of the images."""

    key = "pixel_pca_frechet"

    @property
    def label(self) -> str:
        """The distance's name in tables and pictures."""
        count = len(self.components)
        return f"Frechet distance in {count} principal components of validation pixels (not FID)"

    @classmethod
    def fit(cls, images: np.ndarray, num_components: int) -> PixelPCA:
        """Fit to uint8 images [M, 3, S, S], all at once and in float64.

        A component's sign is free: its entry of largest magnitude is made positive.
        Raises: DataError if the images do not span that many components.
        """
        pixels = _pixels(images)
        mean = pixels.mean(axis=0)
        centred = pixels - mean
        if len(centred) <= centred.shape[1]:
            values, vectors = np.linalg.eigh(centred @ centred.T)
            components = vectors[:, ::-1][:, :num_components].T @ centred
        else:
            values, vectors = np.linalg.eigh(centred.T @ centred)
            components = vectors[:, ::-1][:, :num_components].T
        values = values[::-1].clip(min=0)
        rank = int((values > max(1e-9 * values[0], ROUNDING)).sum())
        if num_components > rank:
            raise DataError(
                f"num_components: the {len(images)} validation images span only {rank} dimensions "
                f"of pixels, fewer than {num_components}; lower num_components or add images"
            )
        components = components / np.linalg.norm(components, axis=1, keepdims=True)
        largest = np.abs(components).argmax(axis=1)
        components *= np.sign(components[np.arange(num_components), largest])[:, None]
        return cls(
            mean=mean,
            components=np.ascontiguousarray(components),
            variances=values[:num_components] / (len(images) - 1),
            explained=float(values[:num_components].sum() / values.sum()),
            fitted_to=images_hash(images),
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Coordinates of uint8 images: [B, 3, S, S] -> [B, F] float64.

        One matrix-vector product per image: equal images give equal bits in any batch.
        """
        rows = [self.components @ (pixels - self.mean) for pixels in _pixels(images)]
        return np.stack(rows) if rows else np.empty((0, len(self.components)))

    def describe(self) -> dict[str, Any]:
        """For the protocol of a result."""
        return {
            "key": self.key,
            "label": self.label,
            "num_components": len(self.components),
            "explained_variance": round(self.explained, 6),
            "fitted_to": self.fitted_to,
        }


def _pixels(images: np.ndarray) -> np.ndarray:
    """Uint8 images [B, 3, S, S] -> float64 [B, 3 S S] in [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float64) / 255


def images_hash(images: np.ndarray) -> str:
    """SHA-256 of shape and pixels of uint8 images."""
    digest = hashlib.sha256(str(images.shape).encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    return digest.hexdigest()
