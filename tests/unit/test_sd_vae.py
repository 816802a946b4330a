"""The autoencoder of Stable Diffusion, against diffusers' own way of loading and using it."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_vae import save_small_vae
from torch import Tensor

from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.elit.sd_vae import encoder_id, load_sd_vae, save_sd_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_small_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "vae"))


def change_weights(folder: Path, change) -> None:
    """Write `change(name, weight) -> (name, weight) or None` of every weight."""
    changed = [change(name, weight) for name, weight in load_file(folder / WEIGHTS).items()]
    save_file(dict(pair for pair in changed if pair is not None), folder / WEIGHTS)


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_it_computes_what_diffusers_computes(original):
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(original, local_files_only=True, use_safetensors=True)
    ours = load_sd_vae(original)
    x = images()
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist
        mean, std = ours.moments(x)
        assert mean.shape == std.shape == (2, 4, 4, 4)
        assert torch.equal(mean, expected.mean)
        assert torch.equal(std, expected.std)
        assert std.min() > 0
        z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        pixels = ours.decode(z)
        assert pixels.shape == (2, 3, 32, 32)
        assert torch.equal(pixels, theirs.decode(z).sample)
    assert (ours.channels, ours.downsampling, ours.scale) == (4, 8, 0.18215)
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_the_deviation_is_clamped_as_diffusers_clamps_it(folder):
    """Log variances are cut to -30 and 20, so that a deviation is finite in float16."""

    def shift(name: str, weight: Tensor) -> tuple[str, Tensor]:
        if name == "quant_conv.bias":
            weight = torch.tensor([0.0] * 4 + [100.0, 100.0, -100.0, -100.0])
        return name, weight

    change_weights(folder, shift)
    with torch.no_grad():
        _, std = load_sd_vae(folder).moments(images(1))
    torch.testing.assert_close(std[:, :2].log(), torch.full((1, 2, 4, 4), 10.0))
    torch.testing.assert_close(std[:, 2:].log(), torch.full((1, 2, 4, 4), -15.0))
    assert torch.isfinite(std.half()).all()
    assert std.half().min() > 0


def test_moments_are_float32_under_autocast(original):
    vae = load_sd_vae(original)
    with torch.no_grad():
        plain = vae.moments(images(1))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = vae.moments(images(1).to(torch.bfloat16).float())
            decoded = vae.decode(plain[0])
    assert [value.dtype for value in (*mixed, decoded)] == [torch.float32] * 3
    rounded = images(1).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(mixed[0], vae.moments(rounded)[0])


def test_files_of_an_old_diffusers_are_the_same_autoencoder(original, folder):
    """The published files have the names of an old diffusers, and lack keys of a new one."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = []

    def rename(name: str, weight: Tensor) -> tuple[str, Tensor]:
        for new, former in names.items():
            if f".attentions.0.{new}." in name:
                old.append(name)
                name = name.replace(f".{new}.", f".{former}.")
        return name, weight

    change_weights(folder, rename)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"):
        del config[key]
    path.write_text(json.dumps(config | {"_diffusers_version": "0.4.2"}))
    assert load_sd_vae(folder).scale == 0.18215
    assert len(old) == 2 * 4 * 2
    assert encoder_id(folder) == encoder_id(original)
    with torch.no_grad():
        ours, theirs = (load_sd_vae(f).moments(images())[0] for f in (folder, original))
    assert torch.equal(ours, theirs)


def test_the_id_is_of_the_encoder_alone(original, folder):
    expected = encoder_id(original)
    assert expected == encoder_id(folder)
    assert len(expected) == 64

    def scaled(*starts: str):
        return lambda name, weight: (name, weight * 1.5 if name.startswith(starts) else weight)

    change_weights(folder, scaled("decoder.", "post_quant_conv."))
    assert encoder_id(folder) == expected
    with torch.no_grad():
        assert not torch.equal(
            load_sd_vae(folder).decode(torch.ones(1, 4, 4, 4)),
            load_sd_vae(original).decode(torch.ones(1, 4, 4, 4)),
        )
    for start in ("encoder.conv_in.bias", "quant_conv.weight"):
        shutil.copyfile(original / WEIGHTS, folder / WEIGHTS)
        assert encoder_id(folder) == expected
        bump = lambda name, w, start=start: (name, w + 1e-3 if name.startswith(start) else w)  # noqa: E731
        change_weights(folder, bump)
        assert encoder_id(folder) != expected


def test_the_id_is_its_description(original):
    """Kept in every data set that was encoded, so it must stay as it is."""
    digest = hashlib.sha256()
    for name, weight in sorted(load_file(original / WEIGHTS).items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name} {list(weight.shape)}\n".encode())
            digest.update(weight.numpy().tobytes())
    assert encoder_id(original) == digest.hexdigest()


def test_a_copy_holds_what_is_needed(original, tmp_path):
    (tmp_path / "source").mkdir()
    save_sd_vae(original, tmp_path / "deep" / "copy")
    copied = tmp_path / "deep" / "copy"
    assert sorted(path.name for path in copied.iterdir()) == ["config.json", WEIGHTS]
    assert encoder_id(copied) == encoder_id(original)
    load_sd_vae(copied)
    with pytest.raises(CheckpointError, match=r"source has no config\.json, but: nothing"):
        save_sd_vae(tmp_path / "source", tmp_path / "other")
    assert not (tmp_path / "other").exists()


class Boom:
    """A pickle that leaves a trace when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", WEIGHTS])
def test_a_pickle_is_refused_without_being_read(folder, tmp_path, name):
    trace = tmp_path / "trace"
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Boom(trace)))
    text = "pickle is never read" if name.endswith(".bin") else "cannot be read as weights"
    for use in (load_sd_vae, encoder_id):
        with pytest.raises(CheckpointError, match=text):
            use(folder)
    assert not trace.exists()
    pickle.loads((folder / name).read_bytes())
    assert trace.exists()  # it would have been seen


def test_what_is_missing_is_named_and_nothing_is_downloaded(folder, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    get = r"stabilityai/sd-vae-ft-mse .*nothing is downloaded"
    with pytest.raises(CheckpointError, match=f"sd-vae-ft-mse does not exist.*{get}"):
        load_sd_vae("stabilityai/sd-vae-ft-mse")
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        load_sd_vae(folder / "config.json")
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folder, pipeline / "vae")
    with pytest.raises(CheckpointError, match=r"Did you mean .*pipeline/vae\?"):
        load_sd_vae(pipeline)
    (folder / WEIGHTS).rename(folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"has no {WEIGHTS}, but: config\.json, model\.safetensors.*{get}"
    ):
        load_sd_vae(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json, but: model\.safetensors"):
        load_sd_vae(folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "is of UNet2DConditionModel, but an Auto"),
        ({"_class_name": None}, "is of something unnamed"),
        ({"down_block_types": ["NoSuchBlock"] * 4}, "no autoencoder that diffusers can build"),
        ({"block_out_channels": [30, 30, 30, 30]}, "no autoencoder that diffusers can build"),
        ({"dimensions": 3}, "unexpected keyword argument 'dimensions'"),
        ({"in_channels": 1}, "from 1 to 3 channels; images have 3"),
        ({"shift_factor": 0.1159}, r"shift_factor is 0\.1159; .* never shifted"),
        ({"scaling_factor": 0}, "scaling_factor is 0, it must be a number above 0"),
        ({"scaling_factor": "big"}, "scaling_factor is 'big'"),
        ({"latent_channels": 8}, r"does not fit config\.json beside it.*size mismatch"),
        ({"layers_per_block": 2}, r"does not fit config\.json beside it.*Missing key"),
    ],
)
def test_a_wrong_configuration_is_refused(folder, changes, text):
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=f"(?s){text}"):
        load_sd_vae(folder)


def test_a_damaged_configuration_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_sd_vae(folder)


def test_weights_must_be_all_there_and_finite(original, folder):
    name = "decoder.conv_in.bias"
    change_weights(folder, lambda n, w: None if n == name else (n, w))
    with pytest.raises(CheckpointError, match=f"(?s)does not fit .*{name}"):
        load_sd_vae(folder)
    shutil.copyfile(original / WEIGHTS, folder / WEIGHTS)
    change_weights(folder, lambda n, w: (n, w / 0 if n == name else w))
    with pytest.raises(CheckpointError, match=f"{name} is not finite"):
        load_sd_vae(folder)


def test_images_must_come_out_even(original):
    vae = load_sd_vae(original)
    assert vae.side(64) == 8
    for size in (0, 30):
        with pytest.raises(ConfigError, match=f"image_size: {size} must be .* multiple of 8"):
            vae.side(size)
    with pytest.raises(ConfigError, match="image_size: 20"):
        vae.moments(torch.zeros(1, 3, 32, 20))


def test_operations_of_a_decode_are_those_of_its_layers(original):
    """Convolutions through hooks, attention by hand; two per multiply-add."""
    vae = load_sd_vae(original)
    total = 0

    def conv(module, inputs, output):
        nonlocal total
        total += 2 * output.numel() * module.weight[0].numel()

    def linear(module, inputs, output):
        nonlocal total
        total += 2 * output.numel() * module.in_features

    kinds = {torch.nn.Conv2d: conv, torch.nn.Linear: linear}
    hooks = [
        module.register_forward_hook(kinds[type(module)])
        for module in vae.modules()
        if type(module) in kinds
    ]
    with torch.no_grad():
        vae.decode(torch.zeros(1, 4, 4, 4))
    for hook in hooks:
        hook.remove()
    tokens, width = 16, 32
    assert vae.decode_flops(32) == total + 2 * 2 * tokens**2 * width
    assert vae.decode_flops(64) > 4 * vae.decode_flops(32)


def test_the_published_sizes_are_counted_without_their_weights():
    """A decode of 256 px takes 622 GFLOP; 2 x 1024^2 x 512 x 2 of them are attention."""
    from diffusers import AutoencoderKL

    from lgm_scale.families.elit.sd_vae import SDVAE

    with torch.device("meta"):
        vae = SDVAE(
            AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            )
        )
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    assert vae.decode_flops(256) == 622_187_282_432


def test_without_diffusers_the_extra_is_named(original, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'lgm-scale\[sd-vae\]'"):
        load_sd_vae(original)
    assert len(encoder_id(original)) == 64
