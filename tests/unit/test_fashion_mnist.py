"""Fashion-MNIST: its four files found, read, converted; the classifier in the package."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from lgm_scale.data.fashion_mnist import CLASSES, DEBIAN_FOLDER, PUBLISHED, SPLITS, read_split
from lgm_scale.data.images import ImageDataset
from lgm_scale.data.manifest import read_labels, read_manifest
from lgm_scale.data.preparation import fashion_mnist
from lgm_scale.data.preparation.fashion_mnist import main
from lgm_scale.data.preparation.parts import PartsFolder
from lgm_scale.errors import DataError

COUNTS = {"train": 23, "t10k": 11}


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_files(folder: Path, packed: bool = True, seed: int = 0) -> Path:
    """The four files with a few images of noise, every class among them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for stem, count in COUNTS.items():
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.permutation(np.arange(count, dtype=np.uint8) % 10)
        contents = {f"{stem}-images-idx3-ubyte": pixels, f"{stem}-labels-idx1-ubyte": labels}
        for name, values in contents.items():
            data = gzip.compress(idx(values)) if packed else idx(values)
            (folder / (f"{name}.gz" if packed else name)).write_bytes(data)
    return folder


def convert(source: Path, out: Path) -> None:
    main(["--source", str(source), "--out", str(out)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_shards_hold_every_pixel_class_by_class_in_a_black_frame(tmp_path, capsys):
    source = write_files(tmp_path / "idx")
    convert(source, tmp_path / "out")
    assert "train: 23 images of 32 x 32 in 10 classes" in capsys.readouterr().out
    for split, stem in SPLITS.items():
        raw = gzip.decompress((source / f"{stem}-images-idx3-ubyte.gz").read_bytes())
        pixels = np.frombuffer(raw[16:], np.uint8).reshape(-1, 28, 28)
        raw = gzip.decompress((source / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
        names = [PUBLISHED[label] for label in raw[8:]]
        order = sorted(range(len(names)), key=lambda i: names[i])
        manifest = read_manifest(tmp_path / "out" / split, "images")
        assert manifest.classes == CLASSES
        assert manifest.image_size == 32
        labels = read_labels(tmp_path / "out" / split, manifest)
        assert [CLASSES[label] for label in labels] == [names[i] for i in order]
        dataset = ImageDataset(
            tmp_path / "out" / split, image_size=32, train=False, seed=0, batch_size=1
        )
        for place, index in enumerate(order):
            image = dataset[place]["images"].numpy()
            assert (image[:, 2:30, 2:30] == pixels[index]).all()
            assert image.sum() == 3 * pixels[index].astype(int).sum()  # nothing but black around


def test_the_same_again_does_nothing_and_other_files_are_refused(tmp_path, capsys):
    convert(write_files(tmp_path / "idx"), tmp_path / "out")
    before = contents(tmp_path / "out")
    convert(write_files(tmp_path / "plain", packed=False), tmp_path / "out")
    assert capsys.readouterr().out.count("nothing to do") == 2
    with pytest.raises(DataError, match=r"holds another data set \(sha256 differ\)"):
        convert(write_files(tmp_path / "other", seed=1), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_the_first_images_alone_are_another_data_set(tmp_path, capsys):
    source, out = write_files(tmp_path / "idx"), tmp_path / "out"
    main(["--source", str(source), "--out", str(out), "--train-images", "20"])
    assert "train: 20 images" in capsys.readouterr().out
    labels = read_split(source, "train").labels[:20]
    found = read_labels(out / "train", read_manifest(out / "train", "images"))
    assert list(found) == sorted(labels)
    with pytest.raises(DataError, match="holds another data set"):
        convert(source, out)
    for count in ("0", "24"):
        with pytest.raises(DataError, match=f"--train-images: {count} must be 1 to 23"):
            main(["--source", str(source), "--out", str(tmp_path / "x"), "--train-images", count])


def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    source = write_files(tmp_path / "idx")
    monkeypatch.setattr(fashion_mnist, "IMAGES_PER_PART", 5)
    convert(source, tmp_path / "whole")
    write, made = PartsFolder.write, []

    def interrupted(self, part, *rest):
        made.append(part)
        if len(made) == 3:
            raise KeyboardInterrupt
        write(self, part, *rest)

    monkeypatch.setattr(PartsFolder, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()
    convert(source, tmp_path / "out")
    assert made[:6] == [0, 1, 2, 2, 3, 4]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_missing_or_damaged_is_named_with_a_way_out(tmp_path):
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is missing: .*apt-get .*--do"):
        convert(tmp_path / "nothing", tmp_path / "out")
    source = write_files(tmp_path / "idx")
    images, labels = (source / f"t10k-{n}-ubyte.gz" for n in ("images-idx3", "labels-idx1"))
    good = labels.read_bytes()
    for data, message in (
        (good[:-9], "cannot be read"),
        (gzip.compress(gzip.decompress(good)[:-1]), "is no IDX file of 1 dimensions, or is cut"),
        (gzip.compress(idx(np.zeros((11, 1), np.uint8))), "is no IDX file of 1 dimensions"),
        (gzip.compress(idx(np.full(11, 10, np.uint8))), "has label 10: 0 to 9"),
        (gzip.compress(idx(np.zeros(4, np.uint8))), "11 images and .* 4 labels"),
    ):
        labels.write_bytes(data)
        with pytest.raises(DataError, match=message):
            read_split(source, "val")
    labels.write_bytes(good)
    images.write_bytes(gzip.compress(idx(np.zeros((11, 40, 28), np.uint8))))
    with pytest.raises(DataError, match="28 x 40, which do not fit into 32 x 32"):
        read_split(source, "val")


def test_a_download_is_torchvisions_and_says_what_else_helps(tmp_path, monkeypatch, capsys):
    asked = []

    def found(root, download):
        asked.append((root, download))
        write_files(Path(root) / "FashionMNIST" / "raw", packed=False)

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", found)
    main(["--download", "--out", str(tmp_path / "out")])
    assert asked == [(str(tmp_path / "out" / "download"), True)]
    assert "val: 11 images" in capsys.readouterr().out
    main(["--out", str(tmp_path / "out")])  # as `make demo` does after it
    assert capsys.readouterr().out.count("is already there, made from the same files") == 2

    def offline(root, download):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", offline)
    with pytest.raises(DataError, match=r"--download: Error downloading .*apt-get install"):
        main(["--download", "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit) as ended:
        main(["--download", "--source", "x", "--out", str(tmp_path / "other")])
    assert ended.value.code == 2


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_debians_package_is_read():
    found = read_split(DEBIAN_FOLDER, "val")
    assert found.images.shape == (10_000, 32, 32)
    assert np.bincount(found.labels).tolist() == [1000] * 10
