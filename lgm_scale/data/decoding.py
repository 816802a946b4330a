"""Images: decoding anything to RGB, and the two crops. Free of torch."""

from __future__ import annotations

import io
import os
from typing import NamedTuple

import numpy as np
from PIL import Image

from lgm_scale.errors import DataError

MAX_SCALE = 1 / 0.8


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


class Crop(NamedTuple):
    """Where a crop of a scaled image is, before it is made.

    `image` has been halved as often as need be; `scaled` is the width and height to which the
    bicubic filter brings it, `corner` the left and top of the part, in pixels after scaling.
    """

    image: Image.Image
    scaled: tuple[int, int]
    corner: tuple[int, int]


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the smaller side to `size` and cut the middle out.

    Halved with a box filter while both sides are at least twice `size`, then bicubic.

    Source: the centre crop of "Diffusion Models Beat GANs on Image Synthesis" (ADM), from its
    description; FID references are made this way.
    """
    image, (width, height) = _smaller_side(image, size)
    return _made(Crop(image, (width, height), ((width - size) // 2, (height - size) // 2)), size)


def draw_crop(
    image: Image.Image, size: int, rng: np.random.Generator, max_scale: float = MAX_SCALE
) -> Crop:
    """Draw what `random_resized_crop` makes."""
    image, (width, height) = _smaller_side(
        image, int(rng.integers(size, int(size * max_scale) + 1))
    )
    left = int(rng.integers(width - size + 1))
    return Crop(image, (width, height), (left, int(rng.integers(height - size + 1))))


def random_resized_crop(
    image: Image.Image, size: int, rng: np.random.Generator, max_scale: float = MAX_SCALE
) -> Image.Image:
    """Scale the smaller side to a random length in [size, size * max_scale]; cut at random.

    Source: the training crop of ADM, from its description (box halving, then bicubic).
    """
    return _made(draw_crop(image, size, rng, max_scale), size)


def _smaller_side(image: Image.Image, smaller: int) -> tuple[Image.Image, tuple[int, int]]:
    """Halve with a box filter while both sides are at least twice `smaller`.

    Returns: The image, and the width and height that make its smaller side exactly `smaller`.
    """
    while min(image.size) >= 2 * smaller:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = smaller / min(image.size)
    return image, (round(image.width * scale), round(image.height * scale))


def _made(crop: Crop, size: int) -> Image.Image:
    image, scaled, (left, top) = crop
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))
