"""Latents: the data set of MDS latent shards, and what belongs to all of them.

A latent folder is made by `lgm_scale.data.preparation.encode` with one tokenizer. Beside the shards
stand that tokenizer's merge tree and the per-channel statistics of all latents; the manifest names
the tokenizer by the hash of its weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.epochs import EpochDataset, StreamOptions
from lgm_scale.data.mixture import check_one_maker
from lgm_scale.data.shards import local_folder
from lgm_scale.families.lgm.config import check_features, check_latents
from lgm_scale.families.lgm.features import load_means
from lgm_scale.families.lgm.latent_stats import STATS_NAME, LatentStats, mixed_stats
from lgm_scale.merging.tree import TREE_NAME, MergeTree


class LGMLatentDataset(EpochDataset):
    """Latents at full length, one of the two stored flips per visit.

    An item is {"latents": float16 [N, D], "labels": int64 [], "sample_ids": int64 []}, and with
    `feature_dim` also "features", float16 [N, C], of the same flip.

    Args:
        data: MDS folder of latents, or sources with their classes and shares.
        shuffle: Shuffle, and draw the flip; otherwise the unflipped latents in order.
        seed: Seed of order and flips; a flip depends on (seed, epoch, sample id) alone.
        num_base_tokens: N, for the check.
        latent_dim: D, for the check.
        tokenizer_id: Hash of the tokenizer's weights; None leaves the check out.
        feature_dim: C of the features that are handed out with the latents; None: no features.

    Raises: DataError if a source is no complete MDS folder of such latents, or the tokenizers of
        several differ.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | Sequence[SourceConfig],
        *,
        shuffle: bool,
        seed: int,
        batch_size: int,
        num_base_tokens: int,
        latent_dim: int,
        tokenizer_id: str | None,
        options: StreamOptions | None = None,
        feature_dim: int | None = None,
    ) -> None:
        super().__init__(
            data,
            "latents",
            shuffle=shuffle,
            seed=seed,
            batch_size=batch_size,
            options=options,
        )
        for source, manifest in zip(self.sources, self.manifests, strict=True):
            check_latents(source.path, manifest, num_base_tokens, latent_dim, tokenizer_id)
            if feature_dim is not None:
                check_features(source.path, manifest, feature_dim)
        check_one_maker(self.sources, self.manifests, "tokenizer_id", "tokenizer")
        folders = [local_folder(source) for source in self.sources]
        stats = [LatentStats.load(folder / STATS_NAME) for folder in folders]
        self.stats = mixed_stats(stats, self.samples_taken)
        self.tree = MergeTree.load(folders[0] / TREE_NAME)  # one tokenizer, one tree
        self.feature_means: Tensor | None = None
        """[N, C] of the features, if they are handed out."""
        if feature_dim is not None:
            self.feature_means = load_means(folders, self.samples_taken)

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Tensor]:
        """Read one sample."""
        sample: dict[str, Any] = super().get_item(sample_id, retry)
        flipped = self.shuffle and self.draw_flip(sample_id)
        flip = "_flipped" if flipped else ""
        names = ("latents",) if self.feature_means is None else ("latents", "features")
        return {
            **{name: torch.from_numpy(sample[f"{name}{flip}"].copy()) for name in names},
            "labels": torch.tensor(int(sample["label"]), dtype=torch.int64),
            "sample_ids": torch.tensor(int(sample_id), dtype=torch.int64),
        }
