"""Many images: folders and npz files, the same bits at any batch size, ranks and interruptions."""

from __future__ import annotations

import functools
import json
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rank_processes import start_calls, until, wait_for
from small_pipeline import run_command
from typed_commands import refusal, typed

from lgm_scale import sample
from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.images import open_source
from lgm_scale.evaluation.sweep import image_set
from lgm_scale.evaluation.sweep.samples import write_npz
from lgm_scale.pipeline import load_pipeline

SHORT = ("--num-steps", "3", "--num-tokens", "8", "--chunk-size", "4")


def many(bundle: Path, out: Path, *words: str, count: int = 11) -> str:
    said = typed(sample.main, bundle, "--num-images", str(count), "--out", out, *SHORT, *words)
    assert said.status == 0, said
    return said.out


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


@pytest.fixture(scope="module")
def whole(bundles, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "images"
    many(bundles / "dit", out)
    return out


@pytest.mark.parametrize("kind", ["dit", "elit"])
def test_both_forms_hold_the_images_of_the_pipeline(bundles, tmp_path, kind):
    folder, packed = tmp_path / "images", tmp_path / "images.npz"
    said = many(bundles / kind, folder)
    assert "11 images of 3 classes (3 to 4 each) at K = 8, seed 0, torch.float32" in said
    assert "num_steps 3" in said
    many(bundles / kind, packed, "--batch-size", "3")
    found = np.load(packed)
    assert found.files == ["arr_0", "arr_1"]
    assert found["arr_1"].dtype == np.int64
    assert found["arr_1"].tolist() == [i % 3 for i in range(11)]
    assert list(files(folder)) == [f"{i:08d}_class{i % 3:04d}.png" for i in range(11)]
    pictures = [np.asarray(Image.open(folder / name)) for name in files(folder)]
    assert np.array_equal(np.stack(pictures), found["arr_0"])
    pipe = load_pipeline(bundles / kind, "cpu")
    expected = pipe([i % 3 for i in range(11)], 8, num_steps=3, progress_bar=False)
    assert np.abs(np.asarray(expected).astype(int) - found["arr_0"]).max() <= 1
    assert not (tmp_path / "images.npz.chunks").exists()
    for made_now in (folder, packed):  # as the evaluator reads files of others
        source, _ = open_source(made_now, 16)
        read, _ = source.read(range(len(source)))
        assert np.array_equal(read.permute(0, 2, 3, 1).numpy(), found["arr_0"])


@pytest.mark.parametrize("batch_size", ["1", "7"])
def test_files_are_the_same_bytes_at_every_batch_size(bundles, whole, tmp_path, batch_size):
    many(bundles / "dit", tmp_path / "images", "--batch-size", batch_size)
    assert files(tmp_path / "images") == files(whole)


def test_an_npz_is_written_part_by_part(tmp_path):
    part = np.arange(2**20, dtype=np.uint8).reshape(256, 64, 64, 1)
    tracemalloc.start()
    try:
        write_npz(tmp_path / "a.npz", 64 * 256, (part + np.uint8(i) for i in range(64)))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 8 * part.nbytes < (tmp_path / "a.npz").stat().st_size / 4
    found = np.load(tmp_path / "a.npz")["arr_0"]
    assert np.array_equal(found[-256:], part + np.uint8(63))


def test_an_npz_has_the_same_bytes_whenever_it_is_made(bundles, tmp_path):
    for name in ("a.npz", "b.npz"):
        many(bundles / "dit", tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None
        assert json.loads(archive.comment)["num_tokens"] == 8
    assert "11 images, 0 of them made now" in many(bundles / "dit", tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["images", "images.npz"])
def test_an_interrupted_set_goes_on(bundles, whole, tmp_path, monkeypatch, name):
    """Stopped in its second chunk: the first one stands, and nothing is made twice."""
    real, asked, stop = image_set.sample_images, [], [5]

    def spy(pipe, indices, *rest, **options):
        if stop and int(indices[-1]) >= stop[0]:
            raise KeyboardInterrupt
        asked.extend(indices.tolist())
        return real(pipe, indices, *rest, **options)

    monkeypatch.setattr(image_set, "sample_images", spy)
    words = (bundles / "dit", "--num-images", "11", "--out", tmp_path / name, *SHORT)
    said = typed(sample.main, *words, "--batch-size", "2")
    assert said.status == 130
    assert "the same command again makes what is missing" in said.err
    assert not (tmp_path / "images.npz").exists()
    stop.clear()
    assert "11 images, 7 of them made now" in typed(sample.main, *words).out
    assert sorted(asked) == [0, 1, 2, 3, *range(4, 11)]
    if name == "images":
        assert files(tmp_path / name) == files(whole)
    else:
        pictures = [np.asarray(Image.open(whole / each)) for each in files(whole)]
        assert np.array_equal(np.load(tmp_path / name)["arr_0"], np.stack(pictures))


def test_a_lost_or_damaged_file_is_made_again(bundles, whole, tmp_path):
    out = tmp_path / "images"
    many(bundles / "dit", out)
    (out / "00000001_class0001.png").unlink()
    (out / "00000009_class0000.png").write_bytes(b"damaged")
    assert "7 of them made now" in many(bundles / "dit", out)  # chunks of 4 and of 3
    assert files(out) == files(whole)
    assert "0 of them made now" in many(bundles / "dit", out)


def test_classes_in_turn_and_with_counts(bundles, tmp_path):
    many(bundles / "dit", tmp_path / "turn.npz", "--classes", "eel", "0", count=5)
    assert np.load(tmp_path / "turn.npz")["arr_1"].tolist() == [2, 0, 2, 0, 2]
    many(bundles / "dit", tmp_path / "counts.npz", "--classes", "dog=3", "0=2", count=5)
    assert np.load(tmp_path / "counts.npz")["arr_1"].tolist() == [1, 1, 1, 0, 0]


def test_other_settings_are_refused_with_what_differs(bundles, whole, tmp_path):
    words = (bundles / "dit", "--num-images", "11", "--out", whole, *SHORT)
    said = refusal(sample.main, *words, "--seed", "1", "--cfg-scale", "2")  # 2 is the default
    assert f"--out: {whole} holds images of other settings: seed is 0 there" in said
    assert "seed is 0 there and 1 here; give the same settings to go on, or name another" in said
    said = refusal(sample.main, *words, "--classes", "dog")
    assert "classes is " in said
    packed = tmp_path / "images.npz"
    many(bundles / "dit", packed)
    before = packed.read_bytes()
    said = refusal(sample.main, bundles / "dit", "--num-images", "12", "--out", packed, *SHORT)
    assert "num_images is 11 there and 12 here" in said
    assert packed.read_bytes() == before


@pytest.mark.parametrize("name", ["folder", "file.npz"])
def test_what_is_no_image_set_is_left_alone(bundles, tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "settings.json").write_text('{"mine": 1}')
    (tmp_path / "file.npz").write_bytes(b"mine")
    words = (bundles / "dit", "--num-images", "11", "--out", tmp_path / name, *SHORT)
    assert "holds something else; name another place" in refusal(sample.main, *words)
    assert (tmp_path / "file.npz").read_bytes() == b"mine"
    assert len(list((tmp_path / "folder").iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--num-images", "0"], "--num-images: 0 must be 1 or more"),
        (["--num-images", "4", "--batch-size", "0"], "--batch-size: 0 must be 1 or more"),
        (["--num-images", "4", "--num-tokens", "4", "8"], "--num-tokens: 2 lengths, and --num"),
        (["--num-images", "4", "--num-tokens", "99"], "99"),
        (["--num-images", "4", "--classes", "dog=3"], "make 3; write --num-images 3"),
        (["--num-images", "4", "--classes", "dog=3", "eel"], "give each class a count"),
        (["--num-images", "4", "--classes", "dgo"], "no class is named 'dgo'; nearest: dog"),
        (["--num-images", "4", "--classes", "3"], "index 3 is outside [0, 2]"),
        (["--classes", "dog", "--chunk-size", "4"], "--chunk-size goes with --num-images"),
        ([], "is no image file; end it in .png"),
        (["--num-images", "4", "--out", "a.png"], "name a folder, or a.npz"),
        (["--num-images", "4", "--out", "nowhere/a"], "nowhere is no folder; make it first"),
        (["--num-images", "4", "--uncond-num-tokens", "99"], "99 has no effect"),
        (["--num-images", "4", "--grow", "0:4", "0.1:99"], "0.1:99 is never reached"),
    ],
)
def test_mistakes_are_told_before_a_place_is_claimed(bundles, tmp_path, words, text):
    out = tmp_path / "images"
    assert text in refusal(sample.main, bundles / "dit", "--out", out, *words)
    assert not out.exists()


def test_ranks_get_their_own_device(bundles, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ("--num-images", "4", "--out", tmp_path / "images", "--device", "cuda:1")
    assert "cuda:1 for 2 ranks" in refusal(sample.main, bundles / "dit", *words)


def test_images_that_are_not_finite_are_no_images(bundles, tmp_path, monkeypatch):
    def broken(pipe, indices, *rest, **options):
        return torch.zeros(len(indices), 3, 16, 16, dtype=torch.uint8), indices != 6

    monkeypatch.setattr(image_set, "sample_images", broken)
    out = tmp_path / "images"
    words = (bundles / "dit", "--num-images", "11", "--out", out, *SHORT)
    assert "images at K = 8: 1 of 4 images are not finite (NaN or infinity): [6]" in refusal(
        sample.main, *words
    )
    assert list(files(out)) == [f"{i:08d}_class{i % 3:04d}.png" for i in range(4)]


def test_a_start_that_made_nothing_claims_nothing(bundles, whole, tmp_path, monkeypatch):
    def broken(pipe, indices, *rest, **options):
        return torch.zeros(len(indices), 3, 16, 16, dtype=torch.uint8), indices < 0

    with monkeypatch.context() as patch:
        patch.setattr(image_set, "sample_images", broken)
        words = ("--num-images", "11", "--out", tmp_path / "images", *SHORT, "--seed", "1")
        assert "are not finite" in refusal(sample.main, bundles / "dit", *words)
    many(bundles / "dit", tmp_path / "images")  # another seed
    assert files(tmp_path / "images") == files(whole)


def test_other_pictures_in_the_folder_are_told(bundles, tmp_path):
    out = tmp_path / "images"
    many(bundles / "dit", out)
    (out / "mine.png").touch()
    words = (bundles / "dit", "--num-images", "11", "--out", out, *SHORT)
    assert "holds mine.png, which is none of these images" in refusal(sample.main, *words)


@pytest.mark.parametrize("name", ["images", "images.npz"])
def test_what_a_killed_process_was_writing_goes(bundles, tmp_path, name):
    out = tmp_path / name
    inside = (out if name == "images" else tmp_path) / f".{name}.12345678.partial"
    many(bundles / "dit", out)
    inside.write_bytes(b"half")
    if name == "images":
        many(bundles / "dit", out)
    else:
        out.unlink()
        many(bundles / "dit", out)
    assert not inside.exists()


# --- several processes ------------------------------------------------------------------------


def _sample_on_a_rank(enough: int, found: Callable[[], list[Path]], *words: str) -> None:
    """The command, which stands still once there are `enough` chunks, until it is killed."""
    real = image_set.sample_images

    def sampled(*args, **options):
        if len(found()) >= enough:
            threading.Event().wait()
        return real(*args, **options)

    image_set.sample_images = sampled
    sys.argv = ["sample.py", *words]
    exit_on_user_error(sample.main)


def _chunks(folder: Path) -> list[Path]:
    return list(folder.glob("chunks/*/*.safetensors"))


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("name", ["images", pytest.param("images.npz", marks=pytest.mark.thorough)])
def test_killed_ranks_lose_the_chunk_in_work_and_no_more(bundles, tmp_path, name):
    """Two ranks, killed with -9; three go on; the bytes are those of one process."""
    words = ["--num-images", "60", "--num-steps", "3", "--num-tokens", "8", "--chunk-size", "1"]
    alone, out = tmp_path / f"alone-{name}", tmp_path / name
    assert typed(sample.main, bundles / "dit", "--out", alone, *words).status == 0
    command = [str(bundles / "dit"), "--out", str(out), *words]
    chunks = tmp_path / f"{name}.chunks" if "." in name else out
    found = functools.partial(_chunks, chunks)
    log = tmp_path / "log"
    ranks = start_calls(2, _sample_on_a_rank, 50, found, *command, log=log)
    until(lambda: len(found()) >= 7, ranks, log)
    for rank in ranks:
        rank.kill()
    wait_for(ranks)
    kept = found()
    assert 7 <= len(kept) < 60
    done = run_command("-m", "lgm_scale.sample", *command, ranks=3)
    assert done.returncode == 0, done.stderr
    assert f"60 images, {60 - len(kept)} of them made now" in done.stdout
    if name == "images":
        assert files(out) == files(alone)
    else:
        assert out.read_bytes() == alone.read_bytes()
