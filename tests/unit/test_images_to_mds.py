"""Image folders to MDS: bytes kept, order fixed, bad input named, nothing half done."""

from __future__ import annotations

import io
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from kill_points import KillPoints
from PIL import Image
from streaming import StreamingDataset
from typed_commands import refusal

from lgm_scale.data.decoding import center_crop, decode_image
from lgm_scale.data.images import ImageDataset
from lgm_scale.data.manifest import read_manifest
from lgm_scale.data.preparation.convert import convert_folder, encode_jpeg, main
from lgm_scale.data.preparation.image_folder import list_image_folder
from lgm_scale.errors import ConfigError, DataError


def noise(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3))
    return Image.fromarray(pixels.astype(np.uint8)).resize((width, height))


def write_folder(folder: Path) -> Path:
    """Two classes in many formats."""
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
    noise(0).save(folder / "cat" / "a.jpg", quality=80)
    noise(1).save(folder / "cat" / "b.JPEG")
    noise(2).convert("L").save(folder / "cat" / "gray.jpg")
    noise(3).convert("CMYK").save(folder / "cat" / "ink.jpg")
    noise(4).convert("P").save(folder / "dog" / "palette.png")
    noise(5).convert("RGBA").save(folder / "dog" / "rgba.PNG")
    noise(6).save(folder / "dog" / "square.webp", lossless=True)
    noise(7, 24, 24).save(folder / "dog" / "x.jpg")
    gray16 = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(gray16).save(folder / "dog" / "z16.png")
    (folder / "dog" / ".hidden").touch()
    (folder / "dog" / "notes.txt").touch()
    return folder


def stored(folder: Path) -> list[tuple[bytes, int]]:
    dataset = StreamingDataset(local=str(folder), batch_size=1)
    samples = [dataset[i] for i in range(dataset.num_samples)]
    return [(sample["image"], sample["label"]) for sample in samples]


def digests_of(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path) -> Path:
    return write_folder(tmp_path / "source")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_rgb_jpegs_keep_their_bytes_and_others_become_rgb(source, tmp_path):
    line = convert_folder(source, tmp_path / "mds")
    assert "9 images in 2 classes; ignored 1 files" in line
    samples = stored(tmp_path / "mds")
    files = list_image_folder(source).files
    assert [label for _, label in samples] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    for (data, _), file in zip(samples, files, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
        if file.path.name in ("a.jpg", "b.JPEG", "x.jpg"):
            assert data == file.path.read_bytes()
        else:
            wanted = np.asarray(decode_image(file.path), np.float64)
            assert np.abs(np.asarray(decode_image(data), np.float64) - wanted).mean() < 4
    manifest = read_manifest(tmp_path / "mds", "images")
    assert manifest.classes == ("cat", "dog")
    assert manifest.class_counts == (4, 5)
    assert manifest.image_size is None


def test_center_crop_keeps_what_has_the_size(source, tmp_path):
    convert_folder(source, tmp_path / "mds", image_size=24)
    samples = stored(tmp_path / "mds")
    for (data, _), file in zip(samples, list_image_folder(source).files, strict=True):
        if file.path.name == "x.jpg":
            assert data == file.path.read_bytes()
        else:
            assert data == encode_jpeg(center_crop(decode_image(file.path), 24))
    assert read_manifest(tmp_path / "mds", "images").image_size == 24
    dataset = ImageDataset(tmp_path / "mds", image_size=24, train=False, seed=0, batch_size=1)
    assert dataset[8]["images"].shape == (3, 24, 24)


def test_the_bytes_do_not_depend_on_workers_or_place(source, tmp_path):
    convert_folder(source, tmp_path / "one", image_size=16)
    moved = source.rename(tmp_path / "moved")
    convert_folder(moved, tmp_path / "two", image_size=16, num_workers=2)
    assert digests_of(tmp_path / "one") == digests_of(tmp_path / "two")
    assert sorted(digests_of(tmp_path / "one")) == [
        "index.json",
        "labels.npy",
        "manifest.json",
        "shard.00000.mds",
    ]


def test_a_finished_folder_is_skipped_and_another_refused(source, tmp_path):
    target = tmp_path / "mds"
    convert_folder(source, target)
    before = digests_of(target)
    assert "nothing to do" in convert_folder(source, target, num_workers=2)
    with pytest.raises(DataError, match=r"holds another data set \(image_size differ\)"):
        convert_folder(source, target, image_size=16)
    noise(9).save(source / "cat" / "new.jpg")
    with pytest.raises(DataError, match=r"another data set \(fingerprint differ\)"):
        convert_folder(source, target)
    assert digests_of(target) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(DataError, match="never overwritten"):
        convert_folder(source, tmp_path / "other")


def test_foreign_leftovers_are_not_touched(source, tmp_path):
    aside = tmp_path / "mds.partial"
    aside.mkdir()
    (aside / "thesis.tex").touch()
    with pytest.raises(DataError, match="it holds something else"):
        convert_folder(source, tmp_path / "mds")
    assert (aside / "thesis.tex").exists()


def test_a_kill_between_any_two_steps_leaves_no_trace(tmp_path, monkeypatch):
    (tmp_path / "source" / "cat").mkdir(parents=True)
    for i in range(2):
        noise(i, 16, 16).save(tmp_path / "source" / "cat" / f"{i}.jpg")
    convert_folder(tmp_path / "source", tmp_path / "whole", shard_size=1)
    points, step, killed = KillPoints(monkeypatch), 0, True
    while killed:
        step += 1
        target = tmp_path / f"killed{step}"
        convert = partial(convert_folder, tmp_path / "source", target, shard_size=1)
        killed = points.run(convert, step)
        convert()
        assert digests_of(target) == digests_of(tmp_path / "whole"), f"killed before step {step}"
        assert not target.with_name(f"{target.name}.partial").exists()
    assert step > 12  # two shards take that many


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_truncated_image_stops_or_is_skipped(source, tmp_path, num_workers):
    truncate(source / "cat" / "a.jpg")
    (source / "dog" / "rubbish.png").write_bytes(b"rubbish")
    target = tmp_path / "mds"
    with pytest.raises(DataError, match=r"cat/a\.jpg cannot be read.*--skip-unreadable"):
        convert_folder(source, target, num_workers=num_workers)
    assert not target.exists()
    summary = convert_folder(source, target, num_workers=num_workers, skip_unreadable=True)
    assert "skipped 2 unreadable images" in summary
    assert "dog/rubbish.png" in summary
    manifest = read_manifest(target, "images")
    assert manifest.class_counts == (3, 5)
    assert [line.split()[0] for line in manifest.extra["skipped"]] == [
        "cat/a.jpg",
        "dog/rubbish.png",
    ]


def test_a_class_without_readable_images_is_refused(tmp_path):
    (tmp_path / "source" / "cat").mkdir(parents=True)
    (tmp_path / "source" / "cat" / "a.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"class 'cat' .* has no readable image"):
        convert_folder(tmp_path / "source", tmp_path / "mds", skip_unreadable=True)


def test_equal_squares_are_noted(tmp_path):
    (tmp_path / "source" / "cat").mkdir(parents=True)
    for i in range(3):
        noise(i, 16, 16).save(tmp_path / "source" / "cat" / f"{i}.jpg")
    line = convert_folder(tmp_path / "source", tmp_path / "mds")
    assert "3 images of 16 x 16 in 1 classes" in line
    assert read_manifest(tmp_path / "mds", "images").image_size == 16


def break_missing(source: Path) -> str:
    source.rename(source.with_name("gone"))
    return "does not exist"


def break_empty(source: Path) -> str:
    source.rename(source.with_name("gone"))
    source.mkdir()
    return "holds nothing"


def break_archive_only(source: Path) -> str:
    break_empty(source)
    (source / "images.zip").touch()
    return r"holds only files such as images\.zip"


def break_empty_class(source: Path) -> str:
    (source / "bird").mkdir()
    return "bird holds no image"


def break_loose_images(source: Path) -> str:
    noise(0).save(source / "loose.jpg")
    return r"holds 1 images directly \(such as loose\.jpg\)"


def break_same_name(source: Path) -> str:
    (source / "Cat").mkdir()
    noise(0).save(source / "Cat" / "a.jpg")
    return "two class folders of one name, 'Cat' and 'cat'"


def break_same_name_unicode(source: Path) -> str:
    for name in ("caf\u00e9", "cafe\u0301"):
        (source / name).mkdir()
        noise(0).save(source / name / "a.jpg")
    return "two class folders of one name"


def break_too_high(source: Path) -> str:
    (source.parent / "above").mkdir()
    source.rename(source.parent / "above" / "train")
    (source.parent / "above").rename(source)
    return r"holds another folder, 'cat'.*give SRC/train"


def break_dangling_link(source: Path) -> str:
    (source / "cat" / "0.jpg").symlink_to(source / "nowhere.jpg")
    return r"cat/0\.jpg cannot be read: No such file"


BREAKS = [
    break_missing,
    break_empty,
    break_archive_only,
    break_empty_class,
    break_loose_images,
    break_same_name,
    break_same_name_unicode,
    break_too_high,
    break_dangling_link,
]


@pytest.mark.parametrize("spoil", BREAKS, ids=lambda spoil: spoil.__name__)
def test_bad_input_is_named(source, tmp_path, spoil):
    message = spoil(source)
    with pytest.raises(DataError, match=message):
        convert_folder(source, tmp_path / "mds")
    assert not (tmp_path / "mds").exists()


def test_bad_arguments_are_named(source, tmp_path):
    with pytest.raises(ConfigError, match="--image-size is 0"):
        convert_folder(source, tmp_path / "mds", image_size=0)
    with pytest.raises(ConfigError, match="--workers is -1"):
        convert_folder(source, tmp_path / "mds", num_workers=-1)
    with pytest.raises(DataError, match="lies inside SRC"):
        convert_folder(source, source / "mds")


def test_the_command_fails_in_one_line(source, tmp_path):
    truncate(source / "dog" / "palette.png")
    damaged = refusal(main, source, "--out", tmp_path / "mds", "--workers", "2")
    assert "dog/palette.png cannot be read" in damaged
    missing = refusal(main, tmp_path / "nowhere", "--out", tmp_path / "mds")
    assert missing.startswith("error: ")
    assert missing.count("\n") == 1
