"""Adapters per length: what peft trains is what sampling adds, and bundles keep several."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from release_files import lora_name
from safetensors.torch import load_file, save_file
from test_bundle import bundles  # noqa: F401  a fixture
from torch import Tensor, nn

from lgm_scale.bundle import read_bundle
from lgm_scale.errors import CheckpointError
from lgm_scale.evaluation.sweep.samples import sample_images
from lgm_scale.families.lgm.bundle import GENERATOR_NAME, load_lgm_bundle, save_adapted_bundle
from lgm_scale.families.lgm.lora import TARGETS, Adapter, add_adapter, plain_names, with_adapter
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.families.lgm.pipeline import LGMPipeline
from lgm_scale.merging.tree import MergeTree
from lgm_scale.sampling.config import CFGRescale, SamplerConfig
from lgm_scale.storage.files import file_hash


def network() -> MergeDiT:
    torch.manual_seed(0)
    net = MergeDiT(32, 2, 2, latent_dim=4, num_base_tokens=16, num_classes=5)
    for parameter in net.parameters():  # the zero start would hide everything
        nn.init.normal_(parameter, std=0.2)
    return net.eval()


def trainable(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}


def random_adapter(net: MergeDiT, seed: int, rank: int = 3, scale: float = 0.3) -> Adapter:
    """An adapter of which neither matrix is zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for index in range(len(net.blocks)):
        for target in TARGETS:
            layer = net.get_submodule(f"blocks.{index}.{target}")
            assert isinstance(layer, nn.Linear)
            for matrix, shape in (
                ("A", (rank, layer.in_features)),
                ("B", (layer.out_features, rank)),
            ):
                name = f"blocks.{index}.{target}.lora_{matrix}.weight"
                weights[name] = scale * torch.randn(shape, generator=generator)
    return Adapter(weights, alpha=6.0)


def inputs(num_tokens: int = 8) -> tuple:
    torch.manual_seed(1)
    tree = MergeTree.from_embeddings(torch.randn(16, 8))
    return (
        torch.randn(3, num_tokens, 4), torch.rand(3), torch.arange(3), tree.assignment(num_tokens)
    )  # fmt: skip


def test_an_added_adapter_changes_nothing_and_alone_is_trained():
    net = network()
    expected, count = net(*inputs()), len(list(net.blocks)) * len(TARGETS) * 2
    add_adapter(net, rank=4, alpha=8.0)
    assert torch.equal(net(*inputs()), expected)
    names = trainable(net).keys()
    assert len(names) == count
    assert all("lora_" in name for name in names)


def test_merged_weights_are_the_network_that_was_trained():
    net, base = network(), network()
    add_adapter(net, rank=4, alpha=10.0)
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    adapter = Adapter(plain_names(trainable(net)), alpha=10.0)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    adapted = with_adapter(base, adapter)
    trained = net(*inputs())
    assert (trained - base(*inputs())).abs().max() > 0.1
    torch.testing.assert_close(adapted(*inputs()), trained, atol=1e-4, rtol=1e-4)
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name])
    # Only what changes is copied.
    assert adapted.pos_embed is base.pos_embed
    assert adapted.blocks[0].get_submodule("attn.qkv").bias is base.blocks[0].attn.qkv.bias  # type: ignore[union-attr]


def test_a_foreign_adapter_is_named():
    adapter = random_adapter(MergeDiT(48, 2, 2, 4, 16, 5), seed=0)
    with pytest.raises(
        CheckpointError, match=r"blocks\.0\.attn\.proj\.lora_A\.weight is \(3, 48\)"
    ):
        with_adapter(network(), adapter)
    weights = random_adapter(network(), seed=0).weights
    del weights["blocks.1.mlp.w3.lora_B.weight"]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.w3\.lora_B\.weight is missing"):
        Adapter(weights, 1.0).check(network())


@pytest.fixture
def adapted(bundles, tmp_path) -> Path:  # noqa: F811  the fixture above
    """A random generator with adapters for 4 and 8 tokens, added one after the other."""
    net = load_lgm_bundle(bundles[1]).net
    weights = load_file(bundles[1] / GENERATOR_NAME)
    torch.manual_seed(2)
    weights = {name: 0.1 * torch.randn_like(value) for name, value in weights.items()}
    save_file(weights, bundles[1] / GENERATOR_NAME)
    edit(bundles[1], files=read_hashes(bundles[1]))
    first, second = tmp_path / "first", tmp_path / "second"
    save_adapted_bundle(first, bundles[1], 4, random_adapter(net, 4), {"steps": 1})
    save_adapted_bundle(second, first, 8, random_adapter(net, 8), {"steps": 2})
    return second


def edit(folder: Path, **changes: object) -> None:
    path = folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_hashes(folder: Path) -> dict[str, str]:

    return {path.name: file_hash(path) for path in folder.glob("*.safetensors")}


def test_a_bundle_keeps_the_base_and_several_adapters(bundles, adapted):  # noqa: F811
    info = read_bundle(adapted, "generator")
    assert {"adapter_4.safetensors", "adapter_8.safetensors"} < info["files"].keys()
    assert info["adapters"]["8"]["training"] == {"steps": 2}
    assert info["training"] == {"steps": 5}  # of the base
    bundle, base = load_lgm_bundle(adapted), load_lgm_bundle(bundles[1])
    for name, value in base.net.state_dict().items():
        assert torch.equal(bundle.net.state_dict()[name], value)
    for num_tokens in (4, 8):
        expected = random_adapter(base.net, num_tokens).weights
        found = bundle.adapters[num_tokens].weights
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert bundle.network(16) is bundle.net
    assert bundle.network(8) is bundle.network(8)
    (adapted / "adapter_4.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"adapter_4\.safetensors is missing or differs"):
        load_lgm_bundle(adapted)


def test_damaged_adapters_are_told(adapted):
    entries = read_bundle(adapted, "generator")["adapters"]
    edit(adapted, adapters={"8": {"file": "generator.safetensors", "alpha": 1.0}})
    with pytest.raises(CheckpointError, match="its adapters are damaged: an adapter for another"):
        load_lgm_bundle(adapted)
    edit(adapted, adapters={"8": entries["8"] | {"file": "../x"}})
    with pytest.raises(CheckpointError, match="not among its files"):
        load_lgm_bundle(adapted)


def test_sampling_takes_the_adapter_of_its_length(bundles, adapted):  # noqa: F811
    base, bundle = load_lgm_bundle(bundles[1]), load_lgm_bundle(adapted)
    settings = {"cfg_rescale": CFGRescale.NONE, "cfg_scale": 1.5, "num_steps": 4}

    def images(generator, k):
        pipe = LGMPipeline(generator)
        piped = pipe([0, 1], k, seed=3, progress_bar=False, **settings)
        evaluated, _ = sample_images(pipe, torch.tensor([0, 1]), k, SamplerConfig(**settings), 3)
        torch.testing.assert_close(
            torch.tensor(piped).permute(0, 3, 1, 2), evaluated, atol=1, rtol=0
        )
        return evaluated

    assert torch.equal(images(bundle, 16), images(base, 16))
    for k in (4, 8):
        merged = replace(base, net=with_adapter(base.net, bundle.adapters[k]))
        assert torch.equal(images(bundle, k), images(merged, k))
        assert not torch.equal(images(bundle, k), images(base, k))


@pytest.mark.slow
def test_sampling_does_not_import_peft():
    code = "import sys, lgm_scale.families.lgm.lora; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_peft_names_a_wrapped_release_as_its_imitation_does():
    """The files of tests/release_files.py have the names that peft's wrapper really gives."""
    from peft import LoraConfig, get_peft_model

    net = network()
    outer = nn.Module()
    outer.transformer = nn.Module()
    outer.transformer.blocks = net.blocks
    config = LoraConfig(r=2, lora_alpha=32, target_modules=list(TARGETS), lora_dropout=0.0)
    adapter = random_adapter(net, 0, rank=2)
    expected = {lora_name(name) for name in net.state_dict() if name.startswith("blocks.")}
    wrapped = get_peft_model(outer, config, adapter_name="256")  # type: ignore[arg-type]
    found = {name.replace(".modulation.", ".adaLN_modulation.") for name in wrapped.state_dict()}
    assert found == expected | {lora_name(name) for name in adapter.weights}
