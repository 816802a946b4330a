"""The tokenizer as an encoder of whole data sets: a sequence of latents for each image.

Beside the shards it leaves the merge tree and the statistics that a generator standardises with:
mean and standard deviation over every latent of both flips, per channel, and per channel of the
contrast at every merge of the tree (what a sampler of growing length draws from).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lgm_scale.data.preparation.encoders import Notes
from lgm_scale.families.lgm.data import STATS_NAME, LatentStats
from lgm_scale.families.tokenizer.bundle import load_tokenizer, tokenizer_id
from lgm_scale.merging.nesting import contrast_basis
from lgm_scale.merging.tree import TREE_NAME, MergeTree


class RunningMoments:
    """Count, sum and sum of squares of each column, in float64, so that shards add up exactly."""

    def __init__(self, columns: int) -> None:
        self.state = torch.zeros(3, columns, dtype=torch.float64)  # count, sum, squares

    def add(self, values: Tensor) -> None:
        """Take in M vectors. Shapes: [M, columns]."""
        values = values.double()
        self.state[0] += len(values)
        self.state[1] += values.sum(0).cpu()
        self.state[2] += values.square().sum(0).cpu()

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean and (biased) standard deviation of each column: [columns] float32 each."""
        count, total, square = self.state
        mean = total / count
        return mean.float(), (square / count - mean.square()).clamp_min(0).sqrt().float()


class LatentNotes(Notes):
    """Moments of the stored latents, and of their contrasts at every merge of the tree."""

    def __init__(self, tree: MergeTree, latent_dim: int, device: torch.device) -> None:
        self.tree = tree
        self.basis = contrast_basis(tree).to(device)  # [N, R]
        self.channels = RunningMoments(latent_dim)
        self.contrasts = RunningMoments(self.basis.shape[1] * latent_dim)

    @override
    def add(self, stored: Mapping[str, Tensor]) -> None:
        for z in stored.values():  # [B, N, D]
            self.channels.add(z.flatten(0, 1))
            self.contrasts.add((self.basis.T @ z.double()).flatten(1))

    @override
    def facts(self) -> dict[str, Any]:
        # Python writes a float64 with the digits that give it back exactly.
        return {"moments": [self.channels.state.tolist(), self.contrasts.state.tolist()]}

    @override
    def merge(self, facts: Mapping[str, Any]) -> None:
        for moments, state in zip((self.channels, self.contrasts), facts["moments"], strict=True):
            moments.state += torch.tensor(state, dtype=torch.float64)

    @override
    def files(self) -> dict[str, Callable[[Path], Any]]:
        stats = LatentStats(*self.channels.mean_and_std())
        mean, std = (value.view(-1, len(stats.mean)) for value in self.contrasts.mean_and_std())
        return {STATS_NAME: stats.with_contrasts(mean, std).save, TREE_NAME: self.tree.save}


class TokenizerEncoder:
    """Encodes images to sequences of latents at full length, with a tokenizer.

    Raises: CheckpointError for a bad bundle; ConfigError for a length control without a merge tree.
    """

    kind: ClassVar[str] = "latents"
    columns: ClassVar[tuple[str, ...]] = ("latents", "latents_flipped")

    def __init__(self, bundle: str, device: torch.device | str) -> None:
        self.tokenizer = load_tokenizer(bundle, device)
        self.tree = self.tokenizer.merge_tree()  # now: encoding without one would be for nothing
        self.device = next(self.tokenizer.parameters()).device
        self.image_size = self.tokenizer.image_size
        self.shape = (self.tokenizer.num_base_tokens, self.tokenizer.latent_dim)
        self.identity = {
            "tokenizer_id": tokenizer_id(bundle),
            "num_base_tokens": self.shape[0],
            "latent_dim": self.shape[1],
        }

    @classmethod
    def from_options(cls, options: Namespace, device: torch.device | str) -> TokenizerEncoder:
        """Load the tokenizer that --tokenizer names."""
        return cls(options.tokenizer, device)

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Encode both flips. Shapes: [B, 3, S, S] in [-1, 1] -> [B, N, D] float32 each."""
        return {
            "latents": self.tokenizer.encode(images),
            "latents_flipped": self.tokenizer.encode(images.flip(-1)),
        }

    def notes(self) -> LatentNotes:
        """Statistics of a shard of which nothing is encoded yet."""
        return LatentNotes(self.tree, self.tokenizer.latent_dim, self.device)
