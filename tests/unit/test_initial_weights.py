"""Weights of a bundle in a network of other sizes: what becomes of which table."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from release_files import shuffle
from small_elit import CLASSES, ELIT, PIXELS, make_elit_bundle
from timm.layers import resample_abs_pos_embed

from lgm_scale.bundle import read_info
from lgm_scale.config.loading import to_dict
from lgm_scale.errors import ConfigError
from lgm_scale.families.elit.config import ELITModelConfig, InterfaceConfig, SpaceConfig
from lgm_scale.families.elit.initial_weights import ELITInitialWeights
from lgm_scale.families.elit.network import build_elit
from lgm_scale.families.lgm.bundle import save_lgm_bundle
from lgm_scale.families.lgm.config import LGMModelConfig
from lgm_scale.families.lgm.initial_weights import LGMInitialWeights
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.network import build_merge_dit
from lgm_scale.families.tokenizer.bundle import save_tokenizer_bundle
from lgm_scale.families.tokenizer.config import TokenizerModelConfig, TokenizerObjectiveConfig
from lgm_scale.families.tokenizer.initial_weights import TokenizerInitialWeights
from lgm_scale.families.tokenizer.network import build_tokenizer
from lgm_scale.initial_weights import GeneratorInitialWeights, InitialWeights, resize_rows

TOKENIZER = TokenizerModelConfig(
    size="tiny", image_size=32, patch_size=8, num_base_tokens=16, latent_dim=8, codebook_size=32
)
GENERATOR = LGMModelConfig(size="tiny", latent_dim=8, num_base_tokens=16, num_classes=3)


def data(classes: tuple[str, ...] = CLASSES, **more: Any) -> Any:
    return SimpleNamespace(manifest=SimpleNamespace(classes=classes), **more)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bundle"
    net = build_tokenizer(TOKENIZER)
    shuffle(net, 1)
    training = {"weights": "ema", "random_assets": ["assets.vgg16"]}
    save_tokenizer_bundle(folder, TOKENIZER, net.state_dict(), net.merge_tree(), training)
    return folder


def from_tokenizer(folder: Path, objective: dict[str, float] | None = None, **changes: Any):
    """Its start, a network of another configuration with its weights, and lines."""
    model = dataclasses.replace(TOKENIZER, **changes)
    objectives = TokenizerObjectiveConfig(**objective or {})
    run = SimpleNamespace(task="tokenizer", model=model, objective=objectives)
    start = TokenizerInitialWeights(run, str(folder), read_info(folder))  # type: ignore[arg-type]
    assert list(start.refused()) == []
    net = build_tokenizer(model)
    return net, start.load(net, None)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    net = build_tokenizer(TOKENIZER)
    run = SimpleNamespace(task="tokenizer", model=TOKENIZER, objective=TokenizerObjectiveConfig())
    TokenizerInitialWeights(run, str(folder), read_info(folder)).load(net, None)  # type: ignore[arg-type]
    return net.state_dict()


def test_a_tokenizer_for_larger_images_interpolates_positions_of_patches(tokenizer):
    net, lines = from_tokenizer(tokenizer, image_size=64)
    old = state_of(tokenizer)
    for name, value in net.state_dict().items():
        if name.endswith("vit.pos_embed"):
            wanted = resample_abs_pos_embed(old[name], [8, 8], num_prefix_tokens=1)
            torch.testing.assert_close(value, wanted)
        else:
            assert torch.equal(value, old[name]), name
    assert "positions of patches: images of 64 pixels here, 32 in the bundle" in lines[2]
    assert "RANDOM WEIGHTS stood in for assets.vgg16" in lines[1]
    assert net(torch.zeros(1, 3, 64, 64), 8).reconstruction.shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("tokens", "how"), [(32, "interpolated"), (8, "a subset")])
def test_a_tokenizer_with_another_number_of_tokens(tokenizer, tokens, how):
    net, lines = from_tokenizer(tokenizer, num_base_tokens=tokens)
    old = state_of(tokenizer)
    for name in ("encoder.latent_tokens", "decoder.latent_pos_embed", "merging.embeddings"):
        table, rows = net.state_dict()[name].squeeze(0), old[name].squeeze(0)
        assert torch.equal(table, resize_rows(rows, tokens, 4))
        assert len({tuple(row.tolist()) for row in table}) == tokens  # none is another's twin
    assert torch.equal(net.quantizer.codes, old["quantizer.codes"])
    assert f"tokens: {tokens} here, 16 in the bundle;" in lines[-1]
    assert how in lines[-1]


def test_rows_are_resized_within_their_segment():
    rows = torch.arange(8.0)[:, None]
    assert resize_rows(rows, 4, 2).flatten().tolist() == [1, 3, 5, 7]
    more = resize_rows(rows, 16, 2).flatten().tolist()
    assert more[:8] == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert more[8:] == [value + 4 for value in more[:8]]
    assert resize_rows(rows, 8, 2) is rows


@pytest.mark.parametrize(
    ("before", "after", "line", "taken"),
    [
        ("lgm", "fixed", "fixed here, lgm in the bundle; its merge tree is taken", True),
        ("lgm", "none", "none here, lgm in the bundle; its merge tree is left out", None),
        ("none", "lgm", "lgm here, none in the bundle; the merge tree starts new", False),
        ("tome", "truncate", "truncate here, tome in the bundle", None),
    ],
)
def test_another_length_control(tmp_path, before, after, line, taken):
    model = dataclasses.replace(TOKENIZER, length_control=before)
    weights = build_tokenizer(model).state_dict()
    save_tokenizer_bundle(tmp_path / "bundle", model, weights, None, {})
    net, lines = from_tokenizer(tmp_path / "bundle", length_control=after)
    assert lines[-1] == f"length control: {line}"
    if taken is not None:
        old = weights.get("merging.embeddings")
        same = old is not None and torch.equal(net.state_dict()["merging.embeddings"], old)
        assert same is taken


def test_what_only_a_tokenizers_training_has_starts_new(tokenizer):
    _, lines = from_tokenizer(tokenizer, {"adversarial": 0.4, "representation": 1.0})
    assert lines[-1].endswith("and new: critic's heads, auxiliary decoder")


# --- generators -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generator") / "bundle"
    net = build_merge_dit(GENERATOR)
    shuffle(net, 2)
    stats = LatentStats(torch.zeros(8), torch.ones(8))
    save_lgm_bundle(folder, GENERATOR, net.state_dict(), stats, CLASSES, tokenizer, {})
    return folder


def lgm_start(folder: Path, tokenizer: Path, **changes: Any) -> LGMInitialWeights:
    model = dataclasses.replace(GENERATOR, **changes)
    run: Any = SimpleNamespace(
        task="generator", model=model, tokenizer=str(tokenizer),
        objective=SimpleNamespace(noise_scale="corrected"),
        lengths=SimpleNamespace(choices=(8, 16)),
    )  # fmt: skip
    return LGMInitialWeights(run, str(folder), read_info(folder))


def test_a_generator_for_another_tokenizer(generator, tmp_path):
    other = dataclasses.replace(TOKENIZER, num_base_tokens=32)
    net = build_tokenizer(other)
    save_tokenizer_bundle(tmp_path / "other", other, net.state_dict(), net.merge_tree(), {})
    start = lgm_start(generator, tmp_path / "other", num_base_tokens=32)
    dit, old = build_merge_dit(start.here), build_merge_dit(GENERATOR)
    lgm_start(generator, tmp_path / "other").load(old, data())
    lines = start.load(dit, data())
    assert torch.equal(dit.pos_embed[0], resize_rows(old.pos_embed[0], 32, 4))
    assert "positions: 32 base tokens here, 16 in the bundle; the table is interp" in lines[-2]
    assert f"tokenizer: {tmp_path / 'other'} is another than the bundle's" in lines[-1]


def test_statistics_and_tree_of_the_data_are_compared(generator, tokenizer):
    tree = build_tokenizer(TOKENIZER).merge_tree()  # random, so another one
    stats = LatentStats(torch.full((8,), 0.5), torch.full((8,), 2.0))
    lines = list(lgm_start(generator, tokenizer).stated(data(stats=stats, tree=tree)))
    assert "means up to 0.5 deviations from the bundle's, deviations 2 to 2 times" in lines[-2]
    assert lines[-1] == "merge tree: this data's own, which merges others at K = 8"


@pytest.mark.parametrize(
    ("there", "here", "rows"),
    [
        (("a", "b"), ("b", "a"), [1, 0]),
        (("crane", "cat", "crane"), ("crane", "crane", "dog"), [0, 2, None]),
        (("0", "1"), ("cat", "dog"), [0, 1]),  # known by number alone
        (("0", "1"), ("cat", "dog", "0"), [None, None, 0]),
        (("x", "y"), ("a", "b"), [None, None]),
    ],
)
def test_rows_of_classes_are_found_by_name(there, here, rows):
    start = GeneratorInitialWeights(None, "bundle", {"classes": list(there)})
    assert start.rows(here) == rows
    table = start.adapt(
        "", torch.arange(len(there) + 1.0)[:, None], -torch.ones(len(here) + 1, 1), data(here)
    )
    assert table.flatten().tolist() == [*(-1 if r is None else r for r in rows), len(there)]


def elit_start(folder: Path, model: ELITModelConfig, space: SpaceConfig) -> ELITInitialWeights:
    run: Any = SimpleNamespace(task="spatial_generator", model=model, space=space)
    start = ELITInitialWeights(run, str(folder), read_info(folder))
    assert list(start.refused()) == []
    return start


def test_an_elit_for_larger_images_and_windows(tmp_path):
    folder = make_elit_bundle(tmp_path / "bundle")  # 4 x 4 tokens in windows of 2 x 2
    model = dataclasses.replace(
        ELIT, interface=InterfaceConfig(split="declared", group_size=4, position_rows=64)
    )
    space = dataclasses.replace(PIXELS, image_size=32)
    net, old = build_elit(model, space), build_elit(ELIT, PIXELS)
    elit_start(folder, ELIT, PIXELS).load(old, data())
    fresh = net.pos_embed.clone()
    lines = elit_start(folder, model, space).load(net, data())
    assert torch.equal(net.pos_embed, fresh)
    state, before = net.state_dict(), old.state_dict()
    for name in ("read.queries", "read.offset", "write.offset", "read.positions"):
        grid = before[name][:16] if name == "read.positions" else before[name]
        wanted = resample_abs_pos_embed(
            grid[None], [int(len(state[name]) ** 0.5)] * 2, num_prefix_tokens=0
        )
        torch.testing.assert_close(state[name], wanted[0])
    assert "positions: images of 32 pixels here, 16 in the bundle" in lines[2]
    assert "windows: 4 tokens a side here, 2 in the bundle" in lines[3]
    assert (
        net(torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64), 4)
        .isfinite()
        .all()
    )


def test_a_sit_becomes_an_elit_whose_core_has_no_effect_yet(tmp_path):
    sit = dataclasses.replace(ELIT, interface=None)
    folder = make_elit_bundle(tmp_path / "bundle", sit)
    net, old = build_elit(ELIT, PIXELS), build_elit(sit, PIXELS)
    elit_start(folder, sit, PIXELS).load(old, data())
    lines = elit_start(folder, ELIT, PIXELS).load(net, data())
    assert lines[-1].startswith("interface: the bundle is a SiT; Read and Write start new, so ")
    state = net.state_dict()
    assert all(torch.equal(state[name], value) for name, value in old.state_dict().items())
    with torch.no_grad():
        for offset in (net.read.offset, net.write.offset):  # type: ignore[attr-defined]
            offset.zero_()
        inputs = (torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 3]))
        old.blocks = torch.nn.ModuleList([old.blocks[0], old.blocks[-1]])  # the core writes nothing
        torch.testing.assert_close(net(*inputs, 16), old(*inputs, 16))
        assert old(*inputs, 16).abs().max() > 0.01
    again = build_elit(sit, PIXELS)
    back = elit_start(make_elit_bundle(tmp_path / "elit"), sit, PIXELS).load(again, data())
    assert "the blocks between them have only seen latents" in back[-1]


def test_another_autoencoder_and_kept_positions_are_told(monkeypatch):
    space = SpaceConfig(kind="sd_vae", image_size=64, vae="new")
    models = {"generator": to_dict(ELIT), "space": to_dict(space)}
    info = {"kind": "spatial_generator", "models": models, "classes": list(CLASSES)}
    info |= {"files": {"positions.safetensors": ""}, "training": {}}
    run: Any = SimpleNamespace(task="spatial_generator", model=ELIT, space=space)
    start = ELITInitialWeights(run, "bundle", info)
    vae = SimpleNamespace(encoder_id=lambda folder: f"id of {folder}", latent_scale=lambda _: 0.2)
    monkeypatch.setitem(sys.modules, "lgm_scale.families.elit.sd_vae", vae)
    latents = data()
    latents.manifest.extra = {"encoder_id": "id of bundle/vae", "scale": 0.2}
    assert "positions: the computed ones, not those that" in list(start.stated(latents))[-1]
    latents.manifest.extra["encoder_id"] = "another"
    assert "autoencoder: new makes other latents" in list(start.stated(latents))[-1]


# --- a family without a class of its own ----------------------------------------------------------


def test_without_a_familys_word_every_weight_must_fit(tmp_path):
    folder = make_elit_bundle(tmp_path / "bundle")
    run: Any = SimpleNamespace(task="spatial_generator")
    start = InitialWeights(run, str(folder), read_info(folder))
    net = build_elit(ELIT, PIXELS)
    start.load(net, None)
    more = dataclasses.replace(ELIT, num_classes=5)
    with pytest.raises(ConfigError) as error:
        start.load(build_elit(more, PIXELS), None)
    assert "does not fit: label_embed.table.weight is [4, 128] there, [6, 128] here;" in str(
        error.value
    )
    with torch.device("meta"):
        sit = build_elit(dataclasses.replace(ELIT, interface=None), PIXELS)
    (line,) = start.misfits(sit)
    assert "read.attn.k_norm.weight is [128] there, not wanted here (" in line
