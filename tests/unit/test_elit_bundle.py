"""Bundles and pipeline of generators on a grid: what comes back, what is said about wrong input."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_elit import (
    BUDGETS,
    CLASSES,
    ELIT,
    PIXELS,
    StandInVAE,
    make_elit_bundle,
    small_network,
    use_stand_in,
)
from small_sweep import make_bundles

import lgm_scale
from lgm_scale import sample as sample_command
from lgm_scale.bundle import read_bundle, set_sampling_defaults
from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.elit import network as elit
from lgm_scale.families.elit.bundle import ELITBundle, load_elit_bundle, save_elit_bundle
from lgm_scale.families.elit.config import SpaceConfig
from lgm_scale.families.elit.pipeline import ELITPipeline
from lgm_scale.families.elit.sampling import initial_state_noise
from lgm_scale.families.lgm.bundle import load_lgm_bundle
from lgm_scale.families.lgm.pipeline import LGMPipeline
from lgm_scale.pipeline import load_pipeline
from lgm_scale.pixels import PIXEL_STD, to_uint8
from lgm_scale.sampling.config import CFGRescale, Guidance, SamplerConfig

SD_VAE = SpaceConfig(kind="sd_vae", image_size=32, vae="/somewhere/else")
ON_LATENTS = replace(ELIT, patch_size=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return make_elit_bundle(tmp_path_factory.mktemp("bundle") / "elit")


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """An LGM generator bundle."""
    folder = tmp_path_factory.mktemp("merged")
    make_bundles(folder, {"config": {"objective": {"noise_scale": "corrected"}}})
    return folder / "dit"


@pytest.fixture(scope="module")
def pipe(bundle) -> ELITPipeline:
    return ELITPipeline.from_bundle(bundle, device="cpu")


@pytest.fixture
def on_latents(tmp_path, monkeypatch) -> Path:
    """A bundle on an autoencoder's latents, with a stand-in for it."""
    use_stand_in(monkeypatch)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "weights.txt").write_text("0.25")
    weights = small_network(ON_LATENTS, SD_VAE).state_dict()
    folder = tmp_path / "latents"
    save_elit_bundle(folder, ON_LATENTS, SD_VAE, weights, CLASSES, {}, vae=tmp_path / "vae")
    shutil.rmtree(tmp_path / "vae")
    return folder


def quiet(pipe, *args, **settings):
    return pipe(*args, progress_bar=False, **{"num_steps": 5} | settings)


# --- the folder -------------------------------------------------------------------------------


def test_a_bundle_holds_all_it_needs(bundle):
    state = torch.get_rng_state()
    loaded = load_elit_bundle(bundle)
    assert torch.equal(torch.get_rng_state(), state)  # no initial weights are drawn
    assert isinstance(loaded.net, elit.ELIT)
    assert (loaded.model, loaded.space, loaded.vae) == (ELIT, PIXELS, None)
    assert loaded.classes == CLASSES
    assert loaded.info["training"] == {"steps": 70}
    expected = small_network().state_dict()
    assert loaded.net.state_dict().keys() == expected.keys()
    for name, value in loaded.net.state_dict().items():
        assert torch.equal(value, expected[name])
    assert not any(p.requires_grad for p in loaded.net.parameters())
    assert not loaded.net.training


def test_saving_again_gives_the_same_bytes(bundle, tmp_path):
    again = make_elit_bundle(tmp_path / "again")
    names = sorted(path.name for path in bundle.iterdir())
    assert names == ["bundle.json", "generator.safetensors"]
    for name in names:
        assert (again / name).read_bytes() == (bundle / name).read_bytes()


def test_the_autoencoder_travels_with_its_bundle(on_latents):
    info = read_bundle(on_latents, "spatial_generator")
    assert set(info["files"]) == {"generator.safetensors", "vae/weights.txt"}
    assert info["models"]["space"]["vae"] is None, "a path of the machine it was made on"
    loaded = load_elit_bundle(on_latents)
    assert isinstance(loaded.vae, StandInVAE)
    assert loaded.vae.gain.item() == 0.25
    assert (loaded.net.channels, loaded.net.side) == (4, 4)
    (on_latents / "vae" / "weights.txt").write_text("0.5")
    with pytest.raises(CheckpointError, match=r"vae/weights\.txt is missing or differs"):
        load_elit_bundle(on_latents)


def test_kinds_are_not_mixed(bundle, merged):
    with pytest.raises(CheckpointError, match="is a generator bundle; a spatial_generator bundle"):
        load_elit_bundle(merged)
    with pytest.raises(CheckpointError, match="is a spatial_generator bundle; a generator bundle"):
        load_lgm_bundle(bundle)
    with pytest.raises(CheckpointError, match=r"generator: LGM.*; spatial_generator: ELIT"):
        LGMPipeline.from_bundle(bundle, "cpu")
    with pytest.raises(CheckpointError, match=r"a tokenizer bundle is needed here$"):
        read_bundle(bundle, "tokenizer")
    tokenizer = merged.parent / "tokenizer"
    with pytest.raises(CheckpointError, match="a generator or spatial_generator bundle is needed"):
        load_pipeline(tokenizer, "cpu")


def edited(bundle: Path, to: Path, **changes: object) -> Path:
    shutil.copytree(bundle, to)
    info = json.loads((to / "bundle.json").read_text())
    (to / "bundle.json").write_text(json.dumps(info | changes))
    return to


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"version": 2}, "reads version 1"),
        ({"classes": ["cat"]}, "1 names for the 3 classes of its generator"),
        ({"models": {}}, "generator configuration is damaged"),
        ({"models": {"generator": {"num_classes": 3}}}, "space configuration is damaged"),
        (
            {"models": {"generator": {"num_classes": 3, "patch_size": 5},
                        "space": {"kind": "pixels", "image_size": 16}}},
            "patch_size: 5 does not divide",
        ),
        (
            {"models": {"generator": {"num_classes": 3},
                        "space": {"kind": "pixels", "image_size": 16}}},
            "does not fit its configuration",
        ),
        ({"files": {"../bundle/generator.safetensors": ""}}, "is no file of the bundle"),
        ({"files": {"/etc/hostname": ""}}, "is no file of the bundle"),
        ({"files": 3}, "is damaged"),
    ],
)  # fmt: skip
def test_damage_is_named(bundle, tmp_path, changes, text):
    with pytest.raises(CheckpointError, match=text):
        load_elit_bundle(edited(bundle, tmp_path / "damaged", **changes))


def test_a_space_and_its_autoencoder_go_together(tmp_path):
    weights = small_network().state_dict()
    with pytest.raises(ConfigError, match="vae: here; a bundle in the space 'pixels' has no auto"):
        save_elit_bundle(tmp_path / "a", ELIT, PIXELS, weights, CLASSES, {}, vae="here")
    with pytest.raises(ConfigError, match="'sd_vae' needs the folder of its autoencoder"):
        save_elit_bundle(tmp_path / "a", ON_LATENTS, SD_VAE, weights, CLASSES, {})
    with pytest.raises(CheckpointError, match="2 names for the 3 classes"):
        save_elit_bundle(tmp_path / "a", ELIT, PIXELS, weights, CLASSES[:2], {})
    assert not (tmp_path / "a").exists()
    latents = ELITBundle(small_network(), None, ELIT, SD_VAE, CLASSES, {})
    with pytest.raises(CheckpointError, match="'sd_vae' and its decoder do not belong together"):
        ELITPipeline(latents)


# --- the pipeline -----------------------------------------------------------------------------


def test_one_door_for_both_families(bundle, merged):
    assert isinstance(load_pipeline(bundle, "cpu"), ELITPipeline)
    assert isinstance(load_pipeline(merged, "cpu"), LGMPipeline)
    assert lgm_scale.load_pipeline is load_pipeline
    assert lgm_scale.ELITPipeline is ELITPipeline


def test_two_lines_give_images(bundle):
    pipe = lgm_scale.load_pipeline(bundle, device="cpu")
    images = quiet(pipe, [2, "dog"], num_tokens=8, cfg_scale=2.0, seed=1)
    assert images.shape == (2, 16, 16, 3)
    assert images.dtype == np.uint8
    assert images.std() > 10
    pictures = quiet(pipe, [2, "dog"], 8, 2.0, 1, output="pil")
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), images)
    assert quiet(pipe, []).shape == (0, 16, 16, 3)


def test_without_a_budget_all_tokens_are_used(pipe, capsys):
    images = pipe([0, 1], num_steps=5)
    assert "K=16" in capsys.readouterr().err
    assert np.array_equal(images, quiet(pipe, [0, 1], 16))
    assert not np.array_equal(images, quiet(pipe, [0, 1], 4))


def test_defaults_are_the_published_settings(pipe):
    assert pipe.config(8) == SamplerConfig(
        num_steps=51, cfg_scale=1.0, cfg_interval=(0.0, 1.0), cfg_rescale=CFGRescale.NONE,
        timestep_shift=1.0,
    )  # fmt: skip
    assert pipe.config(8).num_forwards() == 50


def test_images_do_not_depend_on_batches(pipe):
    labels = [0, 1, 2, 1, 0]
    together = quiet(pipe, labels, 8).astype(int)
    split = quiet(pipe, labels, 8, batch_size=2).astype(int)
    last = quiet(pipe, labels[3:], 8, first_index=3).astype(int)
    assert np.abs(together - split).max() <= 1
    assert np.abs(together[3:] - last).max() <= 1
    assert np.abs(together[1] - together[3]).max() > 1, "one class, two indices, one image"


@pytest.mark.parametrize(
    "settings",
    [
        {"cfg_scale": 4.0},
        {"cfg_scale": 4.0, "uncond_num_tokens": 4},
        {"cfg_scale": 4.0, "uncond_num_tokens": 4, "guidance": "autoguidance"},
        {"solver": "heun"},
        {"length_schedule": [[0.0, 4], [0.5, 8]]},
    ],
)
def test_every_setting_reaches_the_sampler(pipe, settings):
    default = quiet(pipe, [0, 1], 8).astype(int)
    assert np.abs(quiet(pipe, [0, 1], 8, **settings).astype(int) - default).max() > 0


def test_pixels_are_the_state_times_their_deviation(pipe):
    state = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(pipe.decode(state), 0.5 * state)
    assert PIXEL_STD == 0.5
    noise = initial_state_noise(0, torch.arange(2), 3, 16)
    one_step = pipe.bundle.net.eval()(noise, torch.zeros(2), torch.tensor([0, 1]), 8)
    expected = to_uint8((noise + one_step) * PIXEL_STD).permute(0, 2, 3, 1).numpy()
    assert np.abs(quiet(pipe, [0, 1], 8, num_steps=2).astype(int) - expected).max() <= 1


def test_latents_are_decoded_out_of_the_autoencoders_scale(on_latents):
    pipe = ELITPipeline.from_bundle(on_latents, "cpu")
    state = torch.randn(2, 4, 4, 4)
    pixels = pipe.decode(state)
    assert pixels.shape == (2, 3, 32, 32)
    torch.testing.assert_close(pixels[:, :, ::8, ::8], 0.25 * state[:, :3] / 0.5)
    assert quiet(pipe, [0, 1, 2], 4).shape == (3, 32, 32, 3)
    assert pipe.image_size == 32
    assert pipe.decoder_flops() == 1000 * 32**2
    assert set(pipe.parameters()) == {"generator", "autoencoder"}


def test_work_counts_every_row_at_its_budget(pipe):
    config = SamplerConfig(num_steps=6, cfg_scale=2.0, cfg_interval=(0.0, 1.0), uncond_num_tokens=4)
    flops = {k: pipe.bundle.net.flops(k) for k in BUDGETS}
    assert list(flops.values()) == sorted(flops.values())
    assert pipe.image_flops(config, 16) == 5 * (flops[16] + flops[4])
    assert pipe.row_flops(8) == flops[8]
    assert pipe.decoder_flops() == 0


def test_the_bundle_keeps_the_settings_of_each_budget(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "tuned"))
    auto = {"cfg_scale": 2.0, "uncond_num_tokens": 4, "guidance": "autoguidance"}
    set_sampling_defaults(copy, {16: auto})
    tuned = load_pipeline(copy, "cpu")
    assert tuned.config(16).guidance is Guidance.AUTOGUIDANCE
    assert tuned.config(16).num_steps == 51
    assert tuned.config(8) == load_pipeline(bundle, "cpu").config(8)
    set_sampling_defaults(copy, {4: auto})  # the weak branch is the strong one
    with pytest.raises(ConfigError, match="autoguidance needs fewer tokens"):
        load_pipeline(copy, "cpu").config(4)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_tokens": 5}, "num_tokens: 5 is no budget of this network; it is k x 4 windows"),
        ({"num_tokens": 20}, "num_tokens: 20 is no budget"),
        ({"num_tokens": 8, "uncond_num_tokens": 6}, "num_tokens: 6 is no budget"),
        ({"guidance": "autoguidance"}, "needs uncond_num_tokens"),
        ({"guidance": "autoguidance", "uncond_num_tokens": 16}, "needs fewer tokens"),
        ({"cfg_sclae": 2.0}, "did you mean 'cfg_scale'"),
    ],
)
def test_wrong_input_is_named(pipe, settings, text):
    with pytest.raises(ConfigError, match=text) as error:
        pipe([0], **settings)
    assert len(error.value.problems) == 1


def test_the_command_draws_a_grid_of_budgets(bundle, tmp_path, monkeypatch):
    out = tmp_path / "grid.png"
    arguments = (
        bundle, "--classes", "dog", "2", "--num-tokens", 8, 16, "--out", out, "--num-steps", 4,
        "--cfg-scale", 2, "--uncond-num-tokens", 4, "--guidance", "autoguidance", "--device", "cpu",
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["sample", *map(str, arguments)])
    assert sample_command.main() == 0
    with Image.open(out) as sheet:
        assert 2 * 128 < sheet.height < 3 * 128
    monkeypatch.setattr(sys, "argv", [*sys.argv[:1], *map(str, arguments), "--num-tokens", "5"])
    with pytest.raises(ConfigError, match="num_tokens: 5 is no budget"):
        sample_command.main()


def test_matrices_that_are_cast_once_give_the_same_bits(bundle):
    cpu = torch.device("cpu")
    cast = ELITPipeline.from_bundle(bundle, "cpu", torch.bfloat16)
    plain = ELITPipeline(ELITPipeline.load(bundle, cpu), torch.bfloat16)
    assert torch.bfloat16 in {p.dtype for p in cast.bundle.net.parameters()}
    first, second = (pipe([0, 1], num_steps=4, progress_bar=False) for pipe in (cast, plain))
    assert np.array_equal(first, second)
    with pytest.raises(ConfigError, match="bundles are sampled without them"):
        cast.replay()
