"""Validation images, and what the tokenizer makes of them at any K.

No generator can be closer to the validation images than their own reconstructions at that K.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lgm_scale.data.images import ImageDataset
from lgm_scale.data.manifest import read_manifest
from lgm_scale.evaluation.engine.chunks import Made
from lgm_scale.evaluation.features.base import MIN_ROWS, FeatureSpace, extract
from lgm_scale.evaluation.metrics.image_metrics import PerceptualDistance, ssim
from lgm_scale.evaluation.sweep.samples import Stopwatch, batches, device_name, refuse_broken
from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.merging.tree import MergeTree
from lgm_scale.pixels import finite_images, psnr, to_uint8, to_unit_range

__all__ = ["OriginalsWork", "ReconstructionWork", "StoredImages", "encode", "reconstruct", "spread"]


class StoredImages:
    """Images of an MDS folder, read when they are asked for; none is kept.

    Args:
        folder: MDS folder.
        image_size: S.
    """

    def __init__(self, folder: str, image_size: int) -> None:
        self.count = read_manifest(folder, "images").num_samples
        self.dataset = ImageDataset(
            folder, image_size=image_size, train=False, seed=0, batch_size=1
        )

    def __len__(self) -> int:
        """How many the manifest counts."""
        return self.count

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, np.ndarray]:
        """Shapes: [B] -> uint8 [B, 3, S, S], labels int64 [B]."""
        items = [self.dataset[int(index)] for index in indices]
        labels = np.array([int(item["labels"]) for item in items])
        return torch.stack([item["images"] for item in items]), labels


class Readable(Protocol):
    """Images by index."""

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, np.ndarray]:
        """Shapes: [B] -> uint8 [B, 3, S, S], labels int64 [B]."""
        ...


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` indices, evenly spaced: a folder is sorted by class."""
    wanted = min(wanted, count)
    return [i * count // wanted for i in range(wanted)]


@torch.inference_mode()
def encode(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Latents at full length. Shapes: uint8 [B, 3, S, S] -> [max(B, 4), N, D].

    A batch of less than four is filled up, see `evaluation.sweep.samples`;
    `reconstruct` cuts it again.
    """
    if len(images) < MIN_ROWS:
        images = torch.cat((images, images[-1:].expand(MIN_ROWS - len(images), -1, -1, -1)))
    return tokenizer.encode(to_unit_range(images.to(next(tokenizer.parameters()).device)))


@torch.inference_mode()
def reconstruct(
    tokenizer: Tokenizer, tree: MergeTree | None, z: Tensor, num_tokens: int, count: int
) -> Tensor:
    """What is left of `count` images at K tokens, from `encode`'s latents.

    Shapes: [B, N, D] -> pixels [count, 3, S, S].

    Args:
        tokenizer: Frozen, in eval mode.
        tree: Its merge tree; None for a length control without one.
        z: Latents at full length.
        num_tokens: K.
        count: Images before the batch was filled up.
    """
    if tree is None:
        z = tokenizer.merging.full_length(z, num_tokens)
    else:
        assignment = tree.assignment(num_tokens, z.device)
        z = assignment.unmerge(assignment.merge(z))
    return tokenizer.decode(z)[:count]


@dataclass
class OriginalsWork:
    """Makes chunks of images themselves: features, labels, hashes.

    Args:
        images: Anything with `read(indices)`, such as `StoredImages`.
        spaces: Feature spaces.
        device: Where they compute.
        batch_size: Images at once.
    """

    images: Readable
    spaces: Sequence[FeatureSpace]
    device: torch.device
    batch_size: int

    def __call__(self, start: int, stop: int) -> Made:
        """One chunk."""
        watch = Stopwatch(self.device)
        parts: list[dict[str, np.ndarray]] = []
        for indices in batches(start, stop, self.batch_size):
            images, labels = self.images.read(indices)
            hashes = [hashlib.sha256(image.tobytes()).digest() for image in images.numpy()]
            watch.lap("reading")
            found = extract(self.spaces, images.to(self.device))
            found["labels"] = labels
            found["hashes"] = np.array([np.frombuffer(each, np.uint8) for each in hashes])
            parts.append(found)
            watch.lap("features")
        return Made(_joined(parts), {"seconds": watch.seconds})


@dataclass
class ReconstructionWork:
    """Makes chunks of reconstructions at K, measured against their originals.

    Args:
        tokenizer: Frozen, in eval mode.
        tree: Its merge tree; None for a length control without one.
        images: The originals.
        spaces: Feature spaces.
        perceptual: For LPIPS; None: off.
        batch_size: Images at once.
        shown: Images whose pixels are kept, with those of their originals.
    """

    tokenizer: Tokenizer
    tree: MergeTree | None
    images: StoredImages
    spaces: Sequence[FeatureSpace]
    perceptual: PerceptualDistance | None
    batch_size: int
    shown: tuple[int, ...] = ()
    _latents: dict[int, Tensor] = field(default_factory=dict, init=False)
    """Of the batches of this rank, by their first image: encoded once for all K."""

    def __call__(self, num_tokens: int, start: int, stop: int) -> Made:
        """One chunk. Raises: DataError if a reconstruction is not finite."""
        device = next(self.tokenizer.parameters()).device
        watch = Stopwatch(device)
        parts: list[dict[str, np.ndarray]] = []
        finite: list[np.ndarray] = []
        pictures: dict[str, list[Any]] = {"pixels": [], "originals": [], "labels": []}
        for indices in batches(start, stop, self.batch_size):
            originals, labels = self.images.read(indices)
            watch.lap("reading")
            first = int(indices[0])
            if first not in self._latents:
                self._latents[first] = encode(self.tokenizer, originals)
            z = self._latents[first]
            pixels = reconstruct(self.tokenizer, self.tree, z, num_tokens, len(originals))
            finite.append(finite_images(pixels).cpu().numpy())
            images = to_uint8(pixels)
            watch.lap("reconstructing")
            parts.append(self._measured(originals.to(device), images))
            for position, index in enumerate(indices.tolist()):
                if index in self.shown:
                    pictures["pixels"].append(images[position].cpu().numpy())
                    pictures["originals"].append(originals[position].numpy())
                    pictures["labels"].append(labels[position])
            watch.lap("features")
        refuse_broken(np.concatenate(finite), f"reconstructions at K = {num_tokens}", start)
        arrays = _joined(parts)
        if pictures["pixels"]:
            arrays |= {f"shown_{name}": np.stack(values) for name, values in pictures.items()}
        return Made(arrays, {"seconds": watch.seconds, "device": device_name(device)})

    def _measured(self, originals: Tensor, images: Tensor) -> dict[str, np.ndarray]:
        values = {
            "identical": (images == originals).flatten(1).all(1).cpu().numpy(),
            "psnr_db": psnr(originals, images).cpu().numpy(),
            "ssim": ssim(originals, images),
        }
        if self.perceptual is not None:
            values["lpips"] = self.perceptual(originals, images)
        return values | extract(self.spaces, images)


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
