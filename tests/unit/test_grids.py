"""Latents on a grid: encoding with the autoencoder of Stable Diffusion, and the data set."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file, save_file
from streaming import MDSWriter
from test_images import write_images
from test_latents import encode
from torch import Tensor
from typed_commands import refusal

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.epochs import CheckedLoader
from lgm_scale.data.images import ImageDataset
from lgm_scale.data.manifest import Manifest, read_manifest, write_manifest
from lgm_scale.data.preparation.encode import main
from lgm_scale.data.preparation.verify import verify
from lgm_scale.errors import CheckpointError, ConfigError, DataError
from lgm_scale.families.elit.data import ELITLatentDataset
from lgm_scale.families.elit.sd_vae import encoder_id, load_sd_vae
from lgm_scale.families.lgm.data import LGMLatentDataset
from lgm_scale.pixels import to_unit_range

COUNT = 40
SIZE = 16
WEIGHTS = "diffusion_pytorch_model.safetensors"
COLUMNS = ("mean", "std", "mean_flipped", "std_flipped")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Noise of 24 x 20 pixels in 3 classes."""
    return write_images(tmp_path_factory.mktemp("images") / "mds", COUNT)


def options(vae: Path, images: Path, **changes: object) -> dict[str, object]:
    values: dict[str, object] = {"encoder": "sd-vae", "vae": vae, "images": images}
    return values | {"image-size": SIZE, "workers": 0} | changes


@pytest.fixture(scope="module")
def grids(vae, images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("grids") / "latents"
    with pytest.MonkeyPatch.context() as patch:
        assert encode(patch, **options(vae, images), out=out) == 0
    return out


@pytest.fixture
def copied(grids, tmp_path) -> Path:
    return Path(shutil.copytree(grids, tmp_path / "copy"))


def dataset_of(data: object, **changes) -> ELITLatentDataset:
    values = {"shuffle": False, "flip": False, "seed": 3, "batch_size": 4, "channels": 4}
    values |= {"side": SIZE // 8, "encoder_id": None}
    data = data if isinstance(data, list) else str(data)
    return ELITLatentDataset(data, **(values | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(vae, images) -> dict[str, Tensor]:
    """Every column by hand: [COUNT, 4, 2, 2] float16."""
    data = ImageDataset(str(images), image_size=SIZE, train=False, seed=0, batch_size=1)
    x = to_unit_range(torch.stack([data[i]["images"] for i in range(COUNT)]))
    net = load_sd_vae(vae)
    with torch.no_grad():
        values = (*net.moments(x), *net.moments(x.flip(-1)))
    return {name: value.half() for name, value in zip(COLUMNS, values, strict=True)}


# What is written


def test_the_moments_of_both_flips_are_stored(grids, expected):
    plain = dataset_of(grids)
    for name in ("mean", "std"):
        stored = torch.stack([plain[i][name] for i in range(COUNT)])
        assert stored.dtype == torch.float16
        assert torch.equal(stored, expected[name])
        assert not torch.equal(expected[name], expected[f"{name}_flipped"].flip(-1))
    assert [int(plain[i]["labels"]) for i in range(COUNT)] == [i % 3 for i in range(COUNT)]


def test_the_manifest_names_encoder_and_form(grids, vae, images):
    manifest = read_manifest(grids, "spatial_latents")
    wanted = {"encoder": "sd-vae", "encoder_id": encoder_id(vae), "channels": 4, "side": 2}
    wanted |= {"scale": 0.18215, "downsampling": 8, "image_size": SIZE, "coverage": [[0, COUNT]]}
    assert {key: manifest.extra[key] for key in wanted} == wanted
    assert manifest.image_size == SIZE
    source = read_manifest(images, "images")
    assert (manifest.classes, manifest.class_counts) == (source.classes, source.class_counts)
    names = ["index.json", "labels.npy", "manifest.json", "shard.00000.mds"]
    assert sorted(contents(grids)) == names  # neither a merge tree nor statistics
    assert dataset_of(grids).scale == 0.18215


def test_the_decoder_does_not_matter(vae, images, grids, tmp_path, monkeypatch, capsys):
    other = Path(shutil.copytree(vae, tmp_path / "other"))
    weights = load_file(other / WEIGHTS)
    save_file({n: w * 2 if "decoder" in n else w for n, w in weights.items()}, other / WEIGHTS)
    assert encode(monkeypatch, **options(other, images), out=grids) == 0
    assert "is there already: 40 images as 4 x 2 x 2 latents of this enc" in capsys.readouterr().out


def test_to_object_storage_and_back(vae, images, grids, tmp_path, monkeypatch):
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in (
            ("S3_ENDPOINT_URL", endpoint),
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="grids")
        out = "s3://grids/latents"
        assert encode(monkeypatch, **options(vae, images), out=out, staging=tmp_path / "s") == 0
        assert not (tmp_path / "s").exists()
        assert verify(out).problems == []
        remote = dataset_of([SourceConfig(path=out, cache=str(tmp_path / "cache"))])
        again = torch.stack([item["mean"] for item in remote])
        assert contents(tmp_path / "cache") == contents(grids)
    finally:
        server.stop()
    assert torch.equal(again, torch.stack([item["mean"] for item in dataset_of(grids)]))


def test_values_beyond_float16_are_refused(vae, images, tmp_path, monkeypatch):
    loud = Path(shutil.copytree(vae, tmp_path / "loud"))
    weights = load_file(loud / WEIGHTS)
    weights["quant_conv.weight"][:4] *= 1e7
    save_file(weights, loud / WEIGHTS)
    with pytest.raises(DataError, match="latents of images 0 to 39 are not finite in float16"):
        encode(monkeypatch, **options(loud, images), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"encoder": "sd-vae"}, "--vae: missing"),
        ({"encoder": "lgm"}, "--tokenizer: missing"),
        ({}, "--tokenizer: missing; --encoder lgm"),
        ({"encoder": "sd-vae", "vae": "v", "tokenizer": "t"}, "--tokenizer: has no effect"),
        ({"tokenizer": "t", "vae": "v"}, "--vae: has no effect with --encoder lgm"),
        ({"tokenizer": "t", "image-size": 256}, "--image-size: has no effect"),
    ],
)
def test_options_must_fit_the_encoder(monkeypatch, words, text):
    with pytest.raises(ConfigError, match=text) as error:
        encode(monkeypatch, **words, images="i", out="o")
    assert len(error.value.problems) == 1


def test_bad_input_is_one_error(vae, images, grids, tmp_path, monkeypatch):
    fresh = options(vae, images) | {"out": tmp_path / "x"}
    for changes, kind, text in (
        ({"image-size": 20}, ConfigError, "--image-size: 20 must be a positive multiple of 8"),
        ({"vae": tmp_path}, CheckpointError, r"has no config\.json, but: nothing"),
        ({"images": grids}, DataError, "holds spatial_latents, but images"),
        ({"out": images}, DataError, "holds images, but spatial_latents"),
    ):
        with pytest.raises(kind, match=text):
            encode(monkeypatch, **fresh | changes)
    assert not (tmp_path / "x").exists()


def test_the_command_ends_with_status_2_and_without_a_traceback(images, tmp_path):
    words = ("--encoder", "sd-vae", "--vae", "stabilityai/sd-vae-ft-mse", "--images", images)
    said = refusal(main, *words, "--out", tmp_path / "x")
    assert "sd-vae-ft-mse does not exist" in said
    assert "nothing is downloaded" in said


# What is read


def test_flips_are_keyed_on_seed_epoch_and_sample(grids, expected):
    def flips(epoch: int, **changes) -> list[bool]:
        dataset = dataset_of(grids, flip=True, **changes)
        dataset.epoch = epoch
        found = []
        for index in range(COUNT):
            item = dataset[index]
            flipped = torch.equal(item["mean"], expected["mean_flipped"][index])
            ending = "_flipped" if flipped else ""
            assert torch.equal(item["mean"], expected[f"mean{ending}"][index])
            assert torch.equal(item["std"], expected[f"std{ending}"][index])
            assert int(item["sample_ids"]) == index
            found.append(flipped)
        return found

    first = flips(0)
    assert 10 < sum(first) < 30
    assert flips(0, shuffle=True, batch_size=8) == first
    assert flips(1) != first
    assert flips(0, seed=4) != first


def test_an_epoch_has_every_sample_once_in_another_order(grids):
    dataset = dataset_of(grids, shuffle=True)
    loader = CheckedLoader(dataset, batch_size=4)
    epochs = []
    for _ in range(2):
        batches = list(loader)
        assert batches[0]["mean"].shape == batches[0]["std"].shape == (4, 4, 2, 2)
        assert batches[0]["mean"].dtype == torch.float16
        epochs.append([int(i) for batch in batches for i in batch["sample_ids"]])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(COUNT))
    assert epochs[0] != epochs[1]


def test_without_flip_an_epoch_has_the_images_as_they_are(grids, expected):
    for batch in CheckedLoader(dataset_of(grids, shuffle=True), batch_size=4):
        assert torch.equal(batch["mean"], expected["mean"][batch["sample_ids"]])


def test_form_and_encoder_must_fit(grids, vae):
    dataset_of(grids, encoder_id=encoder_id(vae))
    wants = "4 channels x 2 x 2, of images of 16 pixels; the model wants"
    for changes, text in (
        ({"side": 32}, f"{wants} 4 x 32 x 32"),
        ({"channels": 16}, f"{wants} 16 x 2 x 2"),
        ({"encoder_id": "0" * 64}, "that of the configured autoencoder is 000000000000"),
    ):
        with pytest.raises(DataError, match=text):
            dataset_of(grids, **changes)


def change_manifest(folder: Path, **extra: object) -> None:
    manifest = read_manifest(folder, "spatial_latents")
    write_manifest(folder, replace(manifest, extra=manifest.extra | extra))


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"encoder_id": "f" * 64}, "of encoder .* of ffffffffffff; latents of two encoders do not"),
        ({"scale": 0.13025}, r"of scale 0\.18215 .* of 0\.13025; latents of two scales do not mix"),
        ({"side": 4}, r"copy holds latents of 4 channels x 4 x 4"),
        ({"channels": 8}, r"copy holds latents of 8 channels x 2 x 2"),
    ],
)
def test_a_mixture_is_of_one_form_and_one_encoder(grids, copied, extra, text):
    sources = [SourceConfig(path=str(folder)) for folder in (grids, copied)]
    both = dataset_of(sources)
    assert both.epoch_samples == 2 * COUNT
    assert torch.equal(both[0]["mean"], both[COUNT]["mean"])
    change_manifest(copied, **extra)
    with pytest.raises(DataError, match=text):
        dataset_of(sources)


def test_a_manifest_without_a_scale_is_damaged(copied):
    change_manifest(copied, scale=None)
    with pytest.raises(DataError, match="has scale None, a number is needed"):
        dataset_of(copied)


def test_the_kinds_of_latents_are_told_apart(grids, images, tmp_path):
    sequence = tmp_path / "sequence"
    column = "ndarray:float16:16,8"
    columns = {"latents": column, "latents_flipped": column, "label": "int"}
    with MDSWriter(out=str(sequence), columns=columns) as writer:
        z = np.zeros((16, 8), np.float16)
        writer.write({"latents": z, "latents_flipped": z, "label": 0})
    write_manifest(sequence, Manifest("latents", 1, ("a",), (1,)))
    with pytest.raises(
        DataError,
        match=r"holds latents, but spatial_latents .*of a tokenizer; latents on "
        r"a grid are needed: encode with --encoder sd-vae",
    ):
        dataset_of(sequence)
    with pytest.raises(
        DataError,
        match=r"holds spatial_latents, but latents .*a grid, .*a sequence of latents .*lgm",
    ):
        LGMLatentDataset(
            str(grids),
            shuffle=True,
            seed=0,
            batch_size=4,
            num_base_tokens=16,
            latent_dim=8,
            tokenizer_id=None,
        )
    with pytest.raises(
        DataError, match=r"holds images, but spatial_latents .*Encode .*--encoder sd-vae"
    ):
        dataset_of(images)
    with pytest.raises(
        DataError, match=r"holds spatial_latents, but images .*images_to_mds.py SRC --out"
    ):
        ImageDataset(str(grids), image_size=SIZE, train=True, seed=0, batch_size=4)
    with pytest.raises(DataError, match=r"nowhere does not exist.*--encoder sd-vae"):
        dataset_of(tmp_path / "nowhere")


# What is verified


def test_verification_knows_grids(grids):
    report = verify(str(grids))
    assert report.problems == []
    assert report.counts.tolist() == [14, 13, 13]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("nan"), "std_flipped has 1 values that are not finite"),
        (-1.0, "std_flipped has 1 values below 0"),
    ],
)
def test_verification_finds_wrong_values(copied, value, text):
    index = json.loads((copied / "index.json").read_text())
    assert index["shards"][0]["column_names"][-1] == "std_flipped"
    path = copied / index["shards"][0]["raw_data"]["basename"]
    path.write_bytes(path.read_bytes()[:-2] + np.float16(value).tobytes())
    problems = "\n".join(verify(str(copied)).problems)
    assert text in problems
    assert "shard.00000.mds has another sha256" in problems


def test_verification_compares_forms_and_refuses_unknown_kinds(copied):
    change_manifest(copied, side=4)
    assert "mean is float16 (4, 2, 2), the manifest says float16 (4, 4, 4)" in "\n".join(
        verify(str(copied)).problems
    )
    path = copied / "manifest.json"
    path.write_text(path.read_text().replace('"spatial_latents"', '"volumes"'))
    with pytest.raises(DataError, match="says kind 'volumes', which this version does not know"):
        verify(str(copied))
