from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_pipeline import SmallPipeline, run_command
from streaming import StreamingDataset

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.images import ImageDataset
from lgm_scale.data.manifest import read_manifest, write_manifest
from lgm_scale.data.preparation.encode import main
from lgm_scale.data.preparation.latents import (
    LatentWriter,
    batch_indices,
    check_coverage,
    plan_parts,
    share_records,
)
from lgm_scale.data.preparation.parts import PartRecord, PartsFolder
from lgm_scale.errors import DataError, LGMError
from lgm_scale.families.lgm.data import LGMLatentDataset
from lgm_scale.families.lgm.latent_stats import LatentStats, mixed_stats
from lgm_scale.families.tokenizer.bundle import load_tokenizer, tokenizer_id
from lgm_scale.pixels import to_unit_range


def latent_dataset(pipeline: SmallPipeline, **changes) -> LGMLatentDataset:
    arguments = {
        "shuffle": False,
        "seed": 0,
        "batch_size": 4,
        "num_base_tokens": 16,
        "latent_dim": 8,
        "tokenizer_id": None,
    }
    return LGMLatentDataset(str(pipeline.latents), **(arguments | changes))


@pytest.fixture(scope="module")
def stored(small_pipeline) -> np.ndarray:
    """Every stored latent: [samples, flips, N, D] float16."""
    reader = StreamingDataset(local=str(small_pipeline.latents), batch_size=1, shuffle=False)
    return np.stack(
        [np.stack([reader[i]["latents"], reader[i]["latents_flipped"]]) for i in range(len(reader))]
    )


def test_cached_latents_equal_online_encoding(small_pipeline, stored):
    tokenizer = load_tokenizer(small_pipeline.tokenizer)
    images = ImageDataset(small_pipeline.images, image_size=32, train=False, seed=0, batch_size=1)
    assert stored.shape == (68, 2, 16, 8)
    pixels = to_unit_range(torch.stack([images[i]["images"] for i in range(68)]))
    with torch.no_grad():
        plain, flipped = tokenizer.encode(pixels), tokenizer.encode(pixels.flip(-1))
    for index, expected in enumerate((plain, flipped)):
        got = torch.from_numpy(stored[:, index].astype(np.float32))
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)


def test_statistics_are_over_all_stored_latents(small_pipeline, stored):
    stats = LatentStats.load(small_pipeline.latents / "latent_stats.safetensors")
    values = stored.astype(np.float64).reshape(-1, 8)
    np.testing.assert_allclose(stats.mean.numpy(), values.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats.std.numpy(), values.std(0), rtol=1e-5)


def test_flips_are_keyed_on_epoch_and_sample(small_pipeline, stored):
    dataset = latent_dataset(
        small_pipeline, shuffle=True, tokenizer_id=tokenizer_id(small_pipeline.tokenizer)
    )
    choices = []
    for epoch in (0, 0, 1):
        dataset.epoch = epoch
        items = torch.stack([dataset[index]["latents"] for index in range(68)]).numpy()
        flipped = [np.array_equal(item, both[1]) for item, both in zip(items, stored, strict=True)]
        choices.append(flipped)
    assert choices[0] == choices[1] != choices[2]
    assert 20 < sum(choices[0]) < 48
    assert dataset[0]["sample_ids"].item() == 0


def test_shapes_and_tokenizers_must_fit(small_pipeline):
    with pytest.raises(DataError, match="16 tokens x 8 channels; the model wants 64 x 8"):
        latent_dataset(small_pipeline, num_base_tokens=64)
    with pytest.raises(DataError, match="belong to another tokenizer"):
        latent_dataset(small_pipeline, tokenizer_id="0" * 64)


@pytest.mark.slow
def test_two_ranks_write_the_same_latents(small_pipeline, stored, tmp_path):
    out = tmp_path / "latents"
    result = run_command(
        "data_tools/encode_latents.py",
        *("--tokenizer", small_pipeline.tokenizer),
        *("--images", small_pipeline.images),
        *("--out", out, "--batch-size", "5", "--shard-size", "5000"),
        ranks=2,
    )
    assert result.returncode == 0, result.stderr
    reader = StreamingDataset(local=str(out), batch_size=1, shuffle=False)
    again = np.stack([reader[i]["latents"] for i in range(len(reader))])
    np.testing.assert_allclose(
        again.astype(np.float32), stored[:, 0].astype(np.float32), atol=2e-3, rtol=1e-3
    )
    one, two = (
        LatentStats.load(folder / "latent_stats.safetensors")
        for folder in (small_pipeline.latents, out)
    )
    torch.testing.assert_close(one.mean, two.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.std, two.std, atol=1e-5, rtol=1e-5)


def encode(monkeypatch, **arguments: object) -> int:
    options = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr("sys.argv", ["encode_latents.py", *options])
    return main()


def test_a_finished_result_is_kept_and_bad_input_is_named(
    small_pipeline, tmp_path, monkeypatch, capsys
):
    good = {
        "tokenizer": small_pipeline.tokenizer,
        "images": small_pipeline.images,
        "out": small_pipeline.latents,
    }
    assert encode(monkeypatch, **good) == 0
    assert "is there already" in capsys.readouterr().out
    fresh = good | {"out": tmp_path / "x"}
    for changes, text in (
        ({"images": small_pipeline.latents}, "holds latents, but images"),
        ({"images": tmp_path / "none"}, "does not exist"),
        ({"tokenizer": tmp_path}, "is no bundle"),
        ({"out": small_pipeline.images}, "holds images, but latents"),
        ({"batch-size": 0}, "must be 1 or more"),
    ):
        with pytest.raises(LGMError, match=text):
            encode(monkeypatch, **(fresh | changes))
    assert not Path(tmp_path / "x").exists()


def stats_of(values: torch.Tensor, contrasts: torch.Tensor) -> LatentStats:
    """Of latents [M, D] and contrasts [M, R, D]."""
    stats = LatentStats(values.mean(0), values.std(0, correction=0))
    return stats.with_contrasts(contrasts.mean(0), contrasts.std(0, correction=0))


def test_statistics_of_a_mixture_are_those_of_its_samples():
    generator = torch.Generator().manual_seed(0)
    parts = []
    for size, shift in ((300, 0.0), (100, 2.0)):
        values = torch.randn(size, 4, generator=generator) * (1 + shift) + shift
        contrasts = torch.randn(size, 3, 4, generator=generator) - shift
        parts.append((values, contrasts))
    together = stats_of(*(torch.cat(pair) for pair in zip(*parts, strict=True)))
    mixed = mixed_stats([stats_of(*part) for part in parts], [300, 100])
    torch.testing.assert_close(mixed.mean, together.mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed.std, together.std, atol=1e-6, rtol=1e-5)
    assert mixed.contrasts is not None
    assert together.contrasts is not None
    torch.testing.assert_close(mixed.contrasts.mean, together.contrasts.mean)
    torch.testing.assert_close(mixed.contrasts.std, together.contrasts.std)
    assert mixed_stats([mixed], [7]) is mixed


def test_latents_of_two_tokenizers_do_not_mix(small_pipeline, tmp_path):
    other = Path(shutil.copytree(small_pipeline.latents, tmp_path / "other"))
    sources = [SourceConfig(path=str(path)) for path in (small_pipeline.latents, other)]
    arguments = {"shuffle": True, "seed": 0, "batch_size": 4, "num_base_tokens": 16}
    arguments |= {"latent_dim": 8, "tokenizer_id": None}
    both = LGMLatentDataset(sources, **arguments)
    assert both.epoch_samples == 136
    assert both.manifest.class_counts == tuple(2 * n for n in both.manifests[0].class_counts)
    manifest = read_manifest(other, "latents")
    write_manifest(other, replace(manifest, extra={**manifest.extra, "tokenizer_id": "f" * 64}))
    with pytest.raises(DataError, match=r"of tokenizer .* of ffffffffffff; .* do not mix"):
        LGMLatentDataset(sources, **arguments)


def test_the_manifest_proves_that_every_image_was_encoded_once(small_pipeline):
    manifest = read_manifest(small_pipeline.latents, "latents")
    images = read_manifest(small_pipeline.images, "images")
    assert manifest.extra["coverage"] == [[0, 68]]
    assert manifest.extra["images"]["num_samples"] == images.num_samples == 68
    assert manifest.extra["tokenizer_id"] == tokenizer_id(small_pipeline.tokenizer)
    assert manifest.class_counts == images.class_counts
    parts = plan_parts(68, 100, 1000)
    assert parts[0] == (0, 0, 10)
    assert parts[-1] == (6, 60, 68)
    assert batch_indices(parts[5:], 8) == [
        list(range(50, 58)),
        [58, 59],
        list(range(60, 68)),
    ]
    records = [PartRecord([0] * (stop - start), {}) for _, start, stop in parts]
    source = replace(images, classes=("a",), class_counts=(68,))
    check_coverage(parts, records, source)
    short = [*records[:-1], PartRecord([0] * 7, {})]
    with pytest.raises(DataError, match="part 6 holds 7 latents of images 60 to 68"):
        check_coverage(parts, short, source)
    with pytest.raises(DataError, match="other labels"):
        check_coverage(parts, records, replace(source, class_counts=(67,)))


def test_an_interrupted_encoding_goes_on_where_it_was(small_pipeline, tmp_path, monkeypatch):
    options = {
        "tokenizer": small_pipeline.tokenizer,
        "images": small_pipeline.images,
        "shard-size": 8000,
        "batch-size": 4,
        "workers": 0,
    }
    assert encode(monkeypatch, **options, out=tmp_path / "whole") == 0
    write, made = LatentWriter._write_part, []

    def note(self, work, number, *rest) -> None:
        if number == 2 and not made[2:]:
            made.append(number)
            raise KeyboardInterrupt
        made.append(number)
        write(self, work, number, *rest)

    monkeypatch.setattr(LatentWriter, "_write_part", note)
    with pytest.raises(KeyboardInterrupt):
        encode(monkeypatch, **options, out=tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    with pytest.raises(LGMError, match=r"unfinished result of another .*batch_size"):
        encode(monkeypatch, **options | {"batch-size": 5}, out=tmp_path / "stopped")
    assert encode(monkeypatch, **options, out=tmp_path / "stopped") == 0
    assert made == [0, 1, 2, 2, 3, 4]
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "stopped").iterdir()}
    assert len([name for name in files if name.startswith("shard.")]) == 5


class FakeNodes(SimpleNamespace):
    """The calls of the first rank of the first of two nodes; the second one has five records."""

    barrier = staticmethod(lambda: None)
    get_global_rank = staticmethod(lambda: 0)
    local_rank, sent = 0, 0

    def get_local_rank(self) -> int:
        return self.local_rank

    def all_gather_object(self, own):
        if isinstance(own, int):
            return [own, 5]
        assert len(own) <= 1  # never all of a node at once
        self.sent += 1
        return [own, {f"part.{10 + self.sent:05}.json": "{}"} if self.sent <= 5 else {}]


@pytest.mark.parametrize(
    ("local_rank", "remote", "own"), [(0, True, 7), (1, True, 0), (0, False, 0)]
)
def test_nodes_share_their_records_one_by_one(tmp_path, monkeypatch, local_rank, remote, own):
    work = PartsFolder(str(tmp_path / "out"), None, "latents", {}, 16)
    work.folder.mkdir()
    for part in range(7):
        (work.folder / f"part.{part:05}.json").write_text("{}")
    work.remote = remote
    nodes = FakeNodes(local_rank=local_rank)
    monkeypatch.setattr("lgm_scale.data.preparation.latents.dist", nodes)
    share_records(work)
    assert nodes.sent == max(own, 5)
    assert work.record_names() == [f"part.{n:05}.json" for n in (*range(7), *range(11, 16))]
