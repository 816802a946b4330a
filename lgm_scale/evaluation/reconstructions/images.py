"""What a tokenizer makes of images at any K, and how far that is from them.

No generator can be closer to the validation images than their own reconstructions at that K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lgm_scale.evaluation.engine.chunks import Arrays, ChunkResult
from lgm_scale.evaluation.features.extraction import (
    FeatureSpace,
    Stopwatch,
    chunk_batches,
    device_name,
    extract,
    filled_up,
    joined,
    refuse_broken,
)
from lgm_scale.evaluation.images import StoredImages
from lgm_scale.evaluation.metrics.image_metrics import PerceptualDistance, ssim
from lgm_scale.merging.tree import MergeTree
from lgm_scale.pixels import finite_images, psnr, to_uint8, to_unit_range
from lgm_scale.protocols import ImageTokenizer

LATENTS_KEPT = 2**30
"""Bytes of latents that a process keeps between lengths: 32 000 images of 256 tokens of 32."""


@torch.inference_mode()
def encode(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """Latents at full length. Shapes: uint8 [B, 3, S, S] -> [max(B, 4), N, D].

    A batch of less than four images is filled up, so that an image has the same bits in a batch
    of any size; `decode_at` cuts it again.
    """
    device = next(tokenizer.parameters()).device
    return tokenizer.encode(to_unit_range(filled_up(images).to(device)))


@torch.inference_mode()
def decode_at(
    tokenizer: ImageTokenizer, tree: MergeTree | None, z: Tensor, num_tokens: int, count: int
) -> Tensor:
    """Decode what is left of `count` images at K tokens, from `encode`'s latents.

    Shapes: [B, N, D] -> pixels [count, 3, S, S].

    `count` is that of the images before their batch was filled up; `tree` is None for a length
    control without one.
    """
    if tree is None:
        z = tokenizer.merging.full_length(z, num_tokens)
    else:
        assignment = tree.assignment(num_tokens, z.device)
        z = assignment.unmerge(assignment.merge(z))
    return tokenizer.decode(z)[:count]


@dataclass
class ReconstructionScores:
    """Computes chunks of reconstructions at K, measured against their originals.

    Args:
        tree: Its merge tree; None for a length control without one.
        perceptual: Measures LPIPS; None: LPIPS is off.
        shown: Images whose pixels are kept, with those of their originals.
    """

    tokenizer: ImageTokenizer
    tree: MergeTree | None
    images: StoredImages
    spaces: Sequence[FeatureSpace]
    perceptual: PerceptualDistance | None
    batch_size: int
    shown: tuple[int, ...] = ()
    # Chunks are made K after K, each K over all images of this rank, so an image comes again only
    # when all the others were there: what is kept is kept for good, for to replace the oldest would
    # throw away every batch just before it is needed. Hence a bound, in the host's memory: the
    # batches that fit are encoded once for all K, any further ones at every K, to the same bits.
    _latents: dict[int, Tensor] = field(default_factory=dict, init=False)
    """Latents by the first image of their batch, on the CPU."""

    def __call__(self, num_tokens: int, start: int, stop: int) -> ChunkResult:
        """Compute one chunk. Raises: DataError if a reconstruction is not finite."""
        device = next(self.tokenizer.parameters()).device
        watch = Stopwatch(device)
        parts: list[Arrays] = []
        finite: list[np.ndarray] = []
        pictures: dict[str, list[Any]] = {"pixels": [], "originals": [], "labels": []}
        for indices in chunk_batches(start, stop, self.batch_size):
            originals, labels = self.images.read(indices)
            watch.lap("reading")
            z = self._encoded(int(indices[0]), originals).to(device)
            pixels = decode_at(self.tokenizer, self.tree, z, num_tokens, len(originals))
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
        arrays = joined(parts)
        if pictures["pixels"]:
            arrays |= {f"shown_{name}": np.stack(values) for name, values in pictures.items()}
        return ChunkResult(arrays, {"seconds": watch.seconds, "device": device_name(device)})

    def _encoded(self, first: int, originals: Tensor) -> Tensor:
        """Latents of a batch: those that are kept, else new ones, kept while there is room."""
        if first in self._latents:
            return self._latents[first]
        z = encode(self.tokenizer, originals)
        if z.nbytes + sum(kept.nbytes for kept in self._latents.values()) <= LATENTS_KEPT:
            self._latents[first] = z.cpu()
        return z

    def _measured(self, originals: Tensor, images: Tensor) -> Arrays:
        values = {
            "identical": (images == originals).flatten(1).all(1).cpu().numpy(),
            "psnr_db": psnr(originals, images).cpu().numpy(),
            "ssim": ssim(originals, images),
        }
        if self.perceptual is not None:
            values["lpips"] = self.perceptual(originals, images)
        return values | extract(self.spaces, images)
