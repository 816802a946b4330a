"""What `encode` asks of anything that turns images into latents.

A family that is trained on latents brings its encoder and names it in the table of encoders. The
columns of the shards, the options of the command and the statistics beside the shards follow from
the encoder, so that a new one needs no change here.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


class Notes:
    """What an encoder notes of the latents of one shard; these notes are empty.

    The notes of all shards are merged when the last one is there, whichever process made them.
    """

    def add(self, stored: Mapping[str, Tensor]) -> None:
        """Take in a batch of latents as they are stored. Shapes: float16 [B, ...] per column."""

    def facts(self) -> dict[str, Any]:
        """Give everything so far as JSON values, for the record of the shard."""
        return {}

    def merge(self, facts: Mapping[str, Any]) -> None:
        """Take in the facts of another shard."""

    def files(self) -> dict[str, Callable[[Path], Any]]:
        """Files that go beside the shards by name, each with the function that writes it."""
        return {}


class LatentEncoder(Protocol):
    """Turns images into the arrays that a shard of latents stores."""

    kind: ClassVar[str]
    """Kind of the data set, a key of `lgm_scale.data.manifest.COLUMNS`."""

    columns: Mapping[str, tuple[int, ...]]
    """Arrays of one image by name, each with its shape; the first is what messages tell."""
    image_size: int
    """Side in pixels of the images that are encoded."""
    identity: dict[str, Any]
    """What determines the latents besides the images (JSON values); the manifest keeps it."""
    device: torch.device

    @classmethod
    def from_options(cls, options: Namespace, device: torch.device | str) -> LatentEncoder:
        """Load the encoder that the options name. Raises: CheckpointError, ConfigError."""
        ...

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Encode both flips of a batch.

        Shapes: images [B, 3, S, S] float32 in [-1, 1] -> float32 [B, *its shape] for every
        column.
        """
        ...

    def notes(self) -> Notes:
        """Notes of a shard of which nothing is encoded yet."""
        ...
