"""Statistics of latents: a folder of latents has them beside its shards, and so has a bundle.

Apart from the data set, which needs Streaming: whoever makes images with a bundle does not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lgm_scale.errors import DataError
from lgm_scale.merging.nesting import ContrastStats
from lgm_scale.storage.files import follow_umask

STATS_NAME = "latent_stats.safetensors"


@dataclass(frozen=True)
class LatentStats:
    """Statistics over all latents, both flips.

    Shapes: mean and std [D], per channel, of the latents; contrasts, of the standardised latents
    at every merge of the tree (None in a folder or bundle from before they were measured: only
    growing length needs them).
    """

    mean: Tensor
    std: Tensor
    contrasts: ContrastStats | None = None

    def with_contrasts(self, mean: Tensor, std: Tensor) -> LatentStats:
        """Add the contrasts of the latents as they are, not standardised. Shapes: [R, D] each."""
        scale = self.std.clamp_min(torch.finfo(self.std.dtype).tiny)
        return replace(self, contrasts=ContrastStats(mean / scale, std / scale))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as safetensors."""
        tensors = {"mean": self.mean, "std": self.std}
        if self.contrasts is not None:
            tensors["contrast_mean"] = self.contrasts.mean
            tensors["contrast_std"] = self.contrasts.std
        save_file({name: value.contiguous() for name, value in tensors.items()}, str(path))
        follow_umask(Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatentStats:
        """Read what `save` wrote. Raises: DataError if missing or damaged."""
        try:
            tensors = load_file(str(path))
            stats = cls(tensors["mean"], tensors["std"])
            if "contrast_mean" not in tensors:
                return stats
            contrasts = ContrastStats(tensors["contrast_mean"], tensors["contrast_std"])
            return replace(stats, contrasts=contrasts)
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(f"{path}: no readable latent statistics ({error})") from error


def mixed_stats(parts: Sequence[LatentStats], counts: Sequence[int]) -> LatentStats:
    """Statistics of an epoch that takes `counts` samples from data of these statistics.

    The moments of each part are those of all of its samples, also where a run leaves classes out.
    """
    if len(parts) == 1:
        return parts[0]
    weights = [count / sum(counts) for count in counts]
    mean, std = _mixed([(part.mean, part.std) for part in parts], weights)
    stats = LatentStats(mean, std)
    pairs = [
        (part.contrasts.mean * part.std, part.contrasts.std * part.std)
        for part in parts
        if part.contrasts is not None
    ]
    if len(pairs) < len(parts):
        return stats
    return stats.with_contrasts(*_mixed(pairs, weights))


def _mixed(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, ...]:
    """Mean and standard deviation of a mixture of distributions given by theirs."""
    means = [mean.double() for mean, _ in pairs]
    mean = sum((w * m for w, m in zip(weights, means, strict=True)), torch.zeros_like(means[0]))
    square = torch.zeros_like(mean)
    for weight, part, (_, std) in zip(weights, means, pairs, strict=True):
        square += weight * (std.double().square() + (part - mean).square())
    return mean.float(), square.sqrt().float()
