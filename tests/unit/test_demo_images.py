"""The demo photographs: complete, reproducible, disjoint, never overwritten."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.demo_images import (
    PHOTOGRAPHS,
    DemoArguments,
    Photograph,
    draw_box,
    find_photograph,
    make_demo_images,
    split_regions,
)
from lgm_scale.errors import ConfigError, DataError, MissingAssetError

FEW = DemoArguments(image_size=32, train_per_class=3, val_per_class=2, seed=5)


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "images"
    make_demo_images(folder, FEW)
    return folder


def test_layout_and_size(demo):
    names = [photograph.name for photograph in PHOTOGRAPHS]
    assert len(names) == 17
    assert names == sorted(names)
    for split, count in (("train", 3), ("val", 2)):
        assert sorted(path.name for path in (demo / split).iterdir()) == names
        for name in names:
            paths = sorted((demo / split / name).iterdir())
            assert [path.name for path in paths] == [f"{i:05d}.jpg" for i in range(count)]
            for path in paths:
                with Image.open(path) as image:
                    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))


def test_same_seed_same_bytes(demo, tmp_path):
    make_demo_images(tmp_path / "again", FEW)
    assert files_of(tmp_path / "again") == files_of(demo)
    other = DemoArguments(32, 3, 2, seed=6)
    make_demo_images(tmp_path / "other", other)
    path = "train/astronaut/00000.jpg"
    assert files_of(tmp_path / "other")[path] != files_of(demo)[path]


def test_more_crops_keep_the_first_ones(demo, tmp_path):
    make_demo_images(tmp_path / "more", DemoArguments(32, 4, 2, seed=5))
    more = files_of(tmp_path / "more")
    assert all(more[name] == data for name, data in files_of(demo).items() if ".jpg" in name)


def test_crops_of_a_photograph_differ(demo):
    for folder in (demo / "train").iterdir():
        assert len({path.read_bytes() for path in folder.iterdir()}) == 3


def overlap(first, second) -> bool:
    return (
        max(first[0], second[0]) < min(first[2], second[2])
        and max(first[1], second[1]) < min(first[3], second[3])
    )  # fmt: skip


@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda photograph: photograph.name)
def test_train_and_val_are_disjoint_and_inside(photograph):
    with Image.open(find_photograph(photograph)) as image:
        size = image.size
    regions = split_regions(size, photograph, 64)
    assert regions.disjoint
    assert not overlap(regions.train, regions.val)
    for region in (regions.train, regions.val):
        for seed in range(50):
            box = draw_box(region, 64, np.random.default_rng(seed))
            assert box[2] - box[0] == box[3] - box[1] >= 64
            assert region[0] <= box[0] < box[2] <= region[2] <= size[0]
            assert region[1] <= box[1] < box[3] <= region[3] <= size[1]


def test_retina_has_no_black_corner():
    retina = next(photograph for photograph in PHOTOGRAPHS if photograph.name == "retina")
    with Image.open(find_photograph(retina)) as image:
        width, height = image.size
        left, top, right, bottom = retina.window
        box = (int(left * width), int(top * height), int(right * width), int(bottom * height))
        red = np.asarray(image.convert("RGB").crop(box))[..., 0]
    assert (red < 60).mean() == 0


def test_a_small_photograph_shares_its_parts_and_says_so(tmp_path):
    assert not split_regions((384, 303), Photograph("coins", "", ""), 256).disjoint
    line = make_demo_images(tmp_path / "large", DemoArguments(256, 1, 1))
    assert "train and val overlap (photograph too small): " in line
    assert "coins" in line
    classes = json.loads((tmp_path / "large" / "dataset.json").read_text())["classes"]
    assert not classes["coins"]["disjoint"]
    assert classes["retina"]["disjoint"]


def test_a_second_run_does_nothing_or_refuses(demo, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    assert "nothing to do" in make_demo_images(demo, FEW)
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before
    with pytest.raises(DataError, match="made with other arguments"):
        make_demo_images(demo, DemoArguments(32, 3, 2, seed=0))
    (tmp_path / "mine.txt").touch()
    with pytest.raises(DataError, match="never overwritten"):
        make_demo_images(tmp_path, FEW)


def test_bad_arguments_are_told_together(tmp_path):
    with pytest.raises(ConfigError) as caught:
        make_demo_images(tmp_path / "x", DemoArguments(2, 0, 0, -1))
    assert len(caught.value.problems) == 4
    with pytest.raises(ConfigError, match="choose at most"):
        make_demo_images(tmp_path / "x", DemoArguments(400, 1, 1))
    assert not (tmp_path / "x").exists()


def test_a_missing_photograph_is_an_asset_error():
    for package in ("skimage", "no_such_package_here"):
        with pytest.raises(MissingAssetError, match="is not installed"):
            find_photograph(Photograph("cow", package, "data/cow.png"))


def test_the_command_fails_in_one_line(demo):
    command = [sys.executable, "-m", "data_tools.demo_images", "--out", str(demo)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "made with other arguments" in result.stderr
    assert "Traceback" not in result.stderr
