"""Frozen networks: where their files come from, and that they never leave by a checkpoint."""

from __future__ import annotations

import dataclasses
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_tokenizer import small_batch, small_model

from lgm_scale.build import export_bundle
from lgm_scale.config.schema import LengthsConfig, TrainConfig
from lgm_scale.data.config import DataConfig
from lgm_scale.errors import CheckpointError, MissingAssetError
from lgm_scale.families.base import family_of
from lgm_scale.families.tokenizer import assets
from lgm_scale.families.tokenizer.config import (
    AssetsConfig,
    TokenizerModelConfig,
    TokenizerObjectiveConfig,
    TokenizerRun,
)
from lgm_scale.families.tokenizer.training import TokenizerTrainingModel
from lgm_scale.frozen import Frozen, load_pretrained, read_weights


def training_model(config: TokenizerRun) -> TokenizerTrainingModel:
    return family_of(config).training_model(config, None)  # type: ignore[return-value]


def run_of(tmp_path, objective=None, **changes) -> TokenizerRun:
    model = TokenizerModelConfig(
        size="tiny",
        image_size=32,
        patch_size=8,
        num_base_tokens=16,
        latent_dim=8,
        codebook_size=32,
    )
    values = {
        "model": model,
        "objective": objective or TokenizerObjectiveConfig(),
        "assets": AssetsConfig(dinov2_size="s"),
    }
    return TokenizerRun(
        task="tokenizer",
        run_name="trial",
        out=str(tmp_path / "out"),
        data=DataConfig(path="nowhere"),
        lengths=LengthsConfig(choices=(8, 16)),
        train=TrainConfig(max_duration="1ba", global_batch_size=2),
        **(values | changes),
    )


def all_on(**changes) -> TokenizerObjectiveConfig:
    return TokenizerObjectiveConfig(perceptual=1.0, adversarial=0.4, representation=1.0, **changes)


def test_every_missing_file_is_named_with_its_key_path_source_size_and_purpose(tmp_path):
    config = run_of(
        tmp_path,
        all_on(),
        assets=AssetsConfig(vgg16="/nowhere/vgg.pth"),
        model=dataclasses.replace(
            run_of(tmp_path).model, size="b", pretrained_encoder="/nowhere/encoder.pth"
        ),
    )
    with pytest.raises(MissingAssetError) as caught:
        training_model(config)
    text = str(caught.value)
    for part in (
        "assets.vgg16: /nowhere/vgg.pth is not a file",
        "vgg16-397923af.pth",
        "553 MB",
        "the perceptual loss (objective.perceptual)",
        "assets.dino_critic: assets/dino_deitsmall16_pretrain.pth is not a file",
        "dino_deitsmall16_pretrain.pth",
        "the adversarial loss (objective.adversarial)",
        "assets.dinov2_teacher: assets/dinov2_vitl14_pretrain.pth is not a file",
        "dinov2_vitl14_pretrain.pth",
        "1.2 GB",
        "model.pretrained_encoder: /nowhere/encoder.pth is not a file",
        "dinov2_vitb14_pretrain.pth",
        "assets.allow_random_assets",
        "as assets/vgg16-397923af.pth; then set assets.vgg16 to that",
        "python -m lgm_scale.assets --fetch vgg16 dino_critic dinov2_l dinov2_b",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("weights", "key"),
    [
        ({"perceptual": 1.0}, "assets.vgg16"),
        ({"adversarial": 0.4}, "assets.dino_critic"),
        ({"representation": 1.0}, "assets.dinov2_teacher"),
        ({}, None),
    ],
)
def test_only_losses_that_are_on_need_files(tmp_path, weights, key):
    config = run_of(tmp_path, TokenizerObjectiveConfig(**weights))
    assert [asset.key for asset in assets.needed_assets(config)] == ([key] if key else [])


def test_random_assets_are_labelled_everywhere(tmp_path, caplog):
    config = run_of(
        tmp_path,
        TokenizerObjectiveConfig(perceptual=1.0),
        assets=AssetsConfig(allow_random_assets=True),
    )
    model = training_model(config)
    assert "RANDOM WEIGHTS stand in for assets.vgg16" in caplog.text
    average = dict(model.net.named_parameters())
    folder = export_bundle(config, model, None, average, 1)  # type: ignore[arg-type]
    info = json.loads((folder / "bundle.json").read_text())
    assert info["training"]["random_assets"] == ["assets.vgg16"]


def test_a_bundle_without_random_assets_says_so_and_holds_the_tokenizer_alone(tmp_path):
    config = run_of(tmp_path)
    model = training_model(config)
    average = dict(model.net.named_parameters())
    folder = export_bundle(config, model, None, average, 1)  # type: ignore[arg-type]
    info = json.loads((folder / "bundle.json").read_text())
    assert info["training"]["random_assets"] == []
    assert info["models"]["tokenizer"]["pretrained_encoder"] is None


def test_frozen_networks_are_in_no_state_and_no_parameters():
    model = small_model()
    held = [net.module for net in vars(model.frozen).values() if isinstance(net, Frozen)]
    assert len(held) == 3
    storages = {p.data_ptr() for net in held for p in net.state_dict().values()}
    assert storages
    assert not storages & {value.data_ptr() for value in model.state_dict().values()}
    assert not storages & {value.data_ptr() for value in model.parameters()}
    assert {name.split(".")[0] for name in model.state_dict()} == {
        "net",
        "auxiliary",
        "critic",
        "lecam_means",
    }


def test_frozen_networks_stay_frozen():
    model = small_model().train()
    held = [net.module for net in vars(model.frozen).values() if isinstance(net, Frozen)]
    batch = small_batch(3)
    model.loss(model(batch), batch).backward()
    for net in held:
        assert not any(module.training for module in net.modules())
        assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def hub_state(vit: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As the DINOv2 authors name it: a mask token, and layer scales called gamma as in timm."""
    state = {name: value.clone() for name, value in vit.state_dict().items()}
    return state | {"mask_token": torch.zeros(1, 384)}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_pretrained_encoder_is_loaded_and_resampled(tmp_path, suffix):
    torch.manual_seed(5)
    source = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, img_size=70, num_classes=0
    )
    path = tmp_path / f"encoder.{suffix}"
    if suffix == "pth":
        torch.save(hub_state(source), path)
    else:
        save_file(source.state_dict(), path)
    model = dataclasses.replace(
        run_of(tmp_path).model,
        size="s",
        image_size=64,
        patch_size=16,
        pretrained_encoder=str(path),
    )
    net = training_model(run_of(tmp_path, model=model)).net
    ours, theirs = net.encoder.vit.state_dict(), source.state_dict()
    assert torch.equal(ours["blocks.11.mlp.fc2.weight"], theirs["blocks.11.mlp.fc2.weight"])
    assert ours["patch_embed.proj.weight"].shape == (384, 3, 16, 16)
    assert ours["pos_embed"].shape == (1, 17, 384)
    # Resampled, not replaced: a flat colour gives nearly the same token with either kernel.
    flat = torch.ones(1, 3, 64, 64)
    token = net.encoder.vit.patch_embed(flat)[0, 0]
    expected = source.patch_embed(torch.ones(1, 3, 70, 70))[0, 0]
    assert torch.nn.functional.cosine_similarity(token, expected, dim=0) > 0.9


def test_the_hub_is_asked_only_when_told_to(tmp_path, monkeypatch):
    torch.manual_seed(6)
    source = timm.create_model("vit_small_patch14_dinov2", img_size=70, num_classes=0)
    asked = []

    def create_model(name: str, **options: object) -> torch.nn.Module:
        asked.append((name, options["pretrained"]))
        return source

    model = dataclasses.replace(
        run_of(tmp_path).model, size="s", image_size=64, patch_size=16, pretrained_encoder="hub"
    )
    config = run_of(tmp_path, model=model)
    assert [asset.key for asset in assets.needed_assets(config)] == []
    monkeypatch.setattr(assets.timm, "create_model", create_model)
    net = training_model(config).net
    assert asked == [("vit_small_patch14_dinov2.lvd142m", True)]
    theirs = source.state_dict()["blocks.11.mlp.fc2.weight"]
    assert torch.equal(net.encoder.vit.state_dict()["blocks.11.mlp.fc2.weight"], theirs)

    def offline(name: str, **options: object) -> torch.nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr(assets.timm, "create_model", offline)
    with pytest.raises(MissingAssetError, match=r"pretrained_encoder: hub .*no route to host"):
        training_model(config)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    vit = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0, depth=1)
    state = dict(vit.state_dict())
    del state["norm.weight"]
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"vit\.pth: 1 weights are missing \(norm\.weight"):
        load_pretrained(vit, tmp_path / "vit.pth")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_reading_a_checkpoint_executes_nothing(tmp_path, capsys):
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth cannot be read as weights"):
        read_weights(tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out
