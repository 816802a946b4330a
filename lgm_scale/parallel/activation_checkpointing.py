"""Compute activations again in the backward pass, for a share of the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_blocks", "chosen_blocks"]


def chosen_blocks(count: int, ratio: float) -> list[int]:
    """Indices of `ratio` of `count` blocks, evenly spread, the last of each stretch."""
    return [i for i in range(count) if int((i + 1) * ratio + 1e-9) > int(i * ratio + 1e-9)]


def checkpoint_blocks(blocks: Sequence[nn.Module], ratio: float) -> None:
    """Change the chosen blocks' forward in place; names of parameters stay as they are.

    Before compiling and before sharding: what these put around a block is then around the
    recomputation as well. No random numbers are kept: the blocks draw none.
    """
    for index in chosen_blocks(len(blocks), ratio):
        block = blocks[index]
        block.forward = partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
