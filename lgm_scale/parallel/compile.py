"""Compilation of the transformer's blocks, one graph per token length."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

__all__ = ["compile_blocks"]

# Graphs per length: with and without gradients, and a last batch of another size.
_GRAPHS_PER_LENGTH = 4


def compile_blocks(net: Any, lengths: Collection[int], **options: Any) -> None:
    """Compile every block in place, for static shapes; names of parameters stay as they are.

    All blocks share one graph per token length, so compilation takes the time of that many
    blocks. torch gives up on a function after a few graphs (and runs it uncompiled, with one
    warning): the limit is raised to what the lengths need.

    Args:
        net: The generator.
        lengths: Different K that will be run. An ELIT's outer blocks run at N besides.
        **options: For `torch.compile`.
    """
    shapes = {shape for length in lengths for shape in net.block_lengths(length)}
    limit = len(shapes) * _GRAPHS_PER_LENGTH
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    for block in net.blocks:
        block.compile(dynamic=False, **options)
