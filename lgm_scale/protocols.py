"""What shared code may ask of networks, tokenizers and bundles, whatever family they are of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self


class GeneratorNetwork(Protocol):
    """What the networks of all families can say."""

    @property
    def num_base_tokens(self) -> int:
        """N, the largest number of tokens."""
        ...

    @property
    def num_classes(self) -> int:
        """Classes without the null label."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""
        ...

    def flops(self, num_tokens: int) -> int:
        """Operations of one forward pass of one sample at K tokens."""
        ...

    def block_lengths(self, num_tokens: int) -> set[int]:
        """Token counts at which its blocks run when K tokens are asked for."""
        ...


class ImageTokenizer(Protocol):
    """What reconstructs images at K tokens, in the families that have such a thing.

    Shapes: images [B, 3, S, S] in [-1, 1]; latents [B, N, D].
    """

    @property
    def image_size(self) -> int:
        """S, pixels along a side."""
        ...

    @property
    def num_base_tokens(self) -> int:
        """N, the largest number of tokens."""
        ...

    @property
    def merging(self) -> Any:
        """How latents get to K tokens and back: `full_length(z, K)`, `min_tokens`, `check(K)`."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""
        ...

    def to(self, device: torch.device) -> Self:
        """Move it to a device."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Latents at full length."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Pixels of latents at full length."""
        ...


class Bundle(Protocol):
    """What the bundles of all families have."""

    @property
    def net(self) -> GeneratorNetwork:
        """The network."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    @property
    def info(self) -> dict[str, Any]:
        """Contents of bundle.json."""
        ...
