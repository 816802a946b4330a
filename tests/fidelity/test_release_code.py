"""Imports at full size against the releases' own code, for whoever has it in a folder.

    make test-fidelity LGM_RELEASE=path/to/lgm ELIT_RELEASE=path/to/elit

A folder is a clone of the release with what it needs installed. Weights are random, and files are
saved as the release's trainers save them; nothing is downloaded. Without a folder its tests are
skipped. Used of the releases: `LightningDiT/models/lightningdit_ours.py` (LightningDiT_xl, `net`),
`tokenizer/modelling/tokenizer.py` (ModelArgs, SoftVQModel2), `models/sit_elit.py` (SiT_models).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from release_files import averaged, modules, shuffle, yaml_numbers
from small_vae import save_small_vae
from torch import Tensor, nn

from lgm_scale.families.elit.bundle import load_elit_bundle
from lgm_scale.families.elit.release import import_elit
from lgm_scale.families.lgm.bundle import load_lgm_bundle
from lgm_scale.families.lgm.release import Surroundings, import_generator
from lgm_scale.families.lgm.release_lora import import_lora
from lgm_scale.families.tokenizer.bundle import load_tokenizer, save_tokenizer_bundle
from lgm_scale.families.tokenizer.config import TokenizerModelConfig
from lgm_scale.families.tokenizer.network import build_tokenizer
from lgm_scale.families.tokenizer.release import import_tokenizer

TOLERANCE = 1e-5  # of the output's scale, one forward pass in float32


@contextmanager
def release(variable: str, folder: str) -> Iterator[None]:
    """Its modules can be imported, and are forgotten afterwards; skipped if it is not there."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no folder with the release's code")
    root = Path(os.environ[variable]).resolve()
    before = set(sys.modules)
    sys.path.insert(0, str(root / folder))
    try:
        yield
    finally:
        sys.path.remove(str(root / folder))
        for name in set(sys.modules) - before:  # both releases have a package `models`
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(root)):
                del sys.modules[name]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float(expected.abs().max()) > 1e-3
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE, error


@pytest.fixture(scope="module")
def lgm_generator() -> nn.Module:
    with release("LGM_RELEASE", "LightningDiT"):
        module = importlib.import_module("models.lightningdit_ours")
        torch.manual_seed(0)
        net = module.LightningDiT_xl(force_one_d_seq=256, token_channels=32, qk_norm=True)
    shuffle(net, 1)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> Surroundings:
    folder = tmp_path_factory.mktemp("around")
    torch.manual_seed(0)
    config = TokenizerModelConfig()
    net = build_tokenizer(config)
    save_tokenizer_bundle(folder / "tokenizer", config, net.state_dict(), net.merge_tree(), {})
    torch.save({"mean": torch.zeros(1, 1, 32), "std": torch.ones(1, 1, 32)}, folder / "stats.pt")
    return Surroundings(folder / "tokenizer", folder / "stats.pt", noise_scale="legacy")


def compare_velocities(net: Any, bundle: Any, lengths: list[int]) -> None:
    t, labels = torch.tensor([0.2, 0.9]), torch.tensor([7, 1000])
    for num_tokens in lengths:
        cut = bundle.tree.assignment(num_tokens)
        z_t = torch.randn(2, num_tokens, 32, generator=torch.Generator().manual_seed(num_tokens))
        with torch.no_grad():
            expected = net(z_t, t, labels, proj_mat=cut.pool, sizes=cut.sizes.float())
            assert_close(bundle.velocity(z_t, t, labels, cut), expected)


def test_generator_xl(lgm_generator, around, tmp_path):
    state = dict(lgm_generator.named_parameters())  # as its average keeps them
    torch.save({"model": {}, "model_ema": state, "epoch": 1}, tmp_path / "xl.pth")
    import_generator(tmp_path / "xl.pth", tmp_path / "out", around)
    compare_velocities(lgm_generator.net, load_lgm_bundle(tmp_path / "out"), [32, 64, 128, 256])


def test_lora_xl(lgm_generator, around, tmp_path):
    """Wrapped by peft as its trainer does, and evaluated inside of the wrapper."""
    from peft import LoraConfig, get_peft_model

    targets = ["attn.qkv", "attn.proj", "mlp.w12", "mlp.w3"]
    config = LoraConfig(r=32, lora_alpha=32, target_modules=targets, lora_dropout=0.0)
    wrapped = get_peft_model(lgm_generator, config, adapter_name="256")  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    torch.save({"model": wrapped.state_dict(), "model_ema": None}, tmp_path / "lora_32.pth")
    import_lora(tmp_path / "lora_32.pth", tmp_path / "out", 32, around)
    inner: Any = wrapped.base_model.model
    compare_velocities(inner.net, load_lgm_bundle(tmp_path / "out"), [32])


def test_tokenizer_b(tmp_path, monkeypatch):
    args: dict[str, Any] = {
        "image_size": 256, "codebook_size": 8192, "codebook_embed_dim": 32, "num_codebooks": 4,
        "codebook_l2_norm": True, "entropy_loss_ratio": 0.01, "num_latent_tokens": 256,
        "enc_type": "vit", "dec_type": "vit", "variable_method": "ours2", "merge_dim": 768,
        "encoder_model": "vit_base_patch14_dinov2.lvd142m",
        "decoder_model": "vit_base_patch14_dinov2.lvd142m",
    }  # fmt: skip
    with release("LGM_RELEASE", "tokenizer"):
        module = importlib.import_module("modelling.tokenizer")
        config = module.ModelArgs(
            **args, tau=0.07, enc_pretrained=False, dec_pretrained=False, repa=False
        )
        torch.manual_seed(0)
        theirs = module.SoftVQModel2(config).eval().requires_grad_(False)
        with yaml_numbers() as yaml:
            numbers = argparse.Namespace(**args, tau=yaml.ScalarFloat(0.07))
            content = {"model": {}, "ema": theirs.state_dict(), "args": numbers, "steps": 1}
            torch.save(content, tmp_path / "tokenizer.pt")
        import_tokenizer(tmp_path / "tokenizer.pt", tmp_path / "out")
        ours = load_tokenizer(tmp_path / "out")
        images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(5)) * 2 - 1
        with torch.no_grad():
            for num_tokens in (32, 128, 256):
                expected = theirs.decode(theirs.encode(images, num=num_tokens)[0])
                assert_close(ours.reconstruct(images, num_tokens), expected)


@pytest.mark.parametrize("budget", [1 / 16, 1 / 4, 1.0])
def test_elit_xl(budget, tmp_path):
    with release("ELIT_RELEASE", "."):
        module = importlib.import_module("models.sit_elit")
        build = partial(module.SiT_models["ELIT-SiT-XL/2"], input_size=32, num_classes=1000)
        torch.manual_seed(0)
        theirs = build(use_cfg=True, enable_elit=True, group_size=4, encoder_depth=8)
        shuffle(theirs, 2)
        theirs.eval().requires_grad_(False)
        theirs.pos_embed.data = averaged(theirs.pos_embed.data)  # as in the file, so in its sampler
        torch.save({"model": {}, "ema": theirs.state_dict(), "steps": 1}, tmp_path / "elit.pt")
        vae = save_small_vae(tmp_path / "vae")
        import_elit(tmp_path / "elit.pt", tmp_path / "out", str(vae))
        ours = load_elit_bundle(tmp_path / "out").net
        x = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(4))
        s, labels = torch.tensor([0.2, 0.7]), torch.tensor([7, 1000])
        with torch.no_grad():
            expected = theirs(x, s, labels, inference_budget=budget)[0]
            assert_close(ours.forward_released(x, s, labels, int(256 * budget)), expected)


def test_the_imitated_modules_leave_no_trace():
    """Of the harness itself, with or without a release."""

    def scalar() -> None: ...

    with modules(nowhere__inner={"scalar": scalar}):
        assert sys.modules["nowhere.inner"].__dict__["scalar"] is scalar
    assert "nowhere.inner" not in sys.modules
