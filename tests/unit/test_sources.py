"""Tar files and Parquet as sources, and a conversion that is killed."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_pipeline import run_command
from test_images_to_mds import digests_of, noise, stored, truncate

from lgm_scale.data.manifest import read_manifest
from lgm_scale.data.preparation.convert import convert_folder
from lgm_scale.data.preparation.parts import PartsFolder
from lgm_scale.data.preparation.sources import list_source, read_classes
from lgm_scale.errors import ConfigError, DataError

CLASSES = ("n01440764", "n01443537", "n02102040")


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path) -> Path:
    """What all the forms below hold: three classes of two images."""
    for label, name in enumerate(CLASSES):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            path = tmp_path / "train" / name / f"{name}_{i}.JPEG"
            path.write_bytes(jpeg(10 * label + i))
    return tmp_path / "train"


@pytest.fixture
def expected(folder, tmp_path) -> list[tuple[bytes, int]]:
    convert_folder(folder, tmp_path / "expected")
    return stored(tmp_path / "expected")


def tar_of_tars(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as outer:
        for name in sorted(os.listdir(folder), reverse=True):  # order in the file must not matter
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for image in sorted((folder / name).iterdir(), reverse=True):
                    add(inner, image.name, image.read_bytes())
            add(outer, f"{name}.tar", buffer.getvalue())
    return path


def tar_of_folders(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(folder, "train")
    return path


@pytest.mark.parametrize("pack", [tar_of_tars, tar_of_folders])
def test_a_tar_gives_the_shards_of_the_folder(folder, expected, tmp_path, pack):
    path = pack(folder, tmp_path / "train.tar")
    line = convert_folder(path, tmp_path / "mds", num_workers=2)
    assert "6 images in 3 classes" in line
    assert stored(tmp_path / "mds") == expected
    assert read_manifest(tmp_path / "mds", "images").classes == CLASSES


def flat_tar(folder: Path, path: Path) -> tuple[Path, dict[str, str]]:
    labels = {}
    with tarfile.open(path, "w") as tar:
        for i, image in enumerate(sorted(folder.rglob("*.JPEG"))):
            name = f"ILSVRC2012_val_{7919 * (i + 1) % 10000:08d}.JPEG"
            labels[name] = image.parent.name
            add(tar, name, image.read_bytes())
    return path, labels


@pytest.mark.parametrize("form", ["names", "pairs", "kaggle", "numbers"])
def test_a_flat_tar_takes_its_classes_from_a_list(folder, tmp_path, form):
    path, labels = flat_tar(folder, tmp_path / "val.tar")
    names, classes = sorted(labels), None
    if form == "names":
        lines = [labels[name] for name in names]
    elif form == "pairs":
        lines = [f"{name} {labels[name]}" for name in reversed(names)]
    elif form == "kaggle":
        rows = [f"{Path(name).stem},{labels[name]} 1 2 3 4" for name in reversed(names)]
        lines = ["ImageId,PredictionString", *rows]
    else:
        lines, classes = [str(CLASSES.index(labels[name])) for name in names], CLASSES
    (tmp_path / "labels.txt").write_text("\n".join(lines) + "\n")
    listing = list_source(str(path), classes, tmp_path / "labels.txt")
    assert [file.name for file in listing.files] == names
    assert [listing.classes[file.label] for file in listing.files] == [labels[n] for n in names]
    convert_folder(path, tmp_path / "mds", listing=listing)
    assert sorted(stored(tmp_path / "mds")) == sorted(
        (image.read_bytes(), CLASSES.index(image.parent.name)) for image in folder.rglob("*.JPEG")
    )


def test_bad_tars_and_lists_are_named(folder, tmp_path):
    path, labels = flat_tar(folder, tmp_path / "val.tar")
    text = tmp_path / "labels.txt"
    with pytest.raises(DataError, match=r"name the list of their classes with --labels"):
        list_source(str(path))
    text.write_text("n01440764\n")
    with pytest.raises(DataError, match=r"lists 1 classes, but .* holds 6 images"):
        list_source(str(path), None, text)
    text.write_text("490\n" * 6)
    with pytest.raises(DataError, match=r"has numbers \(490\).*counts from 1"):
        list_source(str(path), None, text)
    with pytest.raises(DataError, match=r"label 490, outside of the 3 classes"):
        list_source(str(path), CLASSES, text)
    text.write_text("".join(f"{name} {group}\n" for name, group in list(labels.items())[1:]))
    with pytest.raises(DataError, match="has no class for ILSVRC2012_val_"):
        list_source(str(path), None, text)
    with pytest.raises(DataError, match="goes with a tar file"):
        list_source(str(folder), None, text)
    with pytest.raises(DataError, match="a class 'n02102040' that --classes does not name"):
        list_source(str(tar_of_tars(folder, tmp_path / "t.tar")), CLASSES[:2])
    (tmp_path / "no.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match="cannot be read as an uncompressed tar"):
        list_source(str(tmp_path / "no.tar"))
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    with pytest.raises(DataError, match="names 'a' twice"):
        read_classes(tmp_path / "twice.txt")


def test_tars_and_lists_that_hold_too_little_are_named(folder, tmp_path):
    flat, _ = flat_tar(folder, tmp_path / "val.tar")
    text = tmp_path / "labels.txt"
    with pytest.raises(DataError, match=r"--labels: .* is no file"):
        list_source(str(flat), None, text)
    text.write_text("")
    with pytest.raises(DataError, match=r"--labels: .* is empty"):
        list_source(str(flat), None, text)
    text.write_text("a.JPEG n01440764\nb.JPEG\n")
    with pytest.raises(DataError, match=r"line 2 of .* has no class"):
        list_source(str(flat), None, text)
    text.write_text("n01440764\n" * 6)
    with pytest.raises(DataError, match="--labels: has no effect"):
        list_source(str(tar_of_folders(folder, tmp_path / "train.tar")), None, text)
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        add(tar, "notes.txt", b"x")
    for members, said in [
        ({"a/0.JPEG": jpeg(0), "1.JPEG": jpeg(1)}, r"with and without .* \(such as 1\.JPEG\)"),
        ({"notes.txt": b"x"}, "holds no image"),
        ({"n0.tar": inner.getvalue()}, r"n0\.tar holds no image"),
    ]:
        with tarfile.open(tmp_path / "bad.tar", "w") as tar:
            for name, data in members.items():
                add(tar, name, data)
        with pytest.raises(DataError, match=said):
            list_source(str(tmp_path / "bad.tar"))


def write_parquet(folder: Path, out: Path, features: bool = True, **changes) -> Path:
    """Two files as the hubs make them, with row groups of two."""
    images = sorted(folder.rglob("*.JPEG"))
    rows = [{"bytes": image.read_bytes(), "path": image.name} for image in images]
    labels = [CLASSES.index(image.parent.name) for image in images]
    labels = changes.get("labels", labels)
    table = pa.table({"image": rows, "label": labels})
    if features:
        info = {"info": {"features": {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    out.mkdir()
    for i, part in enumerate((table.slice(0, 4), table.slice(4))):
        pq.write_table(part, out / f"train-{i:05d}-of-00002.parquet", row_group_size=2)
    return out


@pytest.mark.parametrize("pattern", ["", "/train-*.parquet"])
def test_parquet_gives_the_shards_of_the_folder(folder, expected, tmp_path, pattern):
    source = f"{write_parquet(folder, tmp_path / 'hub')}{pattern}"
    convert_folder(source, tmp_path / "mds", num_workers=2, shard_size=3000)
    assert stored(tmp_path / "mds") == expected
    assert len(list((tmp_path / "mds").glob("shard.*"))) > 1
    assert read_manifest(tmp_path / "mds", "images").classes == CLASSES


def test_parquet_labels_may_be_names_or_bare_numbers(folder, tmp_path):
    names = [CLASSES[i // 2] for i in range(6)]
    listing = list_source(str(write_parquet(folder, tmp_path / "a", False, labels=names)))
    assert listing.classes == CLASSES
    numbers = write_parquet(folder, tmp_path / "b", False, labels=[0, 0, 1, 1, 3, 3])
    assert list_source(str(numbers)).classes == ("0", "1", "2", "3")


def test_bad_parquet_is_named(folder, tmp_path, monkeypatch):
    hub = write_parquet(folder, tmp_path / "hub", labels=[0, 1, 2, 3, 0, 1])
    with pytest.raises(DataError, match=r"row 3 of .* has label 3, outside of the 3 classes"):
        list_source(str(hub))
    unlabelled = write_parquet(folder, tmp_path / "test", labels=[-1] * 6)
    with pytest.raises(DataError, match="has label -1, outside"):
        list_source(str(unlabelled))
    with pytest.raises(DataError, match=r"has no column 'jpg' but image, label.*--image-column"):
        list_source(str(hub), image_column="jpg")
    with pytest.raises(DataError, match="no Parquet file matches"):
        list_source(f"{hub}/val-*.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install 'lgm-scale\[parquet\]'"):
        list_source(str(hub))


# Interruptions


def test_a_failed_conversion_goes_on_where_it_was(folder, tmp_path):
    broken = folder / CLASSES[1] / f"{CLASSES[1]}_0.JPEG"
    whole = broken.read_bytes()
    convert_folder(folder, tmp_path / "expected", shard_size=1)
    truncate(broken)
    with pytest.raises(DataError, match="cannot be read as an image"):
        convert_folder(folder, tmp_path / "mds", shard_size=1)
    aside = tmp_path / "mds.partial"
    assert sorted(path.name for path in aside.glob("shard.*")) == [
        "shard.00000.mds",
        "shard.00001.mds",
    ]
    with pytest.raises(DataError, match=r"unfinished result of another .*image_size differ"):
        convert_folder(folder, tmp_path / "mds", 16, shard_size=1)
    summary = convert_folder(folder, tmp_path / "mds", shard_size=1, skip_unreadable=True)
    assert "5 images" in summary
    assert "skipped 1 unreadable images" in summary
    assert len(stored(tmp_path / "mds")) == 5
    broken.write_bytes(whole)


def die_after_five_parts() -> None:
    """SIGKILL to the command and its workers, once five parts are finished and others begun."""
    write = PartsFolder.write

    def dying(self, *arguments):
        write(self, *arguments)
        if len(self.finished()) >= 5:
            os.killpg(0, signal.SIGKILL)

    PartsFolder.write = dying  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.system
def test_kill_9_leaves_finished_shards_that_are_not_read_again(tmp_path):
    source = tmp_path / "source"
    for label in range(4):
        (source / str(label)).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng([label, i]).integers(0, 256, (80, 80, 3), np.uint8)
            Image.fromarray(pixels).save(source / str(label) / f"{i}.png")
    options = ("--image-size", "48", "--shard-size", "8000", "--workers", "2")
    command = ["data_tools/images_to_mds.py", source, *options, "--out"]
    assert run_command(*command, tmp_path / "whole").returncode == 0
    died = run_command(*command, tmp_path / "killed", prepare=die_after_five_parts)
    assert died.returncode == -signal.SIGKILL
    aside = tmp_path / "killed.partial"
    finished = {path.name: path.stat().st_mtime_ns for path in aside.glob("shard.*.mds")}
    records = [json.loads(path.read_text()) for path in aside.glob("part.*.json")]
    done = {record["shard"]["raw_data"]["basename"] for record in records}
    assert not (tmp_path / "killed").exists()
    assert 5 <= len(done) < len(list((tmp_path / "whole").glob("shard.*")))
    assert run_command(*command, tmp_path / "killed").returncode == 0
    killed = tmp_path / "killed"
    assert digests_of(killed) == digests_of(tmp_path / "whole")
    assert all((killed / name).stat().st_mtime_ns == finished[name] for name in done)
