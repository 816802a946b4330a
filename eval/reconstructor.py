"""Validation images, and what the tokenizer makes of them at any K.

No generator can be closer to the validation images than their own reconstructions at that K.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from eval.chunks import over_chunks
from eval.generate import decode_to_uint8, refuse_broken
from lgm_scale.data.images import ImageDataset
from lgm_scale.data.manifest import read_manifest
from lgm_scale.merging import MergeTree
from lgm_scale.models.tokenizer import Tokenizer
from lgm_scale.training.tokenizer import to_unit_range

__all__ = ["Images", "Reconstructor", "StoredImages", "ignore", "load_images"]


def ignore(_: int) -> None:
    """Progress that nobody watches."""


class Images(Protocol):
    """Images that can be cut by index: an array, or `StoredImages`."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, bounds: slice, /) -> np.ndarray:
        """Some of them: uint8 [B, 3, S, S]."""
        ...


class StoredImages:
    """Images of an MDS folder, each slice read when it is first asked for, and kept.

    A rank thus holds the chunks that it works on, and no others.

    Args:
        folder: MDS folder.
        image_size: S.
    """

    def __init__(self, folder: str, image_size: int) -> None:
        self.count = read_manifest(folder, "images").num_samples
        self.dataset = ImageDataset(
            folder, image_size=image_size, train=False, seed=0, batch_size=1
        )
        self._kept: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        """How many the manifest counts."""
        return self.count

    def __getitem__(self, bounds: slice, /) -> np.ndarray:
        """Shapes: uint8 [B, 3, S, S]."""
        start, stop, step = bounds.indices(self.count)
        assert step == 1
        if (start, stop) not in self._kept:
            items = self.items(start, stop)
            self._kept[start, stop] = torch.stack([item["images"] for item in items]).numpy()
        return self._kept[start, stop]

    def items(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Images and labels, read now."""
        return [self.dataset[index] for index in range(start, stop)]


def load_images(folder: str, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All images of an MDS folder, in order: uint8 [M, 3, S, S], labels int64 [M]."""
    stored = StoredImages(folder, image_size)
    items = stored.items(0, len(stored))
    images = torch.stack([item["images"] for item in items]).numpy()
    return images, np.array([int(item["labels"]) for item in items])


class Reconstructor:
    """Encodes the images once, on first use, and decodes them at any K.

    Args:
        tokenizer: Frozen, in eval mode.
        tree: Its merge tree; None for a length control without one.
        images: uint8, M times [3, S, S].
        batch_size: Images per chunk.
    """

    def __init__(
        self, tokenizer: Tokenizer, tree: MergeTree | None, images: Images, batch_size: int
    ) -> None:
        self.tokenizer, self.tree = tokenizer, tree
        self.images, self.batch_size = images, batch_size
        self.device = next(tokenizer.parameters()).device
        self._latents: dict[int, torch.Tensor] = {}  # of this rank's chunks, by first image

    @torch.inference_mode()
    def _encode(self, start: int, stop: int) -> torch.Tensor:
        if start not in self._latents:
            batch = torch.from_numpy(self.images[start:stop]).to(self.device)
            self._latents[start] = self.tokenizer.encode(to_unit_range(batch))
        return self._latents[start]

    @torch.inference_mode()
    def chunk(self, num_tokens: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """One chunk at K tokens: uint8 [B, 3, S, S], and bool [B]: whether an image is finite."""
        z = self._encode(start, stop)
        if self.tree is None:
            z = self.tokenizer.merging.full_length(z, num_tokens)
        else:
            assignment = self.tree.assignment(num_tokens, self.device)
            z = assignment.unmerge(assignment.merge(z))
        return decode_to_uint8(self.tokenizer.decode(z))

    def __call__(self, num_tokens: int, done=ignore) -> np.ndarray:
        """All images at K tokens: uint8 [M, 3, S, S], on every rank.

        Raises: DataError naming images that are not finite.
        """

        def work(start: int, stop: int) -> dict[str, np.ndarray]:
            images, finite = self.chunk(num_tokens, start, stop)
            return {"images": images, "finite": finite}

        result = over_chunks(len(self.images), self.batch_size, work, done)
        refuse_broken(result["finite"], f"reconstructions at K = {num_tokens}")
        return result["images"]
