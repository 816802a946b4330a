"""The data set of MDS image shards.

Pixels are uint8 here; models turn them into [-1, 1]. Augmentation is keyed on (seed, epoch,
sample), so it depends neither on workers and ranks nor on global random state, and a resumed epoch
repeats it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.decoding import (
    MAX_SCALE,
    center_crop,
    decode_image,
    draw_crop,
    random_resized_crop,
)
from lgm_scale.data.epochs import EpochDataset, StreamOptions
from lgm_scale.data.scaling import DeviceCrop, check_pillow, cut_window, largest_window
from lgm_scale.errors import ConfigError

Augment = Literal["crop", "flip", "none"]

CropOn = Literal["auto", "device", "workers"]

_AUGMENTATION_STREAM = 0x696D67  # keeps these draws apart from other uses of (seed, epoch, sample)


# A worker's pixels are Pillow's own bytes, and are copied into the batch at once.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


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
        crop_on: Who scales, cuts and flips for augment "crop", with the same bits: "workers" (the
            default), the "device" where the batch trains, or "auto": the device if it is a GPU. On
            the device, an item is what `scaling.cut_window` says, with two ints, and a batch of
            such items becomes one of images by `finish_batch`.

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
        crop_on: CropOn = "workers",
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
        self._device_crop: DeviceCrop | None = None
        on_device = crop_on == "device" or (crop_on == "auto" and torch.cuda.is_available())
        if on_device and self.augment == "crop":
            check_pillow()
            stored = self.manifest.image_size
            one_size = stored is not None and stored < 2 * image_size
            self._side = stored if one_size and stored else largest_window(image_size)
            self._device_crop = DeviceCrop(image_size, self._side)

    @property
    @override
    def finish_batch(self) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
        return self._device_crop

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """Decode, crop and augment one sample."""
        sample: dict[str, Any] = super().get_item(sample_id, retry)
        name = f"sample {sample_id} of {self.streams[0].local}"
        image = decode_image(sample["image"], name)
        label = int(sample["label"])
        if self._device_crop is not None:
            rng = self._draws(sample_id)
            crop = draw_crop(image, self.image_size, rng, self.max_scale)
            flip = rng.random() < 0.5
            window = cut_window(crop, flip, self.image_size, self._side, name)
            return {**window, "labels": label, "sample_ids": int(sample_id)}
        if self.augment == "crop":
            rng = self._draws(sample_id)
            image = random_resized_crop(image, self.image_size, rng, self.max_scale)
            flip = rng.random() < 0.5
        else:
            if image.size != (self.image_size, self.image_size):
                image = center_crop(image, self.image_size)
            flip = self.augment == "flip" and self._draws(sample_id).random() < 0.5
        pixels = planes(image)
        return {
            "images": pixels.flip(2) if flip else pixels,
            "labels": torch.tensor(label, dtype=torch.int64),
            "sample_ids": torch.tensor(int(sample_id), dtype=torch.int64),
        }

    def _draws(self, sample_id: int) -> np.random.Generator:
        key = [self.seed, self.epoch, int(sample_id), _AUGMENTATION_STREAM]
        # numpy splits integers into words of 32 bits; an array of words is the same key, sooner.
        return np.random.default_rng(np.array(key, np.uint32) if max(key) < 1 << 32 else key)
