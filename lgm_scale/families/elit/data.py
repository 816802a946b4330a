"""Latents on a grid: the data set of MDS shards with the moments of an image autoencoder.

A folder is made by `lgm_scale.data.preparation.encode --encoder sd-vae`. It holds what the encoder
gives, a mean and a standard deviation per latent, of both flips; which latent a visit sees is drawn
in training, where the noise belongs. The manifest names the encoder by the hash of its weights, and
has the factor that a generator scales the latents with.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.epochs import EpochDataset, StreamOptions
from lgm_scale.data.images import ImageDataset
from lgm_scale.data.mixture import check_one_maker
from lgm_scale.errors import DataError
from lgm_scale.families.elit.config import ELITRun, check_grids
from lgm_scale.families.elit.sd_vae import encoder_id, latent_scale


class ELITLatentDataset(EpochDataset):
    """Moments of latents on a grid, of one of the two stored flips per visit.

    An item is {"mean", "std": float16 [C, h, w], "labels": int64 [], "sample_ids": int64 []}.
    A latent is mean + std * noise, not scaled; the noise is drawn where it is used.

    Args:
        data: MDS folder of grids, or sources with their classes and shares.
        shuffle: In another order every epoch.
        flip: Draw one of the flips; otherwise the image as it is.
        seed: Seed of order and flips; a flip depends on (seed, epoch, sample id) alone.
        channels: C, for the check.
        side: h and w, for the check.
        encoder_id: Hash of the encoder's weights; None leaves the check out.

    Raises: DataError if a source is no complete MDS folder of such latents, or the encoders or
        scales of several differ.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | Sequence[SourceConfig],
        *,
        shuffle: bool,
        flip: bool,
        seed: int,
        batch_size: int,
        channels: int,
        side: int,
        encoder_id: str | None,
        options: StreamOptions | None = None,
    ) -> None:
        super().__init__(
            data,
            "spatial_latents",
            shuffle=shuffle,
            seed=seed,
            batch_size=batch_size,
            options=options,
        )
        for source, manifest in zip(self.sources, self.manifests, strict=True):
            check_grids(source.path, manifest, channels, side, encoder_id)
        check_one_maker(self.sources, self.manifests, "encoder_id", "encoder")
        check_one_maker(self.sources, self.manifests, "scale", "scale")
        scale = self.manifests[0].extra.get("scale")
        if not isinstance(scale, (int, float)):
            raise DataError(
                f"{self.sources[0].path}: its manifest has scale {scale!r}, a number is needed: "
                "the folder is damaged. Encode again"
            )
        self.scale = float(scale)
        self.flip = flip

    scale: float
    """What the latents are to be multiplied with."""

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Tensor]:
        """Read one sample."""
        sample: dict[str, Any] = super().get_item(sample_id, retry)
        ending = "_flipped" if self.flip and self.draw_flip(sample_id) else ""
        return {
            "mean": torch.from_numpy(sample[f"mean{ending}"].copy()),
            "std": torch.from_numpy(sample[f"std{ending}"].copy()),
            "labels": torch.tensor(int(sample["label"]), dtype=torch.int64),
            "sample_ids": torch.tensor(int(sample_id), dtype=torch.int64),
        }


def training_set(
    run: ELITRun, batch_size: int, options: StreamOptions
) -> ELITLatentDataset | ImageDataset:
    """What a run trains on: latents of an autoencoder, or the images themselves.

    Raises: DataError if the data and the run's autoencoder do not belong together.
    """
    space, data = run.space, run.data
    if space.kind == "pixels":
        return ImageDataset(
            data.sources,
            image_size=space.image_size,
            train=True,
            augment="flip" if space.flip else "none",
            seed=run.seed,
            batch_size=batch_size,
            options=options,
        )
    assert space.vae is not None  # a rule of the configuration
    dataset = ELITLatentDataset(
        data.sources,
        shuffle=True,
        flip=space.flip,
        seed=run.seed,
        batch_size=batch_size,
        channels=space.channels,
        side=space.side,
        encoder_id=encoder_id(space.vae),
        options=options,
    )
    if dataset.scale != latent_scale(space.vae):
        raise DataError(
            f"{data.sources[0].path} is to be multiplied with {dataset.scale}, but the "
            f"autoencoder {space.vae} divides by {latent_scale(space.vae)}; set space.vae to the "
            "one that encoded"
        )
    return dataset
