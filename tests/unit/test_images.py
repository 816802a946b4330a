"""The image data set, and manifests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from noise_images import image_bytes, noise_image, pixels_of
from PIL import Image
from small_pipeline import run_command
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from torch.utils.data import DataLoader

from lgm_scale.data import streaming_internals
from lgm_scale.data.config import SourceConfig
from lgm_scale.data.decoding import center_crop, random_resized_crop
from lgm_scale.data.epochs import CheckedLoader
from lgm_scale.data.images import ImageDataset
from lgm_scale.data.manifest import (
    Manifest,
    check_shards,
    read_manifest,
    write_manifest,
    written_aside,
)
from lgm_scale.errors import ConfigError, DataError

SIZE = 16


def write_images(folder: Path, num_samples: int, kind: str = "images") -> Path:
    """An MDS folder of noise images, label i % 3."""
    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=1 << 14) as writer:
        for i in range(num_samples):
            writer.write({"image": image_bytes(noise_image(i), "PNG"), "label": i % 3})
    counts = tuple(len(range(c, num_samples, 3)) for c in range(3))
    write_manifest(folder, Manifest(kind, num_samples, ("a", "b", "c"), counts))
    return folder


def dataset_of(folder: Path | list[SourceConfig], **changes) -> ImageDataset:
    values = {"image_size": SIZE, "train": True, "seed": 7, "batch_size": 4, **changes}
    return ImageDataset(folder, **values)


def by_sample(batches) -> dict[int, torch.Tensor]:
    return {
        int(sample_id): image
        for batch in batches
        for sample_id, image in zip(batch["sample_ids"], batch["images"], strict=True)
    }


def same(left: dict[int, torch.Tensor], right: dict[int, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[i], right[i]) for i in left)


# The data set


def test_items_have_the_documented_form(tmp_path):
    dataset = dataset_of(write_images(tmp_path / "mds", 10), train=False)
    item = dataset[4]
    assert item["images"].shape == (3, SIZE, SIZE)
    assert item["images"].dtype == torch.uint8
    assert item["labels"].dtype == torch.int64
    assert (int(item["labels"]), int(item["sample_ids"])) == (1, 4)
    assert torch.equal(item["images"], centre(4))
    assert dataset.manifest is not None
    assert dataset.manifest.classes == ("a", "b", "c")


def test_stored_size_is_not_touched_in_evaluation(tmp_path):
    folder = tmp_path / "mds"
    image = noise_image(0, SIZE, SIZE)
    with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
        writer.write({"image": image_bytes(image, "PNG"), "label": 0})
    write_manifest(folder, Manifest("images", 1, ("a",), (1,), SIZE))
    pixels = dataset_of(folder, train=False, batch_size=1)[0]["images"].numpy()
    assert np.array_equal(pixels, np.asarray(image).transpose(2, 0, 1))


def test_evaluation_is_in_order(tmp_path):
    dataset = dataset_of(write_images(tmp_path / "mds", 10), train=False)
    batches = DataLoader(dataset, batch_size=4)
    assert [int(i) for batch in batches for i in batch["sample_ids"]] == list(range(10))


def test_augmentation_does_not_depend_on_workers_or_global_state(tmp_path):
    folder = write_images(tmp_path / "mds", 24)
    torch.manual_seed(0)
    alone = by_sample(DataLoader(dataset_of(folder), batch_size=4))
    torch.manual_seed(1)
    np.random.seed(1)
    loader = DataLoader(dataset_of(folder), batch_size=4, num_workers=2, persistent_workers=True)
    first, second = by_sample(loader), by_sample(loader)
    assert len(alone) == 24
    assert same(alone, first)
    assert not any(torch.equal(first[i], second[i]) for i in range(24))
    fresh = DataLoader(dataset_of(folder), batch_size=4)
    assert same(alone, by_sample(fresh))
    assert same(second, by_sample(fresh))


def centre(sample_id: int) -> torch.Tensor:
    """A sample of `write_images`, centre-cropped."""
    return pixels_of(center_crop(noise_image(sample_id), SIZE))


def test_training_crops_and_flips_by_default(tmp_path):
    folder = write_images(tmp_path / "mds", 6)
    default, crop = (dataset_of(folder, **more) for more in ({}, {"augment": "crop"}))
    for sample_id in range(6):
        rng = np.random.default_rng([7, 0, sample_id, 0x696D67])
        image = random_resized_crop(noise_image(sample_id), SIZE, rng)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected = pixels_of(image)
        assert torch.equal(default[sample_id]["images"], expected)
        assert torch.equal(crop[sample_id]["images"], expected)


def test_flip_alone_mirrors_the_centre_crop(tmp_path):
    folder = write_images(tmp_path / "mds", 24)
    dataset = dataset_of(folder, augment="flip")

    def flips(epoch: int) -> list[bool]:
        dataset.epoch = epoch
        found = []
        for sample_id in range(24):
            image, plain = dataset[sample_id]["images"], centre(sample_id)
            found.append(torch.equal(image, plain.flip(-1)))
            assert found[-1] or torch.equal(image, plain)
        return found

    first, second = flips(0), flips(1)
    assert 4 < sum(first) < 20
    assert first != second
    assert flips(0) == first


@pytest.mark.parametrize("augment", ["flip", "none"])
def test_training_without_crops_is_shuffled(tmp_path, augment):
    folder = write_images(tmp_path / "mds", 24)
    loader = DataLoader(dataset_of(folder, augment=augment), batch_size=4)
    seen = by_sample(loader)
    assert sorted(seen) == list(range(24)) != list(seen)
    unchanged = [torch.equal(image, centre(sample_id)) for sample_id, image in seen.items()]
    assert all(unchanged) == (augment == "none")


def test_an_unknown_augmentation_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"augment is 'mirror': it must be one of \('crop',"):
        dataset_of(tmp_path, augment="mirror")


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_epoch_repeats_the_augmentation(tmp_path, num_workers):
    folder = write_images(tmp_path / "mds", 24)

    def loader() -> StreamingDataLoader:
        return StreamingDataLoader(dataset_of(folder), batch_size=4, num_workers=num_workers)

    whole = loader()
    _, second = by_sample(whole), list(whole)
    interrupted = loader()
    by_sample(interrupted)
    batches = iter(interrupted)
    for _ in range(2):
        next(batches)
    state = interrupted.state_dict()
    assert state is not None
    resumed = loader()
    resumed.load_state_dict(state)
    rest = list(resumed)
    assert len(rest) == 4
    for batch, expected in zip(rest, second[2:], strict=True):
        assert torch.equal(batch["sample_ids"], expected["sample_ids"])
        assert torch.equal(batch["images"], expected["images"])


_RANK_PROGRAM = """
import os, sys
from torch.utils.data import DataLoader
from lgm_scale.data.images import ImageDataset
dataset = ImageDataset(sys.argv[1], image_size=16, train=True, seed=7, batch_size=int(sys.argv[2]))
with open(f"{sys.argv[3]}/{os.environ['RANK']}.txt", "w") as seen:
    for batch in DataLoader(dataset, batch_size=int(sys.argv[2])):
        print(*batch["sample_ids"].tolist(), file=seen)
"""


def run_ranks(folder: Path, num_ranks: int, global_batch_size: int, out: Path) -> list[set[str]]:
    """The set of samples of each global batch, from real processes."""
    out.mkdir()
    size = str(global_batch_size // num_ranks)
    done = run_command("-c", _RANK_PROGRAM, folder, size, out, ranks=num_ranks)
    assert done.returncode == 0, done.stderr
    outputs = [(out / f"{rank}.txt").read_text().splitlines() for rank in range(num_ranks)]
    return [set(" ".join(lines).split()) for lines in zip(*outputs, strict=True)]


@pytest.mark.slow
@pytest.mark.system
def test_global_batches_do_not_depend_on_the_number_of_ranks(tmp_path):
    folder = write_images(tmp_path / "mds", 24)
    one = run_ranks(folder, 1, 8, tmp_path / "one")
    two = run_ranks(folder, 2, 8, tmp_path / "two")
    assert len(one) == 3
    assert all(len(batch) == 8 for batch in one)
    assert one == two


def test_a_lost_shard_is_an_error_not_a_short_epoch(tmp_path):
    folder = write_images(tmp_path / "mds", 24)
    shards = sorted(folder.glob("shard.*.mds"))
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(DataError, match=r"missing, but index\.json lists it"):
        dataset_of(folder)


@pytest.mark.parametrize(("num_workers", "lost"), [(0, 0), (0, -1), (2, -1), (2, 0)])
def test_an_unreachable_shard_neither_ends_nor_hangs_an_epoch(tmp_path, num_workers, lost):
    folder = write_images(tmp_path / "mds", 24)
    shard = sorted(folder.glob("shard.*.mds"))[lost]
    shard.unlink()
    dataset = dataset_of([SourceConfig(path=str(folder), cache=str(tmp_path / "cache"))])
    timeout = 600 if num_workers else 0  # of a loader whose worker says nothing at all
    loader = CheckedLoader(dataset, batch_size=4, num_workers=num_workers, timeout=timeout)
    with pytest.raises(DataError, match=rf"is not complete: .*{shard.name} could not be fetched"):
        list(loader)


def test_a_shard_that_another_process_gives_up_at_this_moment_is_named(tmp_path, monkeypatch):
    dataset = dataset_of(write_images(tmp_path / "mds", 24))

    def meanwhile(self, shard_id, blocking):
        self._shard_states[shard_id] = streaming_internals._FAILED
        raise RuntimeError("Invalid shard state: 255")

    monkeypatch.setattr(StreamingDataset, "prepare_shard", meanwhile)
    with pytest.raises(DataError, match=r"shard\.00000\.mds could not be fetched by another proc"):
        dataset.prepare_shard(0)


def test_every_process_of_a_node_names_the_cause(tmp_path):
    """A loader hands on the words of one worker: not always of the one that failed."""
    folder = write_images(tmp_path / "mds", 24)
    sorted(folder.glob("shard.*.mds"))[0].unlink()
    dataset = dataset_of([SourceConfig(path=str(folder), cache=str(tmp_path / "cache"))])
    said = []
    for _ in range(2):  # the second look finds the shard lost, as another process does
        with pytest.raises(DataError, match=r"shard\.00000\.mds could not be fetched: ") as error:
            dataset.prepare_shard(0)
        said.append(str(error.value))
    assert said[0] == said[1]


# Manifests


def test_manifest_survives_the_disk(tmp_path):
    folder = write_images(tmp_path / "mds", 10)
    manifest = read_manifest(folder, "images")
    assert manifest == Manifest("images", 10, ("a", "b", "c"), (4, 3, 3), None, {})
    check_shards(folder)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist.*data_tools/images_to_mds\.py"):
        read_manifest(tmp_path / "nowhere", "images")
    with pytest.raises(DataError, match=r"has no index\.json.*data_tools/encode_latents\.py"):
        read_manifest(tmp_path, "latents")
    write_images(tmp_path / "train", 3)
    with pytest.raises(DataError, match=r"Did you mean .*train"):
        read_manifest(tmp_path, "images")


def test_the_wrong_kind_is_named(tmp_path):
    folder = write_images(tmp_path / "mds", 3)
    with pytest.raises(
        DataError, match=r"holds images, but latents .*Encode training images first"
    ):
        read_manifest(folder, "latents")
    with pytest.raises(DataError, match="says kind 'latents'"):
        read_manifest(write_images(tmp_path / "other", 3, kind="latents"), "images")


def test_a_manifest_must_be_there_and_agree(tmp_path):
    folder = write_images(tmp_path / "mds", 3)
    write_manifest(folder, Manifest("images", 4, ("a",), (4,)))
    with pytest.raises(DataError, match=r"counts 4 samples .* counts 3"):
        read_manifest(folder, "images")
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        read_manifest(folder, "images")
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        read_manifest(folder, "images")


def test_zero_samples_are_refused(tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"shards": [], "version": 2}))
    write_manifest(tmp_path, Manifest("images", 0, ("a",), (0,)))
    with pytest.raises(DataError, match="holds 0 samples"):
        read_manifest(tmp_path, "images")


def test_a_folder_is_complete_or_absent(tmp_path):
    folder = tmp_path / "result"

    def interrupted() -> None:
        with written_aside(folder, ("part*",), "command") as aside:
            (aside / "part1").touch()
            raise KeyboardInterrupt

    for _ in range(2):  # the second time over the leftovers of the first
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert not folder.exists()
    (tmp_path / "result.partial" / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"holds 'thesis\.tex'"):
        interrupted()
