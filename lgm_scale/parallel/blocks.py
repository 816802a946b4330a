"""What is done to a network one transformer block at a time: recompute, compile, shard.

A block is the right unit for all three. Its input and output are the only activations that have to
live between blocks; its graph is the same for all blocks, so that it is compiled once; and it is
large enough for gathering its weights to be hidden behind the computation of the one before.

Order matters: recompute, then compile, then shard. What comes later lies around what came before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from lgm_scale.parallel.torch_internals import allow_recompilations

# Graphs per length: with and without gradients, and a last batch of another size.
_GRAPHS_PER_LENGTH = 4


class BlockNetwork(Protocol):
    """A network that can say at which token counts its blocks run."""

    blocks: Any  # nn.ModuleList; nn.Module's annotations hide it from a protocol

    def block_lengths(self, num_tokens: int) -> Collection[int]:
        """Token counts at which blocks run when the network runs at `num_tokens`."""
        ...


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of every module list that is called `blocks`, in the model's order."""
    return [
        block
        for name, module in model.named_modules()
        if name.split(".")[-1] == "blocks"
        for block in module.children()
    ]


def chosen_blocks(count: int, ratio: float) -> list[int]:
    """Indices of `ratio` of `count` blocks, evenly spread, the last of each stretch."""
    return [i for i in range(count) if int((i + 1) * ratio + 1e-9) > int(i * ratio + 1e-9)]


def checkpoint_blocks(blocks: Sequence[nn.Module], ratio: float) -> None:
    """Compute the activations of `ratio` of the blocks again in the backward pass.

    The forward of these blocks is replaced in place, and so no parameter changes its name.
    """
    # Compiled is what lies inside, one graph for all blocks; this function would be one for each.
    recomputed = torch.compiler.disable(_recomputed, recursive=False)
    for index in chosen_blocks(len(blocks), ratio):
        block = blocks[index]
        block.forward = partial(recomputed, block.forward)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any], *inputs: Any) -> Any:
    """The result of `forward`, whose activations are computed again where there is a gradient."""
    # Late: it imports sympy, and a dry run recomputes nothing.
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():  # also because checkpoint has no derivative along a flow
        return forward(*inputs)
    # The blocks draw no random numbers: keeping the generator's state would cost a copy from the
    # device in every block.
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)


def compile_blocks(net: BlockNetwork, lengths: Iterable[int], **options: Any) -> None:
    """Compile every block in place, for static shapes; no parameter changes its name.

    All blocks share one graph per token count, so that compilation takes as long as that many
    blocks, whatever the depth.

    Args:
        net: The network; it says at which token counts its blocks run.
        lengths: Every K at which the network will run.
        **options: For `torch.compile`.
    """
    shapes = {count for num_tokens in lengths for count in net.block_lengths(num_tokens)}
    allow_recompilations(len(shapes) * _GRAPHS_PER_LENGTH)
    for block in net.blocks:
        block.compile(dynamic=False, **options)
