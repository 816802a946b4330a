"""The feature spaces that a configuration switches on, and the reference that goes with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist

from lgm_scale.errors import DataError
from lgm_scale.evaluation.features.base import FeatureSpace
from lgm_scale.evaluation.features.inception import InceptionFeatures
from lgm_scale.evaluation.features.pixel_pca import MAX_FITTED, PixelPCA
from lgm_scale.evaluation.reconstructions.images import StoredImages, spread
from lgm_scale.evaluation.references.files import Reference, load_reference
from lgm_scale.evaluation.sweep.config import SweepConfig
from lgm_scale.storage.files import file_hash

__all__ = ["Spaces", "ValidationImages", "check_reference", "load_reference_for", "network_spaces"]


@dataclass(frozen=True)
class ValidationImages:
    """An MDS folder of images, and what identifies it."""

    stored: StoredImages
    description: dict[str, Any]

    @classmethod
    def open(cls, folder: str, image_size: int) -> ValidationImages:
        """Open a folder; rank 0 hashes its files for all."""
        stored = StoredImages(folder, image_size)
        found: list[Any] = [None]
        if dist.get_global_rank() == 0:
            found = [folder_hash(Path(folder))]
        dist.broadcast_object_list(found)
        description = {
            "name": "validation images",
            "num_images": len(stored),
            "image_size": image_size,
            "files_sha256": found[0],
        }
        return cls(stored, description)


def folder_hash(folder: Path) -> str:
    """SHA-256 over index, manifest and every shard that the index names."""
    index = json.loads((folder / "index.json").read_text())
    names = [
        str((shard.get("zip_data") or shard["raw_data"])["basename"]) for shard in index["shards"]
    ]
    total = hashlib.sha256()
    for name in ["index.json", "manifest.json", *names]:
        total.update(f"{name} {file_hash(folder / name)}\n".encode())
    return total.hexdigest()


def network_spaces(
    inception: str | None, dinov2: str | None, device: torch.device
) -> list[FeatureSpace]:
    """Spaces of networks whose weights are given. Raises: CheckpointError."""
    spaces: list[FeatureSpace] = []
    if inception is not None:
        spaces.append(InceptionFeatures(inception, device))
    if dinov2 is not None:
        from lgm_scale.evaluation.features.dinov2 import DINOv2Features

        spaces.append(DINOv2Features(dinov2, device))
    return spaces


@dataclass(frozen=True)
class Spaces:
    """All feature spaces of a sweep, and its validation images."""

    all: Sequence[FeatureSpace]
    images: ValidationImages | None

    @classmethod
    def load(cls, config: SweepConfig, image_size: int, device: torch.device) -> Spaces:
        """Open the images, load the networks, fit the components (on rank 0, for all)."""
        images = None
        if config.images is not None:
            images = ValidationImages.open(config.images, image_size)
        spaces = network_spaces(config.inception, config.dinov2, device)
        if config.num_components:
            assert images is not None  # a rule of the configuration
            fitted: list[Any] = [None]
            if dist.get_global_rank() == 0:
                stored = images.stored
                pixels, _ = stored.read(spread(len(stored), MAX_FITTED))
                fitted = [PixelPCA.fit(pixels.numpy(), config.num_components)]
            dist.broadcast_object_list(fitted)  # so that all ranks project alike, to the bit
            spaces.append(fitted[0])
        return cls(spaces, images)

    @property
    def outputs(self) -> dict[str, int]:
        """Every feature, and its dimension."""
        return {name: dim for space in self.all for name, dim in space.outputs.items()}

    def describe(self) -> list[dict[str, Any]]:
        """For the protocol of a result."""
        return [space.describe() for space in self.all]

    def described(self, feature: str) -> dict[str, Any]:
        """Description of the space that a feature belongs to."""
        return next(space.describe() for space in self.all if feature in space.outputs)


def load_reference_for(config: SweepConfig) -> Reference | None:
    """The reference that the configuration names; None: the validation images."""
    return None if config.reference is None else load_reference(config.reference)


def check_reference(reference: Reference | None, spaces: Spaces, image_size: int) -> None:
    """Refuse a reference of another resolution, dimension or network. Raises: DataError."""
    if reference is None:
        return
    if reference.image_size not in (None, image_size):
        raise DataError(
            f"reference: {reference.name} was made of images of {reference.image_size} pixels, the "
            f"bundle makes {image_size}; take a reference of that size"
        )
    for name, moments in reference.moments.items():
        expected = spaces.outputs.get(name)
        if expected is not None and len(moments.mean) != expected:
            raise DataError(
                f"reference: {reference.name} has {len(moments.mean)} dimensions of {name}, the "
                f"features here {expected}; they are of another network"
            )
    for space in spaces.all:
        own = space.describe()
        theirs = reference.weights.get(own["space"])
        if theirs is not None and theirs != own.get("weights_sha256"):
            raise DataError(
                f"reference: {reference.name} was made with other {own['space']} weights "
                f"({theirs[:12]}) than the ones given ({own.get('weights_sha256', '')[:12]}); use "
                "the same file, or make the reference again"
            )
