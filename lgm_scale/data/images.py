"""The data set of MDS image shards.

Pixels are uint8 here; models turn them into [-1, 1]. Augmentation is keyed on (seed, epoch,
sample), so it depends neither on workers and ranks nor on global random state, and a resumed epoch
repeats it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.decoding import MAX_SCALE, center_crop, decode_image, random_resized_crop
from lgm_scale.data.epochs import EpochDataset, StreamOptions
from lgm_scale.errors import ConfigError

Augment = Literal["crop", "flip", "none"]

_AUGMENTATION_STREAM = 0x696D67  # keeps these draws apart from other uses of (seed, epoch, sample)


def planes(image: Image.Image) -> Tensor:
    """The pixels of an RGB image, one channel after the other. Shapes: uint8 [3, H, W]."""
    # Pillow takes the channels of a line apart faster than numpy or torch those of an image.
    lines = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8)
    return torch.from_numpy(lines.reshape(image.height, 3, image.width).transpose(1, 0, 2).copy())


class ImageDataset(EpochDataset):
    """Images and labels from MDS shards written by `lgm_scale.data.preparation.convert`.

    An item is {"images": uint8 [3, S, S], "labels": int64 [], "sample_ids": int64 []}; the sample
    id is the index in the data set. `dataset[i]` works too; a centre crop of a stored image that is
    S x S already is that image.

    Args:
        data: An MDS folder, or sources with their classes and shares.
        image_size: Side S of the images given, in pixels.
        train: Read in another order every epoch.
        augment: "crop" for a random crop and flip (the default with `train`), "flip" for the
            centre crop and a random flip, "none" for the centre crop alone (the default without).
        seed: Decides the order and the augmentation, with the epoch and the sample id alone.
        batch_size: Samples per device and batch; the library deals out samples by it.
        max_scale: Largest scale before the random crop; 1 for no scaling.

    Raises: DataError if a source is no complete MDS folder of images; ConfigError for an
        augmentation that there is not.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | Sequence[SourceConfig],
        *,
        image_size: int,
        train: bool,
        seed: int,
        batch_size: int,
        augment: Augment | None = None,
        max_scale: float = MAX_SCALE,
        options: StreamOptions | None = None,
    ) -> None:
        if max_scale < 1:
            raise ConfigError(f"max_scale is {max_scale}: an image must not become smaller than S")
        if augment not in (None, *get_args(Augment)):
            raise ConfigError(f"augment is {augment!r}: it must be one of {get_args(Augment)}")
        super().__init__(
            data,
            "images",
            shuffle=train,
            seed=seed,
            batch_size=batch_size,
            options=options,
        )
        self.image_size = image_size
        self.augment: Augment = augment or ("crop" if train else "none")
        self.max_scale = max_scale

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, torch.Tensor]:
        """Decode, crop and augment one sample."""
        sample: dict[str, Any] = super().get_item(sample_id, retry)
        image = decode_image(sample["image"], f"sample {sample_id} of {self.streams[0].local}")
        rng = np.random.default_rng([self.seed, self.epoch, int(sample_id), _AUGMENTATION_STREAM])
        if self.augment == "crop":
            image = random_resized_crop(image, self.image_size, rng, self.max_scale)
        elif image.size != (self.image_size, self.image_size):
            image = center_crop(image, self.image_size)
        pixels = planes(image)
        if self.augment != "none" and rng.random() < 0.5:
            pixels = pixels.flip(2)
        return {
            "images": pixels,
            "labels": torch.tensor(int(sample["label"]), dtype=torch.int64),
            "sample_ids": torch.tensor(int(sample_id), dtype=torch.int64),
        }
