"""Images: decoding anything to RGB, the two crops, and the data set of MDS image shards.

Pixels are uint8 here; models turn them into [-1, 1]. Augmentation is keyed on (seed, epoch,
sample), so it depends neither on workers and ranks nor on global random state, and a resumed epoch
repeats it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.epochs import EpochDataset, StreamOptions
from lgm_scale.errors import ConfigError, DataError

Augment = Literal["crop", "flip", "none"]

MAX_SCALE = 1 / 0.8
_AUGMENTATION_STREAM = 0x696D67  # keeps these draws apart from other uses of (seed, epoch, sample)


def decode_image(data: bytes | str | os.PathLike[str], name: str | None = None) -> Image.Image:
    """Decode an image of any mode completely, as RGB.

    Transparency is laid over white; 16-bit gray is scaled (not clipped) to 8 bit. EXIF orientation
    is not applied, as usual for ImageNet.

    `name` is what messages call it; by default the path.

    Units/range: uint8 RGB.
    Raises: DataError naming the file if it is unreadable, truncated or of an unknown pixel format.
    """
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    name = name or ("image" if isinstance(data, bytes) else str(data))
    try:
        with Image.open(source) as image:
            image.load()
            return _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise DataError(f"{name} cannot be read as an image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("pixels are floating point numbers, whose range is not known")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray to 8-bit RGB. Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels span {values.min()} to {values.max()}, outside of 16 bits")
    gray = np.rint(values / 257).astype(np.uint8)
    return Image.fromarray(gray).convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the smaller side to `size` and cut the middle out.

    Halved with a box filter while both sides are at least twice `size`, then bicubic.

    Source: the centre crop of "Diffusion Models Beat GANs on Image Synthesis" (ADM), from its
    description; FID references are made this way.
    """
    image = _resize_smaller_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_resized_crop(
    image: Image.Image, size: int, rng: np.random.Generator, max_scale: float = MAX_SCALE
) -> Image.Image:
    """Scale the smaller side to a random length in [size, size * max_scale]; cut at random.

    Source: the training crop of ADM, from its description (box halving, then bicubic).
    """
    smaller = int(rng.integers(size, int(size * max_scale) + 1))
    image = _resize_smaller_side(image, smaller)
    left = int(rng.integers(image.width - size + 1))
    top = int(rng.integers(image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def random_flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirror left and right with probability one half."""
    if rng.random() < 0.5:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def _resize_smaller_side(image: Image.Image, smaller: int) -> Image.Image:
    """Scale so that the smaller side is exactly `smaller`: box halving, then bicubic."""
    while min(image.size) >= 2 * smaller:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = smaller / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


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
        if self.augment != "none":
            image = random_flip(image, rng)
        pixels = np.array(image).transpose(2, 0, 1)  # [3, S, S]
        return {
            "images": torch.from_numpy(np.ascontiguousarray(pixels)),
            "labels": torch.tensor(int(sample["label"]), dtype=torch.int64),
            "sample_ids": torch.tensor(int(sample_id), dtype=torch.int64),
        }
