"""The verification finds what it says it finds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_images_to_mds import write_folder
from typed_commands import typed

from lgm_scale.data.manifest import read_manifest, write_manifest
from lgm_scale.data.preparation.convert import convert_folder
from lgm_scale.data.preparation.verify import main, verify
from lgm_scale.errors import DataError


@pytest.fixture
def images(tmp_path) -> Path:
    write_folder(tmp_path / "source")
    convert_folder(tmp_path / "source", tmp_path / "mds", 16, shard_size=4000)
    return tmp_path / "mds"


@pytest.fixture
def latents(small_pipeline, tmp_path) -> Path:
    return Path(shutil.copytree(small_pipeline.latents, tmp_path / "latents"))


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def test_good_data_have_no_problem(images, latents):
    for folder, samples in ((images, 9), (latents, 68)):
        report = verify(str(folder), decode=True)
        assert report.problems == []
        assert report.counts.sum() == samples


def test_compressed_shards_are_checked_inside(images, tmp_path):
    folder = tmp_path / "zipped"
    convert_folder(tmp_path / "source", folder, 16, compression="zstd:3", shard_size=4000)
    assert verify(str(folder), num_workers=2).problems == []
    flip_bit(folder / "shard.00001.mds.zstd", 20)
    assert verify(str(folder)).problems[0].startswith("shard.00001.mds.zstd has another sha256")


def test_every_byte_counts(images):
    for name in ("shard.00000.mds", "index.json", "labels.npy"):
        path = images / name
        flip_bit(path, path.stat().st_size - 3)
    text = "\n".join(verify(str(images)).problems)
    for name in ("shard.00000.mds has another sha256", "index.json has", "labels.npy has"):
        assert name in text


def test_missing_and_short_shards_are_listed(images):
    (images / "shard.00000.mds").unlink()
    short = images / "shard.00001.mds"
    short.write_bytes(short.read_bytes()[:-1])
    text = "\n".join(verify(str(images)).problems)
    assert "shard.00000.mds is missing" in text
    assert "shard.00001.mds has" in text
    assert "class 'cat' has" in text


def test_data_without_a_file_or_without_hashes_are_named(images):
    manifest = read_manifest(images, "images")
    write_manifest(images, replace(manifest, files={**manifest.files, "gone.npy": "0"}))
    assert "gone.npy is missing" in verify(str(images)).problems
    write_manifest(images, replace(manifest, files={}))
    assert any("keeps no hashes" in problem for problem in verify(str(images)).problems)


def test_counts_and_sizes_are_compared(images):
    manifest = read_manifest(images, "images")
    write_manifest(images, replace(manifest, class_counts=(5, 4), image_size=24))
    text = "\n".join(verify(str(images)).problems)
    assert "class 'cat' has 4 samples, manifest.json says 5" in text
    assert "image of 16 x 16, the manifest says 24 x 24" in text


def test_latents_that_are_not_finite_are_found(latents):
    index = json.loads((latents / "index.json").read_text())
    path = latents / index["shards"][0]["raw_data"]["basename"]
    data = bytearray(path.read_bytes())
    data[-8 - 4 : -8 - 2] = np.float16("nan").tobytes()  # before the last label
    path.write_bytes(bytes(data))
    text = "\n".join(verify(str(latents)).problems)
    assert "latents_flipped has 1 values that are not finite" in text


def test_latents_cover_every_image_once(latents):
    manifest = read_manifest(latents, "latents")
    assert manifest.extra["coverage"] == [[0, 68]]
    write_manifest(latents, replace(manifest, extra={**manifest.extra, "coverage": [[0, 67]]}))
    assert any("says images 0 to 67" in problem for problem in verify(str(latents)).problems)


def test_the_command_exits_with_1_and_lists_the_problems(images):
    good = typed(main, images, "--histogram")
    assert good.status == 0, good.err
    assert "9 images in 2 classes, 4 to 5 of each" in good.out
    assert "no problem" in good.out
    assert "4  cat" in good.out
    flip_bit(images / "shard.00000.mds", 60)
    bad = typed(main, images, "--workers", "0")
    assert bad.status == 1
    assert "shard.00000.mds has another sha256" in bad.out
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        verify(str(images.parent))
