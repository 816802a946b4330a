"""From similarities to a dendrogram, as arrays: average linkage, block by block.

Tokens of different blocks never merge, so the blocks are clustered one by one and their merges
sorted together by height. That is the tree of clustering them all at once, at 1 / num_blocks of
the pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lgm_scale.errors import ConfigError

# Height at which whole blocks join: above any in-block distance. The release writes a similarity
# of -100 between tokens of different blocks.
_CROSS_BLOCK_DISTANCE = 101.0
# Average linkage is unchanged by a constant added to every distance, and scipy refuses the
# slightly negative heights that exploration noise can produce.
_DISTANCE_OFFSET = 1.0


def in_block_triangle(similarity: Tensor, num_blocks: int) -> Tensor:
    """The similarities that clustering reads: of pairs i < j of one block.

    Gathered where they are: of N * N values, 1 / (2 num_blocks) travel to the host.

    Shapes: similarity [N, N] -> [num_blocks, M * (M - 1) / 2], M = N / num_blocks; no gradient.
    Raises: ConfigError if there are no blocks of M >= 2 tokens.
    """
    size = similarity.shape[0]
    if num_blocks < 1 or size % num_blocks != 0 or size == num_blocks:
        raise ConfigError(
            f"num_base_tokens: {size} tokens cannot be cut into {num_blocks} equal blocks of "
            f"two or more; choose a multiple of {num_blocks} above it"
        )
    positions = _positions_in_matrix(size, num_blocks, similarity.device)
    return similarity.detach().take(positions).view(num_blocks, -1)


def start_host_copy(values: Tensor) -> Callable[[], Tensor]:
    """Start copying to the host; calling the result waits for this copy, and returns it.

    From a GPU: the copy and an event are queued behind the work that made the values, and ahead
    of whatever is queued next. Waiting for that event therefore does not wait for the work after
    it: a caller that queues the encoder first clusters on the host while the GPU encodes. The
    stream's own order does this; a second stream would only free it of a copy of microseconds.
    On a CPU there is nothing to copy.
    """
    if values.device.type != "cuda":
        return lambda: values
    # Only page-locked memory can be copied to while the host goes on.
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait


def average_linkage(
    triangle: Tensor, size: int, exploration: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Average linkage on distances 1 - similarity.

    Shapes: triangle [num_blocks, M * (M - 1) / 2] from `in_block_triangle`, size = N = num_blocks
    * M, exploration [N * (N - 1) / 2], added to similarities of all pairs i < j, row by row ->
    merges [N - 1, 2] int64 (row i makes node N + i), heights [N - 1] float64, ascending.
    Raises: ConfigError for similarities that are not finite.
    """
    num_blocks = len(triangle)
    distances = 1.0 - triangle.double().numpy()  # [num_blocks, M (M - 1) / 2]
    if not np.isfinite(distances).all():
        raise ConfigError("merge embeddings: not finite; the run that made them has diverged")
    if exploration is not None:
        # Drawn for all pairs, whatever the blocks are: noise of a seed does not change with them.
        distances -= exploration[_positions_in_pairs(size, num_blocks)].reshape(distances.shape)
    distances += _DISTANCE_OFFSET
    # Late: only training makes trees, and whatever reads one would pay for scipy.
    from scipy.cluster.hierarchy import linkage

    return _join_blocks(np.stack([linkage(block, "average") for block in distances]))


def _join_blocks(linkages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One dendrogram from those of the blocks: their merges by height, then the blocks themselves.

    Shapes: linkages [num_blocks, M - 1, 4] as scipy writes them, heights with the offset ->
    merges [N - 1, 2] int64, heights [N - 1] float64.
    """
    num_blocks, num_merges, _ = linkages.shape
    in_block = num_merges + 1
    size = num_blocks * in_block
    # Average linkage never joins below the heights of its parts, so sorting all merges by height
    # interleaves the blocks and keeps each block's own order.
    heights = linkages[..., 2].ravel()
    order = np.argsort(heights, kind="stable")  # stable: children stay ahead of their parents
    node = np.empty((num_blocks, in_block + num_merges), dtype=np.int64)  # a block's ids to ours
    node[:, :in_block] = np.arange(size).reshape(num_blocks, in_block)  # leaves: the tokens
    made = np.empty(size - num_blocks, dtype=np.int64)  # node that each merge makes
    made[order] = np.arange(size, 2 * size - num_blocks)
    node[:, in_block:] = made.reshape(num_blocks, num_merges)
    children = linkages[..., :2].astype(np.int64).reshape(num_blocks, -1)
    merges = np.take_along_axis(node, children, axis=1).reshape(-1, 2)[order]
    # A dendrogram has one root: whole blocks join in a chain, block by block.
    roots = node[:, -1]  # [num_blocks]
    joined = np.arange(2 * size - num_blocks, 2 * size - 2)  # made by all joins but the last
    joins = np.stack((roots[1:], np.concatenate((roots[:1], joined))[: num_blocks - 1]), axis=1)
    tops = np.full(num_blocks - 1, _CROSS_BLOCK_DISTANCE)
    return (
        np.sort(np.concatenate((merges, joins)), axis=1),
        np.concatenate((heights[order] - _DISTANCE_OFFSET, tops)),
    )


@lru_cache(maxsize=16)
def _pairs(size: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows i and columns j of the pairs i < j of one block, block by block, int64."""
    in_block = size // num_blocks
    starts = np.arange(num_blocks)[:, None] * in_block
    rows, columns = np.triu_indices(in_block, 1)
    return (starts + rows).ravel(), (starts + columns).ravel()


@lru_cache(maxsize=16)
def _positions_in_matrix(size: int, num_blocks: int, device: torch.device) -> Tensor:
    """Where the pairs i < j of one block are in a flattened [N, N] matrix, on the device."""
    rows, columns = _pairs(size, num_blocks)
    return torch.from_numpy(rows * size + columns).to(device)


@lru_cache(maxsize=16)
def _positions_in_pairs(size: int, num_blocks: int) -> np.ndarray:
    """Where the pairs i < j of one block are among the pairs of all tokens, row by row."""
    rows, columns = _pairs(size, num_blocks)
    return rows * size - rows * (rows + 1) // 2 + columns - rows - 1
