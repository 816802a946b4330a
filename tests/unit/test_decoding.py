"""Decoding images of every mode, crops, and pixels as a tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from noise_images import image_bytes, noise_image, pixels_of
from PIL import Image

from lgm_scale.data.decoding import center_crop, decode_image, random_resized_crop
from lgm_scale.data.images import planes
from lgm_scale.errors import DataError

# Decoding


def test_gray_becomes_equal_channels():
    image = decode_image(image_bytes(Image.new("L", (3, 2), 77), "PNG"))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (77, 77, 77)


def test_cmyk_becomes_rgb():
    red = Image.new("RGB", (8, 8), (250, 10, 10)).convert("CMYK")
    r, g, b = decode_image(image_bytes(red, "JPEG", quality=100)).getpixel((4, 4))
    assert r > 200
    assert max(g, b) < 50


def test_palette_with_transparency_lies_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    decoded = decode_image(image_bytes(image, "PNG", transparency=0))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) == (40, 50, 60)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_half_transparent_black_is_half_white(mode):
    color = (0, 128) if mode == "LA" else (0, 0, 0, 128)
    pixel = decode_image(image_bytes(Image.new(mode, (2, 2), color), "PNG")).getpixel((0, 0))
    assert pixel == (127, 127, 127)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(image_format):
    values = np.array([[0, 255, 257, 32768, 65535]], dtype=np.uint16)
    decoded = decode_image(image_bytes(Image.fromarray(values), image_format))
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 1, 1, 128, 255]


def test_palette_one_bit_and_gif_become_rgb():
    for image, image_format in ((Image.new("1", (4, 4), 1), "PNG"), (noise_image(0), "GIF")):
        assert decode_image(image_bytes(image, image_format)).mode == "RGB"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_truncated_image_is_named(image_format, tmp_path):
    data = image_bytes(noise_image(0, 64, 64), image_format)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"cut\.img cannot be read as an image"):
        decode_image(path)


def test_rubbish_and_float_images_are_named():
    with pytest.raises(DataError, match=r"^x\.png cannot be read"):
        decode_image(b"not an image", "x.png")
    floats = image_bytes(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")
    with pytest.raises(DataError, match="floating point"):
        decode_image(floats, "f.tif")


# Crops


def test_center_crop_keeps_the_middle():
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, 2:10] = 200
    assert np.asarray(center_crop(Image.fromarray(pixels), 8)).min() == 200


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (100, 33), (5, 9), (64, 64)])
def test_crops_have_the_size(size):
    image = noise_image(1, *size)
    assert center_crop(image, 16).size == (16, 16)
    for seed in range(20):
        crop = random_resized_crop(image, 16, np.random.default_rng(seed))
        assert crop.size == (16, 16)


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [
        *((mode, "PNG") for mode in ("1", "L", "P", "LA", "RGB", "RGBA")),
        *((mode, "JPEG") for mode in ("L", "RGB", "CMYK")),
    ],
)
@pytest.mark.parametrize("size", [(37, 23), (1, 1), (31, 95)])
def test_planes_are_the_pixels_of_images_of_every_mode(mode, image_format, size):
    image = decode_image(image_bytes(noise_image(3, *size).convert(mode), image_format))
    crops = [image, center_crop(image, 16)]
    crops += [random_resized_crop(image, 16, np.random.default_rng(seed)) for seed in range(3)]
    for crop in crops:
        assert planes(crop).is_contiguous()
        assert torch.equal(planes(crop), pixels_of(crop))


def test_center_crop_is_box_means_at_a_power_of_two():
    image = noise_image(2, 32, 32)
    means = np.asarray(image, np.float64).reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert (
        np.abs(np.asarray(center_crop(image, 8), np.float64) - means).max() <= 2.0
    )  # Pillow rounds up, four times


def test_random_crop_covers_the_scales():
    gradient = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8), (100, 1))).convert("RGB")
    spans = set()
    for seed in range(60):
        crop = np.asarray(random_resized_crop(gradient, 80, np.random.default_rng(seed)))
        spans.add(int(crop[0, -1, 0]) - int(crop[0, 0, 0]))
    assert min(spans) <= 80
    assert max(spans) >= 98
