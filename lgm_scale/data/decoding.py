"""Images: decoding anything to RGB, and the two crops. Free of torch."""

from __future__ import annotations

import io
import os

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


def _resize_smaller_side(image: Image.Image, smaller: int) -> Image.Image:
    """Scale so that the smaller side is exactly `smaller`: box halving, then bicubic."""
    while min(image.size) >= 2 * smaller:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = smaller / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)
