"""Files as the releases' own code saves them: entries, averages, LoRA, near ties."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from release_files import (
    SMALL_TOKENIZER,
    averaged,
    elit_names,
    generator_content,
    generator_name,
    lora_content,
    random_adapter,
    shuffle,
    small_tokenizer,
    tokenizer_content,
)
from safetensors.torch import save_file

from lgm_scale.errors import CheckpointError, ConfigError, exit_on_user_error
from lgm_scale.families.elit.config import ELITModelConfig, SpaceConfig
from lgm_scale.families.elit.network import sincos_table
from lgm_scale.families.elit.release import our_elit_name
from lgm_scale.families.lgm.bundle import load_lgm_bundle
from lgm_scale.families.lgm.config import LGMModelConfig
from lgm_scale.families.lgm.network import MergeDiT, build_merge_dit
from lgm_scale.families.lgm.pipeline import LGMPipeline
from lgm_scale.families.lgm.release import Surroundings, import_generator, our_generator_name
from lgm_scale.families.lgm.release_lora import PeftRenaming, import_lora
from lgm_scale.families.tokenizer.bundle import save_tokenizer_bundle
from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.families.tokenizer.release import (
    about_ties,
    import_tokenizer,
    our_tokenizer_name,
)
from lgm_scale.merging.tree import MergeTree
from lgm_scale.release_import.__main__ import main

SIZES: dict[str, Any] = {"num_base_tokens": 16, "latent_dim": 8}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def generator() -> MergeDiT:
    net = build_merge_dit(LGMModelConfig(size="tiny", num_classes=3, **SIZES))
    shuffle(net, 2)
    return net.eval().requires_grad_(False)


@pytest.fixture
def around(tmp_path: Path, tokenizer: Tokenizer) -> Surroundings:
    """A tokenizer's bundle and statistics of latents, for a generator trained on plain noise."""
    weights, tree = tokenizer.state_dict(), tokenizer.merge_tree()
    save_tokenizer_bundle(tmp_path / "tokenizer", SMALL_TOKENIZER, weights, tree, {})
    stats = {"mean": torch.zeros(1, 1, 8), "std": torch.ones(1, 1, 8)}
    torch.save(stats, tmp_path / "stats.pt")
    return Surroundings(tmp_path / "tokenizer", tmp_path / "stats.pt", noise_scale="legacy")


# --- forms of files -------------------------------------------------------------------------------


def forms(net: MergeDiT) -> dict[str, tuple[Any, str]]:
    """Contents of a file, and what the import says that it took."""
    state = generator_content(net)["model_ema"]
    return {
        "model": ({"model": state}, "'model' of FILE; it has no 'model_ema'"),
        "no average": (
            {"model": state, "model_ema": None, "epoch": 9},
            "'model' of FILE; it has no 'model_ema'",
        ),
        "average": ({"model_ema": state, "model": {}}, "'model_ema' of FILE; it has no 'model'"),
        "bare": (state, "the tensors of FILE, which does not say whether they are averaged"),
        "wrapped": (
            {"model_ema": {f"_orig_mod.module.{name}": value for name, value in state.items()}},
            "'model_ema' of FILE; it has no 'model'; prefix '_orig_mod.module.' dropped",
        ),
    }


FORMS = ["model", "no average", "average", "bare", "wrapped", "safetensors"]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_form_of_a_file_is_read_and_told(form, generator, around, tmp_path):
    content, said = forms(generator)["bare" if form == "safetensors" else form]
    path = tmp_path / ("xl.safetensors" if form == "safetensors" else "xl.pth")
    save_file(content, path) if form == "safetensors" else torch.save(content, path)
    _, remarks = import_generator(path, tmp_path / "out", around)
    assert f"weights: {said.replace('FILE', str(path))}" in remarks
    bundle = load_lgm_bundle(tmp_path / "out")
    kinds = {"model": "model", "no average": "model", "bare": "unnamed", "safetensors": "unnamed"}
    assert bundle.info["training"]["weights"] == kinds.get(form, "ema")
    inputs = torch.randn(2, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([1, 3])
    cut = bundle.tree.assignment(8)
    assert torch.equal(bundle.net(*inputs, cut), generator(*inputs, cut))


def test_weights_that_are_asked_for_by_name_must_be_there(generator, around, tmp_path):
    for form in ("model", "bare"):
        torch.save(forms(generator)[form][0], tmp_path / "xl.pth")
        with pytest.raises(
            CheckpointError, match=r"no weights under 'model_ema'.*without --weights"
        ):
            import_generator(tmp_path / "xl.pth", tmp_path / "out", around, "ema")


def test_a_missing_key_is_named_as_in_the_file_and_as_here(generator, around, tmp_path):
    state = generator_content(generator)["model_ema"]
    del state["transformer.blocks.1.adaLN_modulation.1.bias"]
    torch.save(state, tmp_path / "xl.pth")
    text = r"key transformer\.blocks\.1\.adaLN_modulation\.1\.bias \(here blocks\.1\.modulation"
    with pytest.raises(CheckpointError, match=text):
        import_generator(tmp_path / "xl.pth", tmp_path / "out", around)


def test_names_go_both_ways(golden_dir):
    for kind, renaming in (("tokenizer", our_tokenizer_name), ("dit_xl", our_generator_name)):
        keys = json.loads((golden_dir / f"lgm_release_{kind}_keys.json").read_text())
        assert all(renaming.theirs(renaming(key)) == key for key in keys)
    for theirs, ours in elit_names(28, interface=True).items():
        assert (our_elit_name(theirs), our_elit_name.theirs(ours)) == (ours, theirs)


# --- ELIT's average -------------------------------------------------------------------------------


def test_the_average_shrinks_positions_as_described():
    table = sincos_table(64, 16)
    error = {n: float((averaged(table, n) - table).abs().max()) for n in (1_000, 20_000)}
    assert error[1_000] == pytest.approx(6e-5, rel=0.1)
    assert error[20_000] == pytest.approx(1.6e-4, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_positions_of_averages_and_half_precision_are_taken(dtype):
    from lgm_scale.families.elit.release import _positions

    model = ELITModelConfig(size="s", patch_size=2, num_classes=3)
    space = SpaceConfig(kind="sd_vae", image_size=64, vae="vae")
    table = sincos_table(384, 4)
    drifted = averaged(table).to(dtype)
    kept, remark = _positions({"pos_embed": drifted[None]}, model, space, "x.pt")
    assert kept is not None
    assert torch.equal(kept, drifted.float())
    assert "positions: the file's, up to" in remark
    assert _positions({"pos_embed": table[None]}, model, space, "x.pt")[0] is None
    with pytest.raises(CheckpointError, match="differs from the fixed sin-cos table"):
        _positions({"pos_embed": table[None] * 0.995}, model, space, "x.pt")


# --- LoRA -----------------------------------------------------------------------------------------


def velocities(net: MergeDiT, bundle: Any, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a network, and of a bundle at the same inputs."""
    cut = bundle.tree.assignment(num_tokens)
    z_t = torch.randn(2, num_tokens, 8, generator=torch.Generator().manual_seed(3))
    inputs = z_t, torch.tensor([0.2, 0.9]), torch.tensor([1, 3]), cut
    with torch.no_grad():
        return net(*inputs), bundle.velocity(*inputs)


def folded(net: MergeDiT, adapter: Any) -> MergeDiT:
    """The network with W + alpha / rank B A written out, layer by layer."""
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for name in state:
        down = adapter.weights.get(name.replace(".weight", ".lora_A.weight"))
        up = adapter.weights.get(name.replace(".weight", ".lora_B.weight"))
        if down is not None and up is not None:
            state[name] += adapter.alpha / len(down) * torch.einsum("or,ri->oi", up, down)
    other = build_merge_dit(LGMModelConfig(size="tiny", num_classes=3, **SIZES))
    other.load_state_dict(state)
    return other.eval()


def test_lora_files_of_two_lengths_become_one_bundle(generator, around, tmp_path):
    first, second = random_adapter(generator, 5), random_adapter(generator, 6, rank=2)
    torch.save(lora_content(generator, first), tmp_path / "lora_8.pth")
    torch.save(lora_content(generator, second), tmp_path / "lora_12.pth")
    report, remarks = import_lora(tmp_path / "lora_8.pth", tmp_path / "out", 8, around)
    assert report.ignored == {}
    assert any("for K = 8 (--num-tokens), rank 3, alpha 32 (--alpha)" in line for line in remarks)
    assert any("'model' of" in line and "no 'model_ema'" in line for line in remarks)
    import_lora(tmp_path / "lora_12.pth", tmp_path / "both", 12, tmp_path / "out")
    bundle = load_lgm_bundle(tmp_path / "both")
    assert LGMPipeline(bundle).protocol() == {"noise_scale": "legacy"}
    for num_tokens, net in ((8, folded(generator, first)), (12, folded(generator, second))):
        expected, found = velocities(net, bundle, num_tokens)
        assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())
        plain, _ = velocities(generator, bundle, num_tokens)
        assert float((plain - expected).abs().max()) > 1e-2
    expected, found = velocities(generator, bundle, 16)
    assert torch.equal(found, expected)


def test_an_adapter_alone_needs_the_bundle_of_its_base(generator, around, tmp_path):
    torch.save(generator_content(generator), tmp_path / "xl.pth")
    adapter = random_adapter(generator, 5)
    model = lora_content(generator, adapter)["model"]
    alone = {name: value for name, value in model.items() if ".lora_" in name}
    torch.save({"model": alone}, tmp_path / "lora.pth")
    with pytest.raises(CheckpointError, match="key pos_embed: missing"):
        import_lora(tmp_path / "lora.pth", tmp_path / "out", 8, around)
    import_generator(tmp_path / "xl.pth", tmp_path / "base", around)
    _, remarks = import_lora(tmp_path / "lora.pth", tmp_path / "out", 8, tmp_path / "base", 16.0)
    assert any("the checkpoint has none" in line for line in remarks)
    half = folded(generator, type(adapter)(adapter.weights, 16.0))
    expected, found = velocities(half, load_lgm_bundle(tmp_path / "out"), 8)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_loras_that_do_not_fit_are_refused(generator, around, tmp_path):
    adapter = random_adapter(generator, 5)
    content = lora_content(generator, adapter)
    path, base = tmp_path / "lora.pth", tmp_path / "base"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="release_import lora"):
        import_generator(path, tmp_path / "out", around)
    with pytest.raises(ConfigError, match=r"num_tokens: 3 is outside \[4, 16\]"):
        import_lora(path, tmp_path / "out", 3, around)
    import_lora(path, base, 8, around)
    with pytest.raises(ConfigError, match="has an adapter for 8 already"):
        import_lora(path, tmp_path / "out", 8, base)
    torch.save(generator_content(generator), tmp_path / "xl.pth")
    corrected = Surroundings(around.tokenizer, around.latent_stats)
    import_generator(tmp_path / "xl.pth", tmp_path / "corrected", corrected)
    with pytest.raises(ConfigError, match="trained under 'legacy'"):
        import_lora(path, tmp_path / "out", 12, tmp_path / "corrected")
    for change, text in (
        ({"base_model.model.pos_embed": torch.zeros(1, 16, 128)}, "1 of its base weights differ"),
        ({"base_model.model.transformer.blocks.0.attn.qkv.lora_A.32.weight": torch.zeros(3, 128)},
         "found: '256', '32'"),
        ({"base_model.model.transformer.blocks.0.mlp.w12.lora_A.256.weight": torch.zeros(2, 128)},
         r"lora_A\.256\.weight: shape"),
    ):  # fmt: skip
        torch.save({"model": content["model"] | change}, path)
        with pytest.raises(CheckpointError, match=text):
            import_lora(path, tmp_path / "out", 12, base)
    del content["model"]["base_model.model.transformer.blocks.1.attn.proj.base_layer.bias"]
    torch.save(content, path)
    text = r"key base_model\.model\.transformer\.blocks\.1\.attn\.proj\.base_layer\.bias \(here"
    with pytest.raises(CheckpointError, match=text):
        import_lora(path, tmp_path / "out", 12, base)
    assert not (tmp_path / "out").exists()


def test_the_lora_command(generator, around, tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "lora_8.pth", tmp_path / "out"
    torch.save(lora_content(generator, random_adapter(generator, 5)), path)
    place = ["--tokenizer", around.tokenizer, "--latent-stats", around.latent_stats]
    cases: list[tuple[list[Any], str]] = [
        ([path, out, "--num-tokens", 8, *place], ""),
        ([path, tmp_path / "both", "--num-tokens", 12, "--base", out], ""),
        ([path, tmp_path / "no", "--num-tokens", 8], "--tokenizer: missing"),
        ([path, tmp_path / "no", "--num-tokens", 8, *place[:2]], "--latent-stats: missing"),
        ([path, tmp_path / "no", "--num-tokens", 6, *place, "--base", out], "leave them away"),
        ([path, tmp_path / "no", "--num-tokens", 8, *place, "--alpha", "nan"], "--alpha: nan"),
    ]
    for arguments, text in cases:
        monkeypatch.setattr(sys, "argv", ["release_import", "lora", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            exit_on_user_error(main)
        assert (end.value.code or 0) == (2 if text else 0)
        assert text in capsys.readouterr().err
    assert sorted(load_lgm_bundle(tmp_path / "both").adapters) == [8, 12]
    assert not (tmp_path / "no").exists()


def test_names_inside_of_peft_go_both_ways(generator):
    names = list(lora_content(generator, random_adapter(generator, 5))["model"])
    renaming = PeftRenaming(names, "lora.pth")
    assert all(renaming.theirs(renaming(name)) == name for name in names)
    plain = [name.replace(".256.", ".") for name in names if ".lora_" in name]
    renaming = PeftRenaming(plain, "lora.pth")
    assert all(renaming.theirs(renaming(name)) == name for name in plain)
    assert generator_name(renaming(plain[0])) in plain[0]


# --- near ties ------------------------------------------------------------------------------------


def test_near_ties_of_a_tree_are_counted():
    heights = torch.tensor([0.1, 0.1 + 5e-7, 0.2, 0.2 + 5e-5, 0.5, 0.7, 101.0])
    merges = torch.tensor([[0, 1], [4, 5], [2, 8], [6, 9], [3, 10], [7, 11], [12, 13]])
    tree = MergeTree(merges, heights, 2)
    assert (tree.near_ties(1e-6), tree.near_ties(1e-4), tree.near_ties(0.0)) == (1, 2, 0)
    text = about_ties(tree)
    assert "of 6 merges 1 lie within float32 rounding (1e-6)" in text
    assert "2 within that of TF32" in text
    assert "--merge-tree" in text


def test_distant_merges_need_no_dictionary(tokenizer):
    assert "--merge-tree" not in about_ties(tokenizer.merge_tree())


def test_a_collapsed_cluster_is_told_on_import(tokenizer, tmp_path):
    """Embeddings within 1e-3 of each other: similarities differ by their rounding alone."""
    generator = torch.Generator().manual_seed(0)
    content = tokenizer_content(tokenizer, {})
    noise = torch.randn(16, 768, generator=generator) / 768**0.5
    content["ema"]["merge_module.embeddings"] = torch.ones(16, 768) / 768**0.5 + 1e-3 * noise
    torch.save(content, tmp_path / "tokenizer.pt")
    _, remarks = import_tokenizer(tmp_path / "tokenizer.pt", tmp_path / "out")
    (line,) = [remark for remark in remarks if remark.startswith("near ties")]
    assert "of 12 merges 11 lie within float32 rounding" in line
    assert "--merge-tree" in line
