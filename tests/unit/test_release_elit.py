"""Checkpoints of ELIT's authors: every key, the fixed table, and what cannot be theirs."""

from __future__ import annotations

import os
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from release_files import averaged, elit_content, elit_state
from small_vae import save_small_vae

from lgm_scale.errors import CheckpointError
from lgm_scale.families.elit.bundle import load_elit_bundle
from lgm_scale.families.elit.config import ELITModelConfig, InterfaceConfig, SpaceConfig
from lgm_scale.families.elit.network import ELIT, SiT, build_elit
from lgm_scale.families.elit.pipeline import ELITPipeline
from lgm_scale.families.elit.release import elit_config_from_shapes, import_elit, our_elit_name
from lgm_scale.pipeline import load_pipeline
from lgm_scale.release_import.names import fit, translate

READ = "input_token_editor.adapters.0"
INTERFACE_OF_S = InterfaceConfig(split="released", group_size=2, position_rows=4096)
SPACE = SpaceConfig(kind="sd_vae", image_size=64, vae="vae")


@cache
def small(interface: InterfaceConfig | None) -> tuple[ELITModelConfig, SiT]:
    model = ELITModelConfig(size="s", patch_size=2, num_classes=3, interface=interface)
    torch.manual_seed(0)
    net = build_elit(model, SPACE)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1)
    return model, net.eval()


@pytest.mark.parametrize("interface", [INTERFACE_OF_S, None], ids=["elit", "sit"])
@torch.no_grad()
def test_every_key_arrives(interface):
    model, net = small(interface)
    state = elit_state(net)
    assert elit_config_from_shapes(state, "released", "vae", "x.pt") == (model, SPACE)
    report = translate(state, our_elit_name, {"pos_embed": "computed", "projectors.": "not needed"})
    assert set(report.ignored) == {"pos_embed", "projectors.0.weight"}
    again = build_elit(model, SPACE)
    again.load_state_dict(fit(state, report, again.state_dict(), "x.pt"))
    z_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    labels, num_tokens = torch.tensor([0, 3]), net.token_lengths[0]
    assert torch.equal(again.eval()(z_t, t, labels, num_tokens), net(z_t, t, labels, num_tokens))


def test_weights_of_another_size():
    _, net = small(None)
    state = {n: v for n, v in elit_state(net).items() if not n.startswith("blocks.11")}
    with pytest.raises(CheckpointError, match="width 384 and 11 blocks; known sizes"):
        elit_config_from_shapes(state, "released", None, "x.pt")


def test_a_window_that_is_no_square():
    _, net = small(INTERFACE_OF_S)
    state = elit_state(net)
    state[f"{READ}.learned_query_embed"] = torch.zeros(6, 384)
    with pytest.raises(CheckpointError, match="6 rows; a square number is needed"):
        elit_config_from_shapes(state, "released", None, "x.pt")


# --- the command ------------------------------------------------------------------------------


class Hostile:
    """Runs a command of the file's choice when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
def test_a_checkpoint_becomes_a_bundle_that_samples(tmp_path, vae):
    _, net = small(INTERFACE_OF_S)
    ema = {f"module.{name}": value for name, value in elit_state(net).items()}
    torch.save({"model": {}, "ema": ema, "steps": 400_000}, tmp_path / "elit.pt")
    report, remarks = import_elit(tmp_path / "elit.pt", tmp_path / "bundle", str(vae))
    assert report.counts()["ignored"] == 2
    assert any("split: released (--split); the checkpoint does not say" in r for r in remarks)
    pipe = load_pipeline(tmp_path / "bundle", "cpu")
    assert isinstance(pipe, ELITPipeline)
    found = pipe.bundle.net
    assert isinstance(found, ELIT)
    assert (found.head_blocks, found.tail_blocks, found.token_lengths) == (8, 2, (4, 8, 12, 16))
    with torch.no_grad():
        z_t, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 3])
        assert torch.equal(found(z_t, t, labels, 8), net(z_t, t, labels, 8))
    images = pipe([0, "2"], num_tokens=4, num_steps=3, progress_bar=False)
    assert np.asarray(images).shape == (2, 64, 64, 3)


@pytest.mark.slow
@torch.no_grad()
def test_an_average_is_sampled_with_its_own_positions(tmp_path, vae):
    """The velocity is that of the file's weights, positions included, as their sampler has it."""
    net = deepcopy(small(INTERFACE_OF_S)[1])
    torch.save(elit_content(net), tmp_path / "0020000.pt")
    report, remarks = import_elit(tmp_path / "0020000.pt", tmp_path / "bundle", str(vae))
    assert report.taken["pos_embed"] == "pos_embed"
    assert set(report.ignored) == {"projectors.0.weight"}
    assert any("from the fixed sin-cos table" in remark for remark in remarks)
    found = load_elit_bundle(tmp_path / "bundle").net
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 3]), 8
    fixed = net(*inputs)
    net.pos_embed.copy_(averaged(net.pos_embed))
    expected = net(*inputs)
    assert torch.equal(found(*inputs), expected)
    assert not torch.equal(fixed, expected)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, vae):
    torch.save({"ema": Hostile(tmp_path / "owned")}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="nothing was executed"):
        import_elit(tmp_path / "bad.pt", tmp_path / "bundle", str(vae))
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s | {"pos_embed": s["pos_embed"] + 0.01}, "differs from the fixed sin-cos"),
        (lambda s: s | {"blocks.0.attn.q_norm.weight": torch.ones(64)}, "unknown"),
        (lambda s: {n: v for n, v in s.items() if "kv_proj.bias" not in n}, "missing"),
        (lambda s: s | {"final_layer.linear.bias": torch.full((16,), torch.nan)}, "not finite"),
    ],
)
def test_what_does_not_fit_entirely_is_refused(tmp_path, vae, change, text):
    _, net = small(INTERFACE_OF_S)
    torch.save({"ema": change(elit_state(net))}, tmp_path / "elit.pt")
    with pytest.raises(CheckpointError, match=text):
        import_elit(tmp_path / "elit.pt", tmp_path / "bundle", str(vae))
    assert not (tmp_path / "bundle").exists()


def test_an_autoencoder_of_another_kind_is_told_when_the_bundle_is_opened(tmp_path):
    _, net = small(INTERFACE_OF_S)
    torch.save({"ema": elit_state(net)}, tmp_path / "elit.pt")
    coarse = save_small_vae(tmp_path / "coarse", blocks=3)
    import_elit(tmp_path / "elit.pt", tmp_path / "bundle", str(coarse))
    with pytest.raises(CheckpointError, match="4 channels at 1/4 of the side"):
        load_pipeline(tmp_path / "bundle", "cpu")
