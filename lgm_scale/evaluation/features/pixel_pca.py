"""Principal components of validation pixels: a space that needs no weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import override

from lgm_scale.errors import DataError
from lgm_scale.evaluation.engine.chunks import Arrays
from lgm_scale.evaluation.features.extraction import FeatureSpace

ROUNDING = 1e-12  # of sums of squares; one level of one pixel is 1.5e-5
MAX_FITTED = 2048
"""Images that components are fitted to at most, so that memory does not grow with a data set."""
BLOCK = 256


@dataclass(frozen=True)
class PixelPCA(FeatureSpace):
    """Principal components of pixels.

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
    num_fitted: int
    fitted_to: str
    """Hash of the images."""

    @property
    @override
    def outputs(self) -> dict[str, int]:
        return {"pixel_pca": len(self.components)}

    @classmethod
    def fit(cls, images: np.ndarray, num_components: int) -> PixelPCA:
        """Fit to uint8 images [M, 3, S, S] in float64, in blocks: their inner products [M, M].

        A component's sign is free: its entry of largest magnitude is made positive.
        Raises: DataError if the images do not span that many components.
        """
        count = len(images)
        blocks = [slice(start, start + BLOCK) for start in range(0, count, BLOCK)]
        mean = np.sum([_pixels(images[block]).sum(axis=0) for block in blocks], axis=0) / count
        products = np.empty((count, count))
        for rows in blocks:
            centred = _pixels(images[rows]) - mean
            for columns in blocks:
                products[rows, columns] = centred @ (_pixels(images[columns]) - mean).T
        values, vectors = np.linalg.eigh(products)
        values, vectors = values[::-1].clip(min=0), vectors[:, ::-1][:, :num_components]
        rank = int((values > max(1e-9 * values[0], ROUNDING)).sum())
        if num_components > rank:
            raise DataError(
                f"num_components: the {count} validation images span only {rank} dimensions "
                f"of pixels, fewer than {num_components}; lower num_components or add images"
            )
        components = np.zeros((num_components, len(mean)))
        for block in blocks:
            components += vectors[block].T @ (_pixels(images[block]) - mean)
        components = components / np.linalg.norm(components, axis=1, keepdims=True)
        largest = np.abs(components).argmax(axis=1)
        components *= np.sign(components[np.arange(num_components), largest])[:, None]
        return cls(
            mean=mean,
            components=np.ascontiguousarray(components),
            variances=values[:num_components] / (count - 1),
            explained=float(values[:num_components].sum() / values.sum()),
            num_fitted=count,
            fitted_to=images_hash(images),
        )

    def __call__(self, images: Tensor) -> Arrays:
        """Coordinates. Shapes: uint8 [B, 3, S, S] -> {"pixel_pca": float64 [B, F]}.

        One matrix-vector product per image: equal images give equal bits in any batch.
        """
        pixels = _pixels(images.cpu().numpy())
        rows = [self.components @ (row - self.mean) for row in pixels]
        return {"pixel_pca": np.stack(rows) if rows else np.empty((0, len(self.components)))}

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "space": "pixel_pca",
            "num_components": len(self.components),
            "explained_variance": round(self.explained, 6),
            "num_fitted": self.num_fitted,
            "fitted_to": self.fitted_to,
        }


def images_hash(images: np.ndarray) -> str:
    """SHA-256 of shape and pixels of uint8 images."""
    total = hashlib.sha256(str(images.shape).encode())
    total.update(np.ascontiguousarray(images).tobytes())
    return total.hexdigest()


def _pixels(images: np.ndarray) -> np.ndarray:
    """Uint8 images [B, 3, S, S] -> float64 [B, 3 S S] in [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float64) / 255
