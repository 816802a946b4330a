"""What turns images into latents: a tokenizer of LGM, or the autoencoder of Stable Diffusion.

Each knows the columns of its shards, how a batch of images becomes them, and what is noted while it
does so: a tokenizer's statistics over all latents, nothing for the autoencoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lgm_scale.errors import ConfigError
from lgm_scale.families.elit.sd_vae import encoder_id, load_sd_vae
from lgm_scale.families.lgm.data import STATS_NAME, LatentStats
from lgm_scale.families.tokenizer.bundle import load_tokenizer, tokenizer_id
from lgm_scale.merging.nesting import contrast_basis
from lgm_scale.merging.tree import TREE_NAME, MergeTree

__all__ = ["AutoencoderEncoder", "LatentEncoder", "LatentMoments", "TokenizerEncoder"]

_LABEL_BYTES = 8
_FLOAT16_BYTES = 2


class Notes(Protocol):
    """What is noted of the latents while they are made, part by part."""

    def add(self, stored: Mapping[str, Tensor]) -> None:
        """Take in a batch as it is stored."""
        ...

    def facts(self) -> dict[str, Any]:
        """Everything so far, as JSON values."""
        ...

    def merge(self, facts: Mapping[str, Any]) -> None:
        """Take in the facts of a part."""
        ...

    def files(self) -> dict[str, Callable[[Path], Any]]:
        """Files that go beside the shards, each with what writes it."""
        ...


class LatentEncoder(Protocol):
    """Turns images into what a shard of latents stores."""

    kind: str
    """Of the data set, a key of `lgm_scale.data.manifest.COLUMNS`."""
    image_size: int
    columns: dict[str, str]
    """Of a shard, with the label."""
    sample_bytes: int
    described: dict[str, Any]
    """What determines the latents, but for the images (JSON values)."""
    form: str
    """Size of an image's latents, for messages."""
    maker: str
    """What made them, for messages."""
    device: torch.device

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Float32 values of every column but the label. Shapes: [B, 3, S, S] in [-1, 1]."""
        ...

    def notes(self) -> Notes:
        """Nothing noted yet."""
        ...


class Moments:
    """Count, sum and sum of squares per column, in float64. Shapes: add([M, C])."""

    def __init__(self, columns: int) -> None:
        self.state = torch.zeros(3, columns, dtype=torch.float64)  # count, sum, squares

    def add(self, values: Tensor) -> None:
        """Take in M vectors."""
        values = values.double()
        self.state[0] += len(values)
        self.state[1] += values.sum(0).cpu()
        self.state[2] += values.square().sum(0).cpu()

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean and (biased) standard deviation: [C] float32 each."""
        count, total, square = self.state
        mean = total / count
        return mean.float(), (square / count - mean.square()).clamp_min(0).sqrt().float()


class LatentMoments:
    """Moments of the stored latents, and of their contrasts at every merge of the tree."""

    def __init__(self, tree: MergeTree, latent_dim: int, device: torch.device) -> None:
        self.tree = tree
        self.basis = contrast_basis(tree).to(device)  # [N, R]
        self.channels = Moments(latent_dim)
        self.contrasts = Moments(self.basis.shape[1] * latent_dim)

    def add(self, stored: Mapping[str, Tensor]) -> None:
        """Take in a batch as it is stored. Shapes: [B, N, D] float16, any number of columns."""
        for z in stored.values():
            self.channels.add(z.flatten(0, 1))
            self.contrasts.add((self.basis.T @ z.double()).flatten(1))

    def stats(self) -> LatentStats:
        """Of everything that was taken in."""
        stats = LatentStats(*self.channels.mean_and_std())
        mean, std = (value.view(-1, len(stats.mean)) for value in self.contrasts.mean_and_std())
        return stats.with_contrasts(mean, std)

    def facts(self) -> dict[str, Any]:
        """As numbers that JSON keeps exactly."""
        return {"moments": [self.channels.state.tolist(), self.contrasts.state.tolist()]}

    def merge(self, facts: Mapping[str, Any]) -> None:
        """Take in what another one has seen."""
        for moments, state in zip((self.channels, self.contrasts), facts["moments"], strict=True):
            moments.state += torch.tensor(state, dtype=torch.float64)

    def files(self) -> dict[str, Callable[[Path], Any]]:
        """The statistics, and the tree that they belong to."""
        return {STATS_NAME: self.stats().save, TREE_NAME: self.tree.save}


class NoNotes:
    """Nothing is noted, and nothing goes beside the shards."""

    def add(self, stored: Mapping[str, Tensor]) -> None:
        """Take in a batch."""

    def facts(self) -> dict[str, Any]:
        """None."""
        return {}

    def merge(self, facts: Mapping[str, Any]) -> None:
        """Take in a part."""

    def files(self) -> dict[str, Callable[[Path], Any]]:
        """None."""
        return {}


class TokenizerEncoder:
    """A tokenizer of LGM: a sequence of latents, at full length.

    Args:
        bundle: Of the tokenizer.
        device: To encode on.

    Raises: CheckpointError; ConfigError for a length control without a merge tree.
    """

    kind = "latents"
    maker = "this tokenizer"

    def __init__(self, bundle: str, device: torch.device | str) -> None:
        self.tokenizer = load_tokenizer(bundle, device)
        self.tree = self.tokenizer.merge_tree()  # a length control without one is refused now
        self.device = next(self.tokenizer.parameters()).device
        self.image_size = self.tokenizer.image_size
        tokens, width = self.tokenizer.num_base_tokens, self.tokenizer.latent_dim
        column = f"ndarray:float16:{tokens},{width}"
        self.columns = {"latents": column, "latents_flipped": column, "label": "int"}
        self.sample_bytes = 2 * _FLOAT16_BYTES * tokens * width + _LABEL_BYTES
        self.described = {
            "tokenizer_id": tokenizer_id(bundle),
            "num_base_tokens": tokens,
            "latent_dim": width,
        }
        self.form = f"{tokens} x {width}"

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Latents of both flips. Shapes: [B, 3, S, S] -> [B, N, D] each."""
        return {
            "latents": self.tokenizer.encode(images),
            "latents_flipped": self.tokenizer.encode(images.flip(-1)),
        }

    def notes(self) -> LatentMoments:
        """None taken in yet."""
        return LatentMoments(self.tree, self.tokenizer.latent_dim, self.device)


class AutoencoderEncoder:
    """The autoencoder of Stable Diffusion: mean and standard deviation of a grid of latents.

    In float16 a deviation below 6e-5 has fewer digits: an error of 6e-8 in latents of about one.

    Args:
        folder: Of the autoencoder.
        image_size: S.
        device: To encode on.

    Raises: CheckpointError; ConfigError for an image size that does not come out even.
    """

    kind = "spatial_latents"
    maker = "this encoder"

    def __init__(self, folder: str, image_size: int, device: torch.device | str) -> None:
        self.vae = load_sd_vae(folder, device)
        self.device = next(self.vae.parameters()).device
        self.image_size = image_size
        try:
            side = self.vae.side(image_size)
        except ConfigError as error:
            raise ConfigError(error.problems[0].replace("image_size", "--image-size")) from error
        channels = self.vae.channels
        names = ("mean", "std", "mean_flipped", "std_flipped")
        column = f"ndarray:float16:{channels},{side},{side}"
        self.columns = {**dict.fromkeys(names, column), "label": "int"}
        self.sample_bytes = len(names) * _FLOAT16_BYTES * channels * side**2 + _LABEL_BYTES
        self.described = {
            "encoder": "sd-vae",
            "encoder_id": encoder_id(folder),
            "channels": channels,
            "side": side,
            "scale": self.vae.scale,
            "downsampling": self.vae.downsampling,
            "image_size": image_size,
        }
        self.form = f"{channels} x {side} x {side}"

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Moments of both flips. Shapes: [B, 3, S, S] -> [B, C, h, w] each."""
        mean, std = self.vae.moments(images)
        mean_flipped, std_flipped = self.vae.moments(images.flip(-1))
        return {
            "mean": mean,
            "std": std,
            "mean_flipped": mean_flipped,
            "std_flipped": std_flipped,
        }

    def notes(self) -> NoNotes:
        """None."""
        return NoNotes()
