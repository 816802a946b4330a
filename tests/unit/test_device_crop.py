"""Crops that the device makes have the bits of Pillow's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from noise_images import image_bytes, pixels_of
from PIL import Image
from safetensors.torch import load_file
from small_pipeline import Steps, metrics, train_in_process
from streaming import MDSWriter
from torch.utils.data import default_collate

from lgm_scale.config.rules import load_training_run
from lgm_scale.data import scaling
from lgm_scale.data.config import SourceConfig
from lgm_scale.data.decoding import draw_crop, random_resized_crop
from lgm_scale.data.epochs import CheckedLoader
from lgm_scale.data.images import ImageDataset
from lgm_scale.data.manifest import Manifest, write_manifest
from lgm_scale.data.scaling import DeviceCrop, bicubic_taps, cut_window, largest_window
from lgm_scale.errors import ConfigError, DataError
from lgm_scale.training.batch_scaling import split_by_tokens

SIZE = 16
PUBLISHED = [(256, new) for new in range(256, 321)]  # of shards that hold 256 pixels


def test_weights_are_those_that_pillow_has():
    """Of an impulse of 2^22 in an image of integers Pillow makes the integers it multiplies by."""
    rng = np.random.default_rng(0)
    others = [tuple(map(int, rng.integers((1, 4), (600, 300)))) for _ in range(80)]
    pairs = [*PUBLISHED, *((old, new) for old, new in others if old < 2.1 * new)]
    assert len(pairs) > 100
    for old, new in pairs:
        num_taps = int(4 * max(old / new, 1)) + 1
        sides = torch.tensor([[old]]), torch.tensor([[new]])
        first, weights = bicubic_taps(torch.arange(new)[None], *sides, num_taps)
        found = np.zeros((new, old + num_taps), np.int32)
        np.put_along_axis(found, first[0].numpy()[:, None] + np.arange(num_taps), weights[0], 1)
        impulses = Image.fromarray(np.eye(old, dtype=np.int32) << 22)
        expected = np.asarray(impulses.resize((new, old), Image.Resampling.BICUBIC)).T
        assert not found[:, old:].any()
        assert np.array_equal(found[:, :old], expected), (old, new)


PATTERNS = {
    "noise": lambda rng, shape: rng.integers(0, 256, shape),
    "extremes": lambda rng, shape: rng.choice([0, 255], shape),  # overshoots, and is clipped
    "checkerboard": lambda rng, shape: np.indices(shape).sum(0) % 2 * 255,
    "stripes": lambda rng, shape: np.indices(shape)[int(rng.integers(2))] // 2 % 2 * 255,
}


def crops_of(images: list[Image.Image], side: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """The same crops of the device and of Pillow; every other one is flipped."""
    items, expected = [], []
    for i, image in enumerate(images):
        drawn = draw_crop(image, SIZE, np.random.default_rng([seed, i]))
        items.append(cut_window(drawn, i % 2 == 1, SIZE, side, "image"))
        made = pixels_of(random_resized_crop(image, SIZE, np.random.default_rng([seed, i])))
        expected.append(made.flip(2) if i % 2 else made)
    return DeviceCrop(SIZE, side)(default_collate(items))["images"], torch.stack(expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_crops_of_images_of_every_size_have_pillows_bits(pattern):
    """Larger than twice the crop (halved first), smaller than it, narrow, and as large."""
    rng = np.random.default_rng(1)
    shapes = [(16, 16), (31, 31), (32, 32), (47, 90), (2, 60), (63, 65), (1, 1), (16, 40), (95, 31)]
    shapes += [tuple(rng.integers(2, 90, 2)) for _ in range(120)]
    images = [
        Image.fromarray(PATTERNS[pattern](rng, (*shape, 3)).astype(np.uint8)) for shape in shapes
    ]
    made, expected = crops_of(images, largest_window(SIZE))
    assert made.is_contiguous()
    assert torch.equal(made, expected)


@pytest.mark.parametrize("stored", [9, 16, 20, 31])
def test_images_of_one_size_are_handed_on_as_they_are(stored):
    rng = np.random.default_rng(stored)
    pixels = [PATTERNS["extremes"](rng, (stored, stored, 3)).astype(np.uint8) for _ in range(40)]
    made, expected = crops_of([Image.fromarray(each) for each in pixels], stored)
    assert torch.equal(made, expected)


def test_another_build_of_pillow_is_noticed(monkeypatch):
    scaling.check_pillow()
    monkeypatch.setattr(scaling, "_BITS", 14)
    with pytest.raises(ConfigError, match="crop_on: device has other bits than this build of Pil"):
        scaling.check_pillow()


def written(folder: Path, sizes: list[tuple[int, int]], image_size: int | None) -> Path:
    rng = np.random.default_rng(0)
    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=1 << 14) as writer:
        for height, width in sizes:
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            writer.write({"image": image_bytes(image, "PNG"), "label": 0})
    write_manifest(folder, Manifest("images", len(sizes), ("a",), (len(sizes),), image_size))
    return folder


def dataset_of(*folders: Path, crop_on, seed: int = 7) -> ImageDataset:
    sources = [SourceConfig(path=str(folder)) for folder in folders]
    options = {"train": True, "batch_size": 4, "crop_on": crop_on}
    return ImageDataset(sources, image_size=SIZE, seed=seed, **options)


@pytest.mark.parametrize("seed", [7, (1 << 32) + 7])
def test_epochs_are_those_of_the_workers(tmp_path, seed):
    """Two sources of one size each, which together are of no one size."""
    same = written(tmp_path / "same", [(20, 20)] * 10, 20)
    other = written(tmp_path / "other", [(24, 19), (50, 41), (16, 16)] * 4, None)
    for folders, shape in (((same,), (20, 20)), ((same, other), (43, 43))):
        left = dataset_of(*folders, crop_on="device", seed=seed)
        right = dataset_of(*folders, crop_on="workers", seed=seed)
        assert right.finish_batch is None
        assert left.finish_batch is not None
        loaders = [CheckedLoader(data, batch_size=4) for data in (left, right)]
        for _ in range(2):
            for batch, expected in zip(*loaders, strict=True):
                assert batch["images"].shape == (4, *shape, 3)
                parts = split_by_tokens(8 * 2)({**batch, "num_tokens": 8}, 0)
                made = [left.finish_batch(part) for part in parts]
                for name, value in expected.items():
                    assert torch.equal(torch.cat([part[name] for part in made]), value)


def test_auto_means_a_gpu(tmp_path, monkeypatch):
    folder = written(tmp_path / "mds", [(20, 20)] * 4, 20)
    assert dataset_of(folder, crop_on="auto").finish_batch is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dataset_of(folder, crop_on="auto").finish_batch is not None
    assert dataset_of(folder, crop_on="workers").finish_batch is None


def test_a_manifest_that_does_not_know_its_images_is_told(tmp_path):
    data = dataset_of(written(tmp_path / "mds", [(16, 31)] * 4, 16), crop_on="device")
    with pytest.raises(DataError, match=r"sample \d of .*mds is 31 x 16 .* all images are 16 x 16"):
        [data[i] for i in range(4)]


def test_without_a_crop_there_is_nothing_to_do_elsewhere(small_pipeline, tmp_path):
    path = small_pipeline.tokenizer_config(tmp_path / "run")
    wrong = ["crop_on=device", "augment=flip"]
    with pytest.raises(ConfigError, match="crop_on: device has no effect with augment: flip, whic"):
        load_training_run(str(path), wrong, 1, has_gpu=False)


def test_a_run_goes_on_with_its_crops_made_elsewhere(small_pipeline, tmp_path):
    short = "train.max_duration=6ba"
    whole = train_in_process(small_pipeline.tokenizer_config(tmp_path / "whole"), short)
    path = small_pipeline.tokenizer_config(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train_in_process(path, short, on_step=Steps(stop=5))
    undone = []
    out = train_in_process(
        *(path, short, "crop_on=device"),
        on_step=lambda step, batch: undone.append("crops" in batch),
    )
    assert undone == [True, True], "steps 4 and 5"
    assert [row["loss"] for row in metrics(out)] == [row["loss"] for row in metrics(whole)]
    weights, expected = (load_file(each / "bundle/tokenizer.safetensors") for each in (out, whole))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
