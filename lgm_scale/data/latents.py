"""Latents: the data set of MDS latent shards, and what belongs to all of them.

A latent folder is made by `data_tools.encode_latents` with one tokenizer. Beside the shards stand
that tokenizer's merge tree and the per-channel statistics of all latents; the manifest names the
tokenizer by the hash of its weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lgm_scale.data.images import EpochDataset
from lgm_scale.data.manifest import Manifest, check_shards, read_manifest
from lgm_scale.errors import DataError
from lgm_scale.merging import MergeTree
from lgm_scale.nesting import ContrastStats
from lgm_scale.randomness import Purpose

__all__ = ["LatentDataset", "LatentStats", "read_latent_manifest"]

STATS_NAME = "latent_stats.safetensors"
TREE_NAME = "merge_tree.safetensors"


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


def read_latent_manifest(
    folder: str, num_base_tokens: int, latent_dim: int, tokenizer_id: str | None
) -> Manifest:
    """Check a latent folder against the model and the tokenizer that will use it.

    Args:
        folder: MDS folder of latents.
        num_base_tokens: N of the model.
        latent_dim: D of the model.
        tokenizer_id: Hash of the tokenizer's weights; None leaves the check out.

    Raises: DataError if it is no latent folder, has other shapes or another tokenizer.
    """
    manifest = read_manifest(folder, "latents")
    found = (manifest.extra.get("num_base_tokens"), manifest.extra.get("latent_dim"))
    if found != (num_base_tokens, latent_dim):
        raise DataError(
            f"{folder} holds latents of {found[0]} tokens x {found[1]} channels; the model wants "
            f"{num_base_tokens} x {latent_dim}. Set model.num_base_tokens and model.latent_dim to "
            "the tokenizer's, or encode with another tokenizer"
        )
    made_by = manifest.extra.get("tokenizer_id")
    if tokenizer_id is not None and made_by != tokenizer_id:
        raise DataError(
            f"{folder} was encoded by tokenizer {str(made_by)[:12]}, but the configured one is "
            f"{tokenizer_id[:12]}: its statistics and merge tree belong to another tokenizer. "
            "Encode again with this tokenizer, or point `tokenizer` to the one that was used"
        )
    return manifest


class LatentDataset(EpochDataset):
    """Latents at full length, one of the two stored flips per visit.

    An item is {"latents": float16 [N, D], "labels": int64 [], "sample_ids": int64 []}.

    Args:
        local: MDS folder of latents.
        shuffle: Shuffle, and draw the flip; otherwise the unflipped latents in order.
        seed: Of order and flips; a flip depends on (seed, epoch, sample id) alone.
        batch_size: Per device.
        num_base_tokens: N, for the check.
        latent_dim: D, for the check.
        tokenizer_id: See `read_latent_manifest`.
    """

    def __init__(
        self,
        local: str,
        *,
        shuffle: bool,
        seed: int,
        batch_size: int,
        num_base_tokens: int,
        latent_dim: int,
        tokenizer_id: str | None,
    ) -> None:
        self.manifest = read_latent_manifest(local, num_base_tokens, latent_dim, tokenizer_id)
        check_shards(local)
        super().__init__(
            local=local,
            batch_size=batch_size,
            shuffle=shuffle,
            shuffle_seed=seed,
            num_canonical_nodes=1,  # fixed: the order must not depend on the number of nodes
        )
        self.seed = seed
        self.stats = LatentStats.load(Path(local) / STATS_NAME)
        self.tree = MergeTree.load(Path(local) / TREE_NAME)

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Tensor]:
        """Read one sample."""
        sample: dict[str, Any] = super().get_item(sample_id, retry)
        flipped = False
        if self.shuffle:
            key = [self.seed, int(Purpose.FLIP), self.epoch, int(sample_id)]
            flipped = bool(np.random.default_rng(key).integers(2))
        latents = sample["latents_flipped" if flipped else "latents"]
        return {
            "latents": torch.from_numpy(latents.copy()),
            "labels": torch.tensor(int(sample["label"]), dtype=torch.int64),
            "sample_ids": torch.tensor(int(sample_id), dtype=torch.int64),
        }
