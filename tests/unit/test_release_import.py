from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest
import torch
from release_files import generator_content, shuffle, tokenizer_content
from safetensors.torch import save_file
from typed_commands import refusal

from lgm_scale.bundle import read_bundle
from lgm_scale.errors import CheckpointError, DataError, exit_on_user_error
from lgm_scale.families.lgm.bundle import load_lgm_bundle
from lgm_scale.families.lgm.config import LGMModelConfig
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.network import MergeDiT, build_merge_dit
from lgm_scale.families.lgm.release import (
    Surroundings,
    import_generator,
    read_stats,
)
from lgm_scale.families.tokenizer.bundle import load_tokenizer, save_tokenizer_bundle
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import Tokenizer, build_tokenizer
from lgm_scale.families.tokenizer.release import import_tokenizer
from lgm_scale.merging.nesting import ContrastStats
from lgm_scale.merging.tree import MergeTree
from lgm_scale.release_import.__main__ import main

TOKENIZER = TokenizerModelConfig(
    size="tiny", image_size=32, patch_size=8, num_base_tokens=16, latent_dim=8, codebook_size=32
)
GENERATOR = LGMModelConfig(size="tiny", latent_dim=8, num_base_tokens=16, num_classes=3)
ARGS = {
    "image_size": 32,
    "encoder_patch_size": 8,
    "num_latent_tokens": 16,
    "codebook_embed_dim": 8,
    "num_codebooks": 4,
    "codebook_size": 32,
    "tau": 0.07,
    "variable_method": "ours2",
    "lr": 1e-4,
    "config": None,
    "betas": [0.9, 0.95],
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    net = build_tokenizer(TOKENIZER)
    shuffle(net, 1)
    return net.eval()


@pytest.fixture(scope="module")
def generator() -> MergeDiT:
    torch.manual_seed(0)
    net = build_merge_dit(GENERATOR)
    shuffle(net, 2)
    return net.eval()


@pytest.fixture
def files(tmp_path: Path, tokenizer: Tokenizer, generator: MergeDiT) -> Path:
    """Folder with tokenizer.pt, generator.pth, stats.pt, and a tokenizer bundle."""
    torch.save(tokenizer_content(tokenizer, ARGS), tmp_path / "tokenizer.pt")
    torch.save(generator_content(generator), tmp_path / "generator.pth")
    stats = {"mean": torch.arange(8.0)[None, None], "std": torch.arange(1.0, 9.0)[None, None]}
    torch.save(stats, tmp_path / "stats.pt")
    tree, weights = tokenizer.merge_tree(), tokenizer.state_dict()
    save_tokenizer_bundle(tmp_path / "bundle", TOKENIZER, weights, tree, {})
    return tmp_path


def command(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """Exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["release_import", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(main)
    return int(end.value.code or 0)


# --- round trips ------------------------------------------------------------------------------


def test_an_imported_tokenizer_reconstructs_exactly(files, tokenizer, monkeypatch, capsys):
    out = files / "out"
    assert command(monkeypatch, "tokenizer", files / "tokenizer.pt", out) == 0
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    loaded = load_tokenizer(out)
    with torch.no_grad():
        for num_tokens in range(4, 17):
            expected = tokenizer.reconstruct(images, num_tokens)
            assert torch.equal(loaded.reconstruct(images, num_tokens), expected)
    info = read_bundle(out, "tokenizer")
    assert info["training"]["weights"] == "ema"
    assert info["training"]["imported"]["keys"]["ignored"] == 6
    text = capsys.readouterr().out
    assert "renamed  quant_conv.weight -> to_latent.weight" in text
    assert "used     encoder.latent_tokens" in text
    assert "ignored  quantize.codebook_used: statistics of training" in text
    assert "args agree with the shapes: image_size, encoder_patch_size, num_latent_tokens" in text


def test_the_other_weights_can_be_chosen(files):
    content = torch.load(files / "tokenizer.pt", weights_only=False)
    content["model"] = {f"module.{name}": value + 1 for name, value in content["ema"].items()}
    torch.save(content, files / "again.pt")
    import_tokenizer(files / "again.pt", files / "out", "model")
    expected = content["ema"]["quant_conv.bias"] + 1
    assert torch.equal(load_tokenizer(files / "out").to_latent.bias, expected)


@pytest.mark.parametrize("cut", [4, 10, 16])
@torch.no_grad()
def test_an_imported_generator_has_the_same_velocity(files, generator, tokenizer, cut):
    report, remarks = import_generator(
        files / "generator.pth", files / "out", Surroundings(files / "bundle", files / "stats.pt")
    )
    assert report.counts()["ignored"] == 0
    assert any("noise scale: corrected" in remark for remark in remarks)
    bundle = load_lgm_bundle(files / "out")
    assert torch.equal(bundle.tree.merges, tokenizer.merge_tree().merges)
    assert bundle.stats.mean.tolist() == list(range(8))
    assert bundle.classes == ("0", "1", "2")
    assignment = bundle.tree.assignment(cut)
    z_t = torch.randn(2, cut, 8, generator=torch.Generator().manual_seed(3))
    t, labels = torch.tensor([0.2, 0.9]), torch.tensor([1, 3])
    expected = generator(z_t, t, labels, assignment)
    assert expected.abs().max() > 0.1
    assert torch.equal(bundle.net(z_t, t, labels, assignment), expected)


def test_noise_scale_and_classes_reach_the_bundle(files, monkeypatch, capsys):
    from lgm_scale.families.lgm.pipeline import LGMPipeline

    (files / "names.txt").write_text("cat\ndog\nnewt\n")
    status = command(
        monkeypatch, "generator", files / "generator.pth", files / "out",
        "--tokenizer", files / "bundle", "--latent-stats", files / "stats.pt",
        "--noise-scale", "legacy", "--classes", files / "names.txt", "--weights", "model",
    )  # fmt: skip
    assert status == 0
    assert "noise scale: legacy" in capsys.readouterr().out
    bundle = load_lgm_bundle(files / "out")
    assert bundle.info["training"]["imported"]["epoch"] == 399
    pipe = LGMPipeline(bundle)
    assert pipe.protocol() == {"noise_scale": "legacy"}
    assert pipe.noise_scale.value == "legacy"
    images = pipe(["newt", 0], num_tokens=8, num_steps=3, progress_bar=False)
    assert images.shape == (2, 32, 32, 3)  # type: ignore[union-attr]  # an array


# --- nothing is executed ----------------------------------------------------------------------


class Hostile:
    """Its unpickling would make a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("entry", ["args", "ema", "extra"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_file_executes_nothing(files, tokenizer, entry, zipped, monkeypatch, capsys):
    marker = files / "marker"
    content = tokenizer_content(tokenizer, ARGS) | {entry: Hostile(marker)}
    torch.save(content, files / "bad.pt", _use_new_zipfile_serialization=zipped)
    assert command(monkeypatch, "tokenizer", files / "bad.pt", files / "out") == 2
    text = capsys.readouterr().err
    assert f"asks for {os.mkdir.__module__}.mkdir" in text
    assert "nothing was executed" in text
    assert "weights_only=False" not in text
    assert not marker.exists()
    assert not (files / "out").exists()
    torch.load(files / "bad.pt", weights_only=False)  # the trap is a real one
    assert marker.exists()


def test_the_command_ends_without_a_traceback(files):
    torch.save({"ema": {}, "args": Hostile(files / "marker")}, files / "bad.pt")
    said = refusal(main, "tokenizer", files / "bad.pt", files / "out")
    assert "nothing was executed" in said
    assert not (files / "marker").exists()


def test_a_hostile_merge_dictionary_or_statistics_execute_nothing(files):
    marker = files / "marker"
    torch.save({32: Hostile(marker)}, files / "bad.pt")
    for rest in ((files / "stats.pt", files / "bad.pt"), (files / "bad.pt",)):
        around = Surroundings(files / "bundle", *rest)
        with pytest.raises(CheckpointError, match="nothing was executed"):
            import_generator(files / "generator.pth", files / "out", around)
    assert not marker.exists()


# --- what does not fit is refused -------------------------------------------------------------


def drop(name: str):
    return lambda content: content["ema"].pop(name)


def put(name: str, value: object):
    return lambda content: content["ema"].update({name: value})


def say(**args: object):
    return lambda content: content.update(args=argparse.Namespace(**ARGS | args))


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (drop("encoder.latent_tokens"), ["key encoder.latent_tokens: missing", "[1, ?, ?]"]),
        (
            drop("quant_conv.bias"),
            ["key quant_conv.bias (here to_latent.bias): missing; expected shape [8]"],
        ),
        (
            put("post_quant_conv.weight", torch.zeros(96, 9)),
            ["key post_quant_conv.weight: shape [96, 9], expected [96, 8]"],
        ),
        (
            put("quant_conv.weight", torch.zeros(8, 97)),
            ["key quant_conv.weight: shape [8, 97], expected [?, 96]"],
        ),
        (
            put("merge_module.embeddings", torch.zeros(16, 32)),
            ["key merge_module.embeddings: shape [16, 32], expected [16, 768]"],
        ),
        (put("encoder.model.pos_embed", torch.zeros(1, 16, 96)), ["16 positions", "square"]),
        (put("encoder.model.head.weight", torch.zeros(2)), ["key encoder.model.head.weight: unk"]),
        (put("decoder_clip.mask_token", torch.zeros(1)), ["key decoder_clip.mask_token: unknown"]),
        (
            put("to_latent.bias", torch.zeros(8)),
            ["key quant_conv.bias (here to_latent.bias): given 2 times"],
        ),
        (put("quant_conv.bias", torch.full((8,), torch.nan)), ["quant_conv.bias: not finite"]),
        (put("quant_conv.bias", torch.zeros(8, dtype=torch.int64)), ["torch.int64"]),
        (put("quant_conv.bias", [0.0]), ["ema['quant_conv.bias'] is a list"]),
        (put("quantize.embedding", torch.zeros(5, 32, 8)), ["5 codebooks cannot share 16"]),
        (
            put("encoder.model.blocks.2.norm1.weight", torch.zeros(96)),
            ["encoder of width 96 and 3 blocks", "b: 768 x 12"],
        ),
        (
            lambda content: (content.pop("ema"), content.pop("model")),
            ["no weights under 'ema' or 'model'; it holds args, steps"],
        ),
        (say(tau=0.1, image_size=256), ["args.tau: 0.1, expected 0.07", "args.image_size: 256"]),
        (say(variable_method="nested"), ["args.variable_method: 'nested', expected 'ours2'"]),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    files, tokenizer, change, texts, monkeypatch, capsys
):
    content = tokenizer_content(tokenizer, ARGS)
    change(content)
    torch.save(content, files / "odd.pt")
    assert command(monkeypatch, "tokenizer", files / "odd.pt", files / "out") == 2
    error = capsys.readouterr().err
    assert "odd.pt" in error
    for text in texts:
        assert text in error
    assert not (files / "out").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(files, share, monkeypatch, capsys):
    data = (files / "tokenizer.pt").read_bytes()
    (files / "cut.pt").write_bytes(data[: int(len(data) * share)])
    assert command(monkeypatch, "tokenizer", files / "cut.pt", files / "out") == 2
    assert "cut.pt cannot be read; it is damaged" in capsys.readouterr().err


def test_other_files_are_refused(files):
    with pytest.raises(CheckpointError, match="is not a file"):
        import_tokenizer(files / "nothing.pt", files / "out")
    torch.save([torch.zeros(3)], files / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list; a dictionary is needed"):
        import_tokenizer(files / "list.pt", files / "out")
    with pytest.raises(CheckpointError, match="no weights under 'ema'; it holds model, model_ema"):
        import_tokenizer(files / "generator.pth", files / "out", "ema")
    with pytest.raises(CheckpointError, match=r"encoder\.latent_tokens: missing"):
        import_tokenizer(files / "generator.pth", files / "out")
    around = Surroundings(files / "bundle", files / "stats.pt")
    with pytest.raises(CheckpointError, match="no weights under 'model_ema'"):
        import_generator(files / "tokenizer.pt", files / "out", around, "ema")
    with pytest.raises(CheckpointError, match="key pos_embed: missing"):
        import_generator(files / "tokenizer.pt", files / "out", around)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("pos_embed", torch.zeros(1, 20, 128), "N = 20, D = 8; the tokenizer"),
        ("transformer.blocks.0.attn.q_norm.weight", torch.zeros(64), "heads of 64 channels"),
        ("transformer.blocks.4.norm1.weight", torch.zeros(128), "5 blocks.*xl: 1152 x 28 x 16"),
        ("transformer.blocks.0.attn.qkv.lora_A", torch.zeros(32, 128), "lora_A: unknown"),
        ("final_layer.linear.bias", torch.zeros(9), r"shape \[9\], expected \[8\]"),
    ],
)
def test_a_generator_that_does_not_fit_is_refused(files, name, value, text):
    content = torch.load(files / "generator.pth")
    content["model_ema"][name] = value
    torch.save(content, files / "odd.pth")
    around = Surroundings(files / "bundle", files / "stats.pt")
    with pytest.raises(CheckpointError, match=text):
        import_generator(files / "odd.pth", files / "out", around)


# --- statistics of the latents ----------------------------------------------------------------


def test_forms_of_statistics(tmp_path):
    flat = {"mean": torch.arange(8.0), "std": torch.ones(8)}
    save_file(flat, tmp_path / "flat.safetensors")
    torch.save({name: v[None, None].double() for name, v in flat.items()}, tmp_path / "wide.pt")
    for name in ("flat.safetensors", "wide.pt"):
        stats = read_stats(tmp_path / name, 8)
        assert torch.equal(stats.mean, flat["mean"])
        assert torch.equal(stats.std, flat["std"])
    contrasts = ContrastStats(torch.ones(12, 8), torch.ones(12, 8))
    LatentStats(**flat, contrasts=contrasts).save(tmp_path / "ours.safetensors")
    assert read_stats(tmp_path / "ours.safetensors", 8).contrasts is not None


@pytest.mark.parametrize(
    ("stats", "text"),
    [
        ({"mean": torch.zeros(8)}, "no tensor 'std'; it holds mean"),
        ({"mean": torch.zeros(4), "std": torch.ones(4)}, r"shape \[4\], expected \[1, 1, 8\]"),
        ({"mean": torch.zeros(8), "std": torch.zeros(8)}, "must be positive"),
        ({"mean": torch.full((8,), torch.inf), "std": torch.ones(8)}, "not finite"),
    ],
)
def test_wrong_statistics_are_refused(tmp_path, stats, text):
    torch.save(stats, tmp_path / "stats.pt")
    with pytest.raises(DataError, match=text):
        read_stats(tmp_path / "stats.pt", 8)


def test_statistics_must_be_given(files, monkeypatch, capsys):
    args = ("generator", files / "generator.pth", files / "out", "--tokenizer", files / "bundle")
    assert command(monkeypatch, *args) == 2
    assert "--latent-stats: missing" in capsys.readouterr().err


def test_a_foreign_merge_tree_goes_into_the_bundle_without_contrasts(files, generator):
    """Contrasts belong to the tree that they were measured on."""
    contrasts = ContrastStats(torch.ones(12, 8), torch.ones(12, 8))
    stats = files / "latent_stats.safetensors"
    LatentStats(torch.zeros(8), torch.ones(8), contrasts).save(stats)
    embeddings = torch.randn(16, 32, generator=torch.Generator().manual_seed(77))
    foreign = MergeTree.from_embeddings(embeddings)
    cuts = [foreign.assignment(num_tokens) for num_tokens in (4, 8, 12)]
    torch.save({cut.num_tokens: (cut.pool, cut.sizes) for cut in cuts}, files / "merge.pt")
    where = (files / "generator.pth", files / "out")
    import_generator(*where, Surroundings(files / "bundle", stats))
    assert load_lgm_bundle(files / "out").stats.contrasts is not None
    import_generator(*where, Surroundings(files / "bundle", stats, files / "merge.pt"))
    bundle = load_lgm_bundle(files / "out")
    assert bundle.stats.contrasts is None
    for cut in cuts:
        assert torch.equal(bundle.tree.assignment(cut.num_tokens).labels, cut.labels)
