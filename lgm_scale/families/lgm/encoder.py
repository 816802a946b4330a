"""The tokenizer as an encoder of whole data sets: a sequence of latents for each image.

Beside the shards it leaves the merge tree and the statistics that a generator standardises with:
mean and standard deviation over every latent of both flips, per channel, and per channel of the
contrast at every merge of the tree (what a sampler of growing length draws from). On request the
shards have the encoder's features as well, and beside them lie their means.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lgm_scale.data.manifest import FEATURE_DIM
from lgm_scale.data.preparation.encoders import Notes
from lgm_scale.errors import ConfigError
from lgm_scale.families.lgm.features import FEATURES_NAME, FeatureSums, save_means, some_channels
from lgm_scale.families.lgm.latent_stats import STATS_NAME, LatentStats
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
    """Moments of the stored latents, and of their contrasts at every merge of the tree.

    With `feature_dim`, also the sums of the stored features.
    """

    def __init__(
        self, tree: MergeTree, latent_dim: int, device: torch.device, feature_dim: int = 0
    ) -> None:
        self.tree = tree
        self.features = FeatureSums(tree.num_base_tokens, feature_dim) if feature_dim else None
        self.basis = contrast_basis(tree).to(device)  # [N, R]
        self.channels = RunningMoments(latent_dim)
        self.contrasts = RunningMoments(self.basis.shape[1] * latent_dim)

    @override
    def add(self, stored: Mapping[str, Tensor]) -> None:
        for name, z in stored.items():
            if name.startswith("latents"):  # [B, N, D]
                self.channels.add(z.flatten(0, 1))
                self.contrasts.add((self.basis.T @ z.double()).flatten(1))
            elif self.features is not None:  # [B, N, C]
                self.features.add(z)

    @override
    def facts(self) -> dict[str, Any]:
        # Python writes a float64 with the digits that give it back exactly.
        facts = {"moments": [self.channels.state.tolist(), self.contrasts.state.tolist()]}
        return facts if self.features is None else {**facts, "features": self.features.facts()}

    @override
    def merge(self, facts: Mapping[str, Any]) -> None:
        for moments, state in zip((self.channels, self.contrasts), facts["moments"], strict=True):
            moments.state += torch.tensor(state, dtype=torch.float64)
        if self.features is not None:
            self.features.merge(facts["features"])

    @override
    def files(self) -> dict[str, Callable[[Path], Any]]:
        stats = LatentStats(*self.channels.mean_and_std())
        mean, std = (value.view(-1, len(stats.mean)) for value in self.contrasts.mean_and_std())
        files = {STATS_NAME: stats.with_contrasts(mean, std).save, TREE_NAME: self.tree.save}
        if self.features is None:
            return files
        return {**files, FEATURES_NAME: partial(save_means, self.features.means())}


class TokenizerEncoder:
    """Encodes images to sequences of latents at full length, with a tokenizer.

    Args:
        bundle: The tokenizer's.
        feature_dim: Also give its encoder's features, so many channels of them (0: all of them,
            fewer by `features.some_channels`); None: latents alone.

    Raises: CheckpointError for a bad bundle; ConfigError for a length control without a merge tree,
        or for more channels than there are.
    """

    kind: ClassVar[str] = "latents"

    def __init__(
        self, bundle: str, device: torch.device | str, feature_dim: int | None = None
    ) -> None:
        self.tokenizer = load_tokenizer(bundle, device)
        self.tree = self.tokenizer.merge_tree()  # now: encoding without one would be for nothing
        self.device = next(self.tokenizer.parameters()).device
        self.image_size = self.tokenizer.image_size
        tokens, dim = self.tokenizer.num_base_tokens, self.tokenizer.latent_dim
        self.columns = dict.fromkeys(("latents", "latents_flipped"), (tokens, dim))
        self.identity = {
            "tokenizer_id": tokenizer_id(bundle),
            "num_base_tokens": tokens,
            "latent_dim": dim,
        }
        self.feature_dim = 0
        if feature_dim is not None:
            width = self.tokenizer.to_latent.in_features
            if not 0 <= feature_dim <= width:
                raise ConfigError(
                    f"--features: {feature_dim} channels of the {width} that this tokenizer's "
                    f"encoder has; name 1 to {width}, or 0 for all"
                )
            self.feature_dim = feature_dim or width
            self.columns |= dict.fromkeys(
                ("features", "features_flipped"), (tokens, self.feature_dim)
            )
            self.identity[FEATURE_DIM] = self.feature_dim
            self._some = some_channels(width, self.feature_dim, self.device)

    @classmethod
    def from_options(cls, options: Namespace, device: torch.device | str) -> TokenizerEncoder:
        """Load the tokenizer that --tokenizer names."""
        return cls(options.tokenizer, device, options.features)

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Encode both flips.

        Shapes: [B, 3, S, S] in [-1, 1] -> float32 [B, N, D], and of features [B, N, C], each.
        """
        arrays = {}
        for flip, seen in (("", images), ("_flipped", images.flip(-1))):
            arrays[f"latents{flip}"], features = self.tokenizer.encode_with_features(seen)
            if self.feature_dim:
                arrays[f"features{flip}"] = self._some(features)
        return arrays

    def notes(self) -> LatentNotes:
        """Statistics of a shard of which nothing is encoded yet."""
        dim = self.tokenizer.latent_dim
        return LatentNotes(self.tree, dim, self.device, self.feature_dim)
