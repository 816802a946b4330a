"""Features of the tokenizer's encoder: into the shards beside the latents, and out again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_pipeline import SmallPipeline, run_command
from streaming import StreamingDataset
from typed_commands import typed

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.manifest import read_manifest, write_manifest
from lgm_scale.data.preparation import encode
from lgm_scale.data.preparation.verify import verify
from lgm_scale.errors import DataError
from lgm_scale.families.lgm.data import LGMLatentDataset
from lgm_scale.families.lgm.features import (
    FEATURES_NAME,
    FeatureSums,
    load_means,
    save_means,
    some_channels,
)
from lgm_scale.families.lgm.latent_stats import STATS_NAME
from lgm_scale.families.tokenizer.bundle import load_tokenizer

N, C = 16, 5
WIDTH = 96
"""C of the small pipeline's tokenizer."""


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- features beside the latents ------------------------------------------------------------------


def encoded(pipeline: SmallPipeline, out: Path, *options: str) -> Path:
    inputs = ("--images", pipeline.images, "--tokenizer", pipeline.tokenizer, "--out", out)
    said = typed(encode.main, *inputs, "--workers", "0", *options)
    assert said.status == 0, said.err
    return out


@pytest.fixture(scope="module")
def featured(small_pipeline) -> Path:
    return encoded(small_pipeline, small_pipeline.root / "featured", "--features")


@pytest.fixture(scope="module")
def stored(featured) -> dict[str, np.ndarray]:
    """Every column: [samples, ...]."""
    reader = StreamingDataset(local=str(featured), batch_size=1, shuffle=False)
    rows = [reader[i] for i in range(len(reader))]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def dataset(folders: list[Path], feature_dim: int | None, **changes) -> LGMLatentDataset:
    arguments = {"shuffle": False, "seed": 0, "batch_size": 4, "num_base_tokens": 16}
    arguments |= {"latent_dim": 8, "tokenizer_id": None, "feature_dim": feature_dim}
    sources = [SourceConfig(path=str(folder)) for folder in folders]
    return LGMLatentDataset(sources, **(arguments | changes))


def test_features_are_what_the_encoder_gives_and_latents_stay_as_they_are(
    small_pipeline, featured, stored
):
    plain = StreamingDataset(local=str(small_pipeline.latents), batch_size=1, shuffle=False)
    for name in ("latents", "latents_flipped", "label"):
        expected = np.stack([plain[i][name] for i in range(len(plain))])
        np.testing.assert_array_equal(stored[name], expected)
    tokenizer = load_tokenizer(small_pipeline.tokenizer)
    images = randn(2, 3, 32, 32)
    with torch.no_grad():
        z, features = tokenizer.encode_with_features(images)
        assert torch.equal(z, tokenizer.encode(images))
        assert torch.equal(features, tokenizer.encoder(images))
    assert stored["features"].shape == stored["features_flipped"].shape == (68, 16, WIDTH)
    assert stored["features"].dtype == np.float16
    manifest = read_manifest(featured, "latents")
    assert manifest.extra["feature_dim"] == WIDTH
    assert FEATURES_NAME in manifest.files
    both = np.concatenate((stored["features"], stored["features_flipped"])).astype(np.float64)
    means = load_means([featured], [1]).numpy()
    np.testing.assert_allclose(means, both.mean(0), atol=1e-6)
    statistics = [folder / STATS_NAME for folder in (featured, small_pipeline.latents)]
    assert statistics[0].read_bytes() == statistics[1].read_bytes()
    assert verify(str(featured)).problems == []


def test_fewer_channels_are_a_projection_that_all_ranks_draw_alike(
    small_pipeline, stored, tmp_path
):
    folder = encoded(small_pipeline, tmp_path / "few", "--features", "24")
    reader = StreamingDataset(local=str(folder), batch_size=1, shuffle=False)
    project = some_channels(WIDTH, 24, "cpu")
    basis = project(torch.eye(WIDTH))
    torch.testing.assert_close(basis.T @ basis, torch.eye(24), atol=1e-5, rtol=0)
    whole = torch.from_numpy(stored["features"][5].astype(np.float32))
    few = torch.from_numpy(reader[5]["features"].astype(np.float32))
    torch.testing.assert_close(few, project(whole), atol=1e-2, rtol=1e-2)
    assert read_manifest(folder, "latents").extra["feature_dim"] == 24
    assert torch.equal(some_channels(WIDTH, WIDTH, "cpu")(whole), whole)


@pytest.mark.parametrize("channels", ["-1", "4096"])
def test_channels_that_the_encoder_does_not_have_are_refused(small_pipeline, tmp_path, channels):
    inputs = ("--images", small_pipeline.images, "--tokenizer", small_pipeline.tokenizer)
    said = typed(encode.main, *inputs, "--out", tmp_path / "x", f"--features={channels}")
    assert said.status == 2
    assert f"--features: {channels} channels of the " in said.err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_two_ranks_write_the_same_bytes(small_pipeline, tmp_path):
    options = ("--features", "24", "--shard-size", "20000", "--batch-size", "4", "--workers", "0")
    inputs = ("--images", small_pipeline.images, "--tokenizer", small_pipeline.tokenizer)
    for ranks in (1, 2):
        out = ("--out", tmp_path / f"by_{ranks}")
        said = run_command("data_tools/encode_latents.py", *inputs, *out, *options, ranks=ranks)
        assert said.returncode == 0, said.stderr
    files, others = (
        {path.name: path.read_bytes() for path in (tmp_path / f"by_{ranks}").iterdir()}
        for ranks in (1, 2)
    )
    assert files == others
    assert len([name for name in files if name.startswith("shard.")]) > 2


def test_sums_of_parts_are_those_of_the_whole():
    features = randn(7, N, C).half()
    whole, first, second = (FeatureSums(N, C) for _ in range(3))
    whole.add(features)
    first.add(features[:3])
    second.add(features[3:])
    first.merge(second.facts())
    assert torch.equal(first.means(), whole.means())


# --- and back -------------------------------------------------------------------------------------


def test_the_features_of_the_flip_that_is_seen_are_handed_out_on_request_alone(featured, stored):
    asked = dataset([featured], WIDTH, shuffle=True)
    for index in range(0, 68, 7):
        item = asked[index]
        flip = "_flipped" if asked.draw_flip(index) else ""
        for name in ("latents", "features"):
            np.testing.assert_array_equal(item[name].numpy(), stored[f"{name}{flip}"][index])
    plain = dataset([featured], None)
    assert plain[0].keys() == {"latents", "labels", "sample_ids"}
    assert plain.feature_means is None


def test_a_mixture_has_the_mean_features_of_its_samples(featured, tmp_path):
    other = Path(shutil.copytree(featured, tmp_path / "other"))
    means = load_means([featured], [1])
    save_means(means + 1, other / FEATURES_NAME)
    torch.testing.assert_close(load_means([featured, other], [30, 10]), means + 0.25)
    both = dataset([featured, other], WIDTH)
    assert both.epoch_samples == 136
    torch.testing.assert_close(both.feature_means, means + 0.5)


def test_data_without_the_features_are_named_with_the_command_that_makes_them(
    small_pipeline, featured, tmp_path
):
    latents = str(small_pipeline.latents)
    needed = f"{latents} holds latents without features, which objective.feature_alignment needs;"
    with pytest.raises(DataError, match=needed) as told:
        dataset([small_pipeline.latents], 128)
    assert "encode_latents.py --tokenizer BUNDLE --images MDS --out FOLDER --features" in str(
        told.value
    )
    with pytest.raises(DataError, match=r"feature_alignment.channels is 7\. Set it to 96,"):
        dataset([featured], 7)
    with pytest.raises(DataError, match="without features"):
        dataset([featured, small_pipeline.latents], WIDTH)
    copy = Path(shutil.copytree(featured, tmp_path / "copy"))
    manifest = read_manifest(copy, "latents")
    write_manifest(copy, replace(manifest, extra=manifest.extra | {"feature_dim": 3}))
    assert any("the manifest says float16 (16, 3)" in line for line in verify(str(copy)).problems)
    extra = {key: value for key, value in manifest.extra.items() if key != "feature_dim"}
    write_manifest(copy, replace(manifest, extra=extra))
    with pytest.raises(DataError, match="shards have other columns than"):
        dataset([copy], None)
