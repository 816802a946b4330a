"""The feature spaces that a configuration switches on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lgm_scale.evaluation.engine.parts import from_rank_zero
from lgm_scale.evaluation.features.extraction import FeatureSpace
from lgm_scale.evaluation.features.fashion_mnist import FashionFeatures
from lgm_scale.evaluation.features.inception import InceptionFeatures
from lgm_scale.evaluation.features.pixel_pca import MAX_FITTED, PixelPCA
from lgm_scale.evaluation.images import ValidationImages, spread


def _fit(images: ValidationImages, num_components: int) -> PixelPCA:
    pixels, _ = images.read(spread(len(images), MAX_FITTED))
    return PixelPCA.fit(pixels.numpy(), num_components)


@dataclass(frozen=True)
class Spaces:
    """All feature spaces of a measurement, and its validation images where it has some."""

    all: Sequence[FeatureSpace]
    images: ValidationImages | None

    @classmethod
    def load(
        cls,
        device: torch.device,
        images: ValidationImages | None = None,
        inception: str | None = None,
        dinov2: str | None = None,
        num_components: int = 0,
        fashion_mnist: bool = False,
    ) -> Spaces:
        """Load the networks whose weights are given, and fit the components, if there are any.

        Weights that are None leave their space out. Components are fitted to `images`; 0: none.
        `fashion_mnist`: the classifier in the package looks at the images, too.

        Raises: CheckpointError, MissingAssetError, DataError.
        """
        spaces: list[FeatureSpace] = []
        if inception is not None:
            spaces.append(InceptionFeatures(inception, device))
        if dinov2 is not None:
            from lgm_scale.evaluation.features.dinov2 import DINOv2Features

            spaces.append(DINOv2Features(dinov2, device))
        if fashion_mnist:
            spaces.append(FashionFeatures(device))
        if num_components:
            assert images is not None  # a rule of the configuration
            # One fit, so that all ranks project alike; one reader, for it may be 2048 images.
            spaces.append(from_rank_zero(partial(_fit, images, num_components)))
        return cls(spaces, images)

    @property
    def outputs(self) -> dict[str, int]:
        """Name of every feature, and its dimension."""
        return {name: dim for space in self.all for name, dim in space.outputs.items()}

    def describe(self) -> list[dict[str, Any]]:
        """What a result must be kept with to be comparable; JSON values."""
        return [space.describe() for space in self.all]

    def described(self, feature: str) -> dict[str, Any]:
        """Description of the space that a feature belongs to."""
        return next(space.describe() for space in self.all if feature in space.outputs)
