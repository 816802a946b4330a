"""Samples of several token counts end to end in one row, so that most layers run once for all.

A linear layer, a norm or an MLP does not know which tokens belong together. What does (attention,
and vectors that a sample gives to its tokens) takes the row apart into groups of equal length,
which are views, and joins what it made of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the samples lie in a row of T tokens: group after group, each of one token count.

    Args:
        counts: Samples B_g of each group, in the order of the batch; their sum is B.
        lengths: Tokens K_g of each sample of a group; T is the sum of B_g K_g.
        log_sizes: Logarithms of the cluster sizes [K_g] of each group; None where all are 1. Empty
            where the layout alone is asked for.
    """

    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    log_sizes: tuple[Tensor | None, ...] = ()

    def groups(self, row: Tensor) -> list[Tensor]:
        """Take a row apart. Shapes: [T, C] -> a view [B_g, K_g, C] for each group."""
        shapes = list(zip(self.counts, self.lengths, strict=True))
        parts = row.split([count * length for count, length in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    def samples(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """What belongs to the samples of each group. Shapes: [B, ...] -> [B_g, ...] each."""
        return vectors.split(self.counts)

    def spread(self, vectors: Tensor) -> Tensor:
        """Give every token what belongs to its sample. Shapes: [B, ...] -> [T, ...]."""
        own = zip(self.samples(vectors), self.lengths, strict=True)
        return torch.cat([part.repeat_interleave(length, 0) for part, length in own])

    @staticmethod
    def join(groups: Iterable[Tensor]) -> Tensor:
        """The row of these groups. Shapes: [B_g, K_g, C] each -> [T, C]."""
        return torch.cat([group.flatten(0, 1) for group in groups])
