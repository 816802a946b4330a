"""LGMPipeline and the grid command: what comes out, and what is said about wrong input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typed_commands import refusal

import lgm_scale
from lgm_scale import sample as sample_command
from lgm_scale.bundle import set_sampling_defaults
from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.lgm.bundle import save_lgm_bundle
from lgm_scale.families.lgm.config import LGMModelConfig
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.network import build_merge_dit
from lgm_scale.families.lgm.pipeline import LGMPipeline, default_cfg_scale
from lgm_scale.families.tokenizer.bundle import save_tokenizer_bundle
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import build_tokenizer
from lgm_scale.merging.tree import MergeTree
from lgm_scale.sampling.config import CFGRescale, SamplerConfig, Solver
from lgm_scale.storage.files import file_hash

CLASSES = ("goldfish", "gold finch", "tabby cat")


def randomise(module: torch.nn.Module, scale: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: scale * torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else value
        for name, value in module.state_dict().items()
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A generator bundle with random weights: 16 tokens of 4 channels, 32x32 pixels."""
    folder = tmp_path_factory.mktemp("bundles")
    model = TokenizerModelConfig(
        size="tiny", image_size=32, patch_size=8, num_base_tokens=16, latent_dim=4,
        codebook_size=8,
    )  # fmt: skip
    tokenizer = build_tokenizer(model)
    save_tokenizer_bundle(
        folder / "tokenizer", model, randomise(tokenizer, 0.4), tokenizer.merge_tree(), {}
    )
    net_config = LGMModelConfig(
        size="tiny", latent_dim=4, num_base_tokens=16, num_blocks=4, num_classes=3
    )
    stats = LatentStats(torch.full((4,), 0.1), torch.full((4,), 5.0))
    stats = stats.with_contrasts(torch.zeros(12, 4), torch.ones(12, 4))
    save_lgm_bundle(
        folder / "dit", net_config, randomise(build_merge_dit(net_config), 0.1), stats, CLASSES,
        folder / "tokenizer", {"config": {"objective": {"noise_scale": "corrected"}}},
    )  # fmt: skip
    return folder / "dit"


@pytest.fixture(scope="module")
def pipe(bundle) -> LGMPipeline:
    return LGMPipeline.from_bundle(bundle, device="cpu")


def quiet(pipe: LGMPipeline, *args, **settings):
    return pipe(*args, num_steps=5, progress_bar=False, **settings)


# --- images -----------------------------------------------------------------------------------


def test_two_lines_give_images(bundle):
    pipe = lgm_scale.LGMPipeline.from_bundle(bundle, device="cpu")
    images = quiet(pipe, [2, "goldfish"], num_tokens=8, cfg_scale=2.0, seed=1)
    assert images.shape == (2, 32, 32, 3)
    assert images.dtype == np.uint8
    assert images.std() > 1
    pictures = quiet(pipe, [2, "goldfish"], 8, 2.0, 1, output="pil")
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), images)


@pytest.mark.parametrize("num_tokens", range(4, 17))
def test_every_length_of_the_tree(pipe, num_tokens):
    assert quiet(pipe, 0, num_tokens).shape == (1, 32, 32, 3)


def test_images_do_not_depend_on_batches(pipe):
    labels = [0, 1, 2, 1, 0]
    together = quiet(pipe, labels, 8).astype(int)
    split = quiet(pipe, labels, 8, batch_size=2).astype(int)
    last = quiet(pipe, labels[3:], 8, first_index=3).astype(int)
    assert np.abs(together - split).max() <= 1
    assert np.abs(together[3:] - last).max() <= 1
    assert np.abs(together[1] - together[3]).max() > 1, "one class, two indices, one image"
    assert np.abs(quiet(pipe, labels, 8, seed=1).astype(int) - together).max() > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"cfg_scale": 4.0},
        {"solver": Solver.HEUN},
        {"uncond_num_tokens": 4, "cfg_scale": 4.0},
        {"length_schedule": [[0.0, 4], [0.1, 8]]},
        {"cfg_scale": 4.0, "cfg_rescale": CFGRescale.NONE},
    ],
)
def test_every_setting_reaches_the_sampler(pipe, settings):
    default = quiet(pipe, [0, 1], 8, cfg_scale=1.0).astype(int)
    assert np.abs(quiet(pipe, [0, 1], 8, **settings).astype(int) - default).max() > 0


def test_no_class_gives_no_image(pipe):
    assert quiet(pipe, []).shape == (0, 32, 32, 3)


def test_progress_bar_counts_every_step(pipe, capsys):
    pipe([0, 1, 2], 8, num_steps=5, batch_size=2)
    assert "8/8" in capsys.readouterr().err


def test_reduced_precision_stays_close(bundle, pipe):
    rough = LGMPipeline.from_bundle(bundle, "cpu", torch.bfloat16)
    difference = quiet(rough, [0, 1], 8).astype(int) - quiet(pipe, [0, 1], 8)
    assert 0 < np.abs(difference).max() < 16


def test_matrices_that_are_cast_once_give_the_same_bits(bundle):
    """What autocast does at every call, done when a bundle is read; norms stay float32."""
    cast = LGMPipeline.from_bundle(bundle, "cpu", torch.bfloat16)
    plain = LGMPipeline(LGMPipeline.load(bundle, torch.device("cpu")), torch.bfloat16)
    kinds = [{p.dtype for p in pipe.bundle.net.blocks.parameters()} for pipe in (cast, plain)]
    assert kinds == [{torch.float32, torch.bfloat16}, {torch.float32}]
    assert np.array_equal(quiet(cast, [0, 2], 8), quiet(plain, [0, 2], 8))


def test_importing_the_package_imports_no_torch():
    code = "import sys, lgm_scale; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'LGMPipelin'"):
        _ = lgm_scale.LGMPipelin


# --- defaults ---------------------------------------------------------------------------------


def test_default_guidance():
    published = {32: 10.5, 64: 8.0, 128: 6.5}
    assert {k: pytest.approx(default_cfg_scale(256, k)) for k in published} == published
    assert 8.0 < default_cfg_scale(256, 48) < 10.5
    assert default_cfg_scale(256, 4) == 10.5
    assert default_cfg_scale(256, 256) == 6.5
    assert default_cfg_scale(64, 64) == 1.5
    assert default_cfg_scale(64, 8) == 5.0


def test_defaults_are_the_published_settings(pipe):
    expected = SamplerConfig(
        num_steps=25, cfg_scale=2.0, cfg_interval=(0.15, 1.0),
        cfg_rescale=CFGRescale.PER_POSITION, timestep_shift=0.2,
    )  # fmt: skip
    assert pipe.config(8) == expected


# --- wrong input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "settings", "text"),
    [
        (3, {}, r"index 3 is outside \[0, 2\]"),
        (-1, {}, r"index -1 is outside \[0, 2\]"),
        ("7", {}, r"index 7 is outside \[0, 2\]"),
        ("goldfisch", {}, "no class is named 'goldfisch'; nearest: goldfish, gold finch"),
        (1.5, {}, "1.5 is neither an index nor a name"),
        (0, {"num_tokens": 3}, r"num_tokens: 3 is outside \[4, 16\]"),
        (0, {"num_tokens": 17}, r"num_tokens: 17 is outside \[4, 16\]"),
        (0, {"cfg_scale": 0.9}, "cfg_scale: 0.9 is below 1"),
        (0, {"cfg_interval": (0.5, 1.5)}, r"must be ordered and inside \[0, 1\]"),
        (0, {"cfg_interval": (0.5, 0.2)}, r"must be ordered and inside \[0, 1\]"),
        (0, {"cfg_sclae": 2.0}, "cfg_sclae: no such sampler setting; did you mean 'cfg_scale'"),
        (0, {"uncond_num_tokens": 3}, r"num_tokens: 3 is outside \[4, 16\]"),
        (0, {"output": "jpeg"}, "output: 'jpeg' is neither 'numpy' nor 'pil'"),
        (0, {"batch_size": 0}, "batch_size: 0 must be 1 or more"),
    ],
)
def test_wrong_input_is_named(pipe, labels, settings, text):
    with pytest.raises(ConfigError, match=text) as error:
        pipe([labels], **settings)
    assert len(error.value.problems) == 1


def test_digits_and_case_are_understood(pipe):
    assert pipe.class_indices(["2", "Tabby Cat", 0, np.int64(1)]) == [2, 2, 0, 1]
    assert pipe.class_indices("goldfish") == [0]


def rewrite(bundle: Path, to: Path, **changes) -> Path:
    shutil.copytree(bundle, to)
    info = json.loads((to / "bundle.json").read_text())
    (to / "bundle.json").write_text(json.dumps(info | changes))
    return to


def test_another_format_version_is_refused(bundle, tmp_path):
    newer = rewrite(bundle, tmp_path / "newer", version=99)
    with pytest.raises(CheckpointError, match="format version 99; this release reads version 1"):
        LGMPipeline.from_bundle(newer)


def test_a_tree_of_another_size_is_refused(bundle, tmp_path):

    folder = rewrite(bundle, tmp_path / "foreign")
    embeddings = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    MergeTree.from_embeddings(embeddings).save(folder / "merge_tree.safetensors")
    info = json.loads((folder / "bundle.json").read_text())
    info["files"]["merge_tree.safetensors"] = file_hash(folder / "merge_tree.safetensors")
    (folder / "bundle.json").write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match="the merge tree has 32 tokens, the generator 16"):
        LGMPipeline.from_bundle(folder)


def test_a_bundle_from_before_contrasts_still_makes_images(bundle):
    pipe = LGMPipeline.from_bundle(bundle, "cpu")
    stats = pipe.bundle.stats
    object.__setattr__(stats, "contrasts", None)
    assert quiet(pipe, 0, 8).shape == (1, 32, 32, 3)
    with pytest.raises(CheckpointError, match="Encode the latents again"):
        quiet(pipe, 0, 8, length_schedule=[[0.0, 4], [0.1, 8]])


# --- the command ------------------------------------------------------------------------------


def call_sample(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["sample", *map(str, arguments)])
    assert sample_command.main() == 0


def test_the_command_draws_a_grid(bundle, tmp_path, monkeypatch):
    out = tmp_path / "grid.png"
    call_sample(
        monkeypatch, bundle, "--classes", "goldfish", "2", "--num-tokens", 4, 8, 16,
        "--out", out, "--num-steps", 5, "--grow", "0:4", "0.1:16", "--device", "cpu",
    )  # fmt: skip
    with Image.open(out) as sheet:
        width, height = sheet.size
        assert 2 * 128 < width < 3 * 128
        assert 3 * 128 < height < 4 * 128


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--grow", "0-4"], "'0-4' is not T:K"),
        (["--grow", "0:4", "0.1:8", "--num-tokens", "16"], "it ends at 8 tokens"),
        (["--num-tokens", "16", "3"], "num_tokens: 3 is outside"),
        (["--device", "cpu", "--cuda-graphs"], "cuda-graphs: the pipeline is on cpu"),
    ],
)
def test_the_command_names_what_is_wrong(bundle, tmp_path, monkeypatch, arguments, text):
    with pytest.raises(ConfigError, match=text):
        call_sample(monkeypatch, bundle, "--classes", 0, "--out", tmp_path / "grid.png", *arguments)
    assert not (tmp_path / "grid.png").exists()


def test_the_command_refuses_a_file_that_cannot_be_written(bundle, tmp_path, monkeypatch):
    for out, text in ((tmp_path / "no" / "grid.png", "is no folder"), ("grid.txt", "no image")):
        with pytest.raises(ConfigError, match=text):
            call_sample(monkeypatch, bundle, "--classes", 0, "--out", out)


def test_a_wrong_command_ends_with_status_2(tmp_path):
    said = refusal(sample_command.main, tmp_path, "--classes", "0", "--out", "x.png")
    assert "is no bundle" in said


def test_a_bundle_keeps_the_settings_of_each_length(bundle, tmp_path):
    copy = tmp_path / "dit"
    shutil.copytree(bundle, copy)
    set_sampling_defaults(copy, {8: {"cfg_scale": 4.0, "num_steps": 7, "cfg_interval": [0.2, 0.9]}})
    set_sampling_defaults(copy, {4: {"solver": "heun"}})
    tuned, plain = LGMPipeline.from_bundle(copy, "cpu"), LGMPipeline.from_bundle(bundle, "cpu")
    config = tuned.config(8)
    assert (config.cfg_scale, config.num_steps, tuple(config.cfg_interval)) == (4.0, 7, (0.2, 0.9))
    assert tuned.config(8, cfg_scale=2.0).cfg_scale == 2.0  # a call's own setting wins
    assert tuned.config(4).solver is Solver.HEUN
    assert tuned.config(16) == plain.config(16)
    with pytest.raises(ConfigError, match="no setting 'steps'"):
        set_sampling_defaults(copy, {8: {"steps": 5}})
    with pytest.raises(ConfigError, match=r"cfg_scale: 0\.5 is below 1"):
        set_sampling_defaults(copy, {8: {"cfg_scale": 0.5}})
    info = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(info | {"sampling": {"8": {"cfg_scale": 0}}}))
    with pytest.raises(CheckpointError, match=r"(?s)sampling at K = 8: .*below 1"):
        LGMPipeline.from_bundle(copy, "cpu").config(8)
