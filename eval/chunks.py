"""Work over images, cut into chunks by index and dealt to the ranks.

Chunk c holds images [c size, (c + 1) size) and goes to rank c mod world. Where a chunk begins and
ends never depends on the number of ranks, and results are put together in the order of the
images: any number of ranks gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from composer.utils import dist, get_device

__all__ = ["join_ranks", "over_chunks", "own_chunks"]

Arrays = dict[str, np.ndarray]


def join_ranks() -> torch.device:
    """Start working with the other ranks, in full float32 products; this rank's device."""
    device = get_device(None)
    dist.initialize_dist(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False  # it may choose other sums in each run
    gpu = device.name == "gpu"
    return torch.device("cuda", dist.get_local_rank()) if gpu else torch.device("cpu")


def own_chunks(count: int, size: int) -> list[tuple[int, int]]:
    """Bounds of this rank's chunks of `count` images."""
    starts = range(0, count, size)[dist.get_global_rank() :: dist.get_world_size()]
    return [(start, min(start + size, count)) for start in starts]


def over_chunks(
    count: int, size: int, work: Callable[[int, int], Arrays], done: Callable[[int], object]
) -> Arrays:
    """Do `work(start, stop)` for every chunk, and give every rank all results in image order.

    Args:
        count: Number of images.
        size: Images per chunk.
        work: Gives arrays whose first axis is the images of the chunk.
        done: Told the number of images after each chunk of this rank.
    """
    own: list[tuple[int, Arrays]] = []
    for start, stop in own_chunks(count, size):
        own.append((start, work(start, stop)))
        done(stop - start)
    pieces = sorted(
        (piece for part in dist.all_gather_object(own) for piece in part), key=lambda item: item[0]
    )
    assert [start for start, _ in pieces] == list(range(0, count, size))
    return {name: np.concatenate([arrays[name] for _, arrays in pieces]) for name in pieces[0][1]}
