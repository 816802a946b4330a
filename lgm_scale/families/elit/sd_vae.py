"""The autoencoder of Stable Diffusion: images to a grid of latents and back, never trained here.

Its network is that of diffusers (an extra: `pip install 'lgm-scale[sd-vae]'`), its weights a local
folder as diffusers writes it. Files are read by us and not by diffusers, which would look for
missing ones on the network and fill missing weights with random numbers.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.elit.config import CONFIG_NAME, GET_VAE, WEIGHTS_NAME, vae_file
from lgm_scale.frozen import read_weights
from lgm_scale.weights import Unfilled

_ENCODER = ("encoder.", "quant_conv.")
_PUBLISHED_SCALE = 0.18215
"""What diffusers takes where config.json names none, as those of sd-vae-ft-mse and -ema."""
# Older releases of diffusers, and so the published files, call the parts of attention otherwise.
_OLD_ATTENTION = re.compile(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)$")
_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class SDVAE(nn.Module):
    """Images to the moments of their latents, and latents to images. Frozen.

    Args:
        net: diffusers' AutoencoderKL with its weights.
    """

    net: Any  # its own annotations do not fit what it returns

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.eval().requires_grad_(False)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.net.config["latent_channels"])

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.net.config["block_out_channels"]) - 1)

    @property
    def scale(self) -> float:
        """What a generator multiplies latents with, so that they have about unit variance."""
        return float(self.net.config["scaling_factor"])

    def side(self, image_size: int) -> int:
        """Latents along a side of an image of `image_size` pixels.

        Raises: ConfigError if they do not come out even.
        """
        if image_size < 1 or image_size % self.downsampling:
            raise ConfigError(
                f"image_size: {image_size} must be a positive multiple of {self.downsampling}, "
                "the pixels per latent of this autoencoder"
            )
        return image_size // self.downsampling

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, not scaled; float32 under any autocast.

        Shapes: images [B, 3, S, S] in [-1, 1] -> two of [B, channels, h, h], h = S / downsampling.
        """
        for pixels in images.shape[-2:]:
            self.side(pixels)
        # Latents are made once and kept for all runs: no precision of a run may show in them.
        with torch.autocast(images.device.type, enabled=False):
            latents = self.net.encode(images.float()).latent_dist
        return latents.mean, latents.std

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in about [-1, 1], float32, not clipped. A caller's autocast has its effect.

        Shapes: latents [B, channels, h, w], not scaled -> [B, 3, h * downsampling, ...].
        """
        return self.net.decode(latents.float()).sample.float()

    def decode_flops(self, image_size: int) -> int:
        """Operations of decoding one image, two per multiply-add; counted, nothing is computed.

        Raises: ConfigError if `image_size` is no multiple of `downsampling`.
        """
        side = self.side(image_size)
        with torch.device("meta"), Unfilled():
            net = _network(dict(self.net.config))
            latents = torch.empty(1, self.channels, side, side)
        counter = FlopCounterMode(display=False)
        # As a fused kernel the attention would not be counted everywhere.
        with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            net.decode(latents)
        return counter.get_total_flops()


def load_sd_vae(folder: str | Path, device: torch.device | str = "cpu") -> SDVAE:
    """The autoencoder of a local folder in the layout of diffusers, float32.

    Raises: CheckpointError for a folder that is missing or incomplete, for a configuration of
        something else, and for weights that do not fit it or are not finite; ConfigError without
        diffusers.
    """
    path, config = _read_config(folder)
    weights = _read_weights(folder)
    net = _build(config, path)
    # Copied: what is read is backed by the file.
    state = {name: weight.to(device, torch.float32, copy=True) for name, weight in weights.items()}
    try:
        net.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{Path(folder) / WEIGHTS_NAME} does not fit {CONFIG_NAME} beside it: {error}"
        ) from error
    return SDVAE(net)


def encoder_id(folder: str | Path) -> str:
    """SHA-256 of the encoder's weights: names, shapes, and values as float32.

    The decoder is left out: sd-vae-ft-mse and -ema differ there alone, and either one decodes
    latents of the other. A file with the names of an old diffusers has the id of a new one.

    Raises: CheckpointError.
    """
    weights = _read_weights(folder)
    digest = hashlib.sha256()  # in order of names, so that the order in the file does not count
    for name in sorted(name for name in weights if name.startswith(_ENCODER)):
        values = weights[name].float().contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def latent_scale(folder: str | Path) -> float:
    """The scale of latents that a folder states, without its weights. Raises: CheckpointError."""
    _, config = _read_config(folder)
    return float(config.get("scaling_factor", _PUBLISHED_SCALE))


def save_sd_vae(vae_folder: str | Path, to: str | Path) -> None:
    """Copy what `load_sd_vae` needs. Raises: CheckpointError if it is not there."""
    files = [vae_file(vae_folder, name) for name in (CONFIG_NAME, WEIGHTS_NAME)]
    Path(to).mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, Path(to) / file.name)


def _read_config(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """Path and settings of a folder's network. Raises: CheckpointError."""
    path = vae_file(folder, CONFIG_NAME)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {GET_VAE}") from error
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != "AutoencoderKL":
        raise CheckpointError(
            f"{path} is of {found or 'something unnamed'}, but an AutoencoderKL is needed. "
            f"{GET_VAE}"
        )
    return path, {key: value for key, value in config.items() if not key.startswith("_")}


def _read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Weights under today's names, as stored."""
    path = vae_file(folder, WEIGHTS_NAME)
    weights = {_todays_name(name): weight for name, weight in read_weights(path).items()}
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"{path}: {name} is not finite: the file is damaged. {GET_VAE}")
    return weights


def _todays_name(name: str) -> str:
    """A weight's name in today's diffusers, given that of any."""
    return _OLD_ATTENTION.sub(lambda m: f"{m[1]}.{_ATTENTION_NAMES[m[2]]}.{m[3]}", name)


def _build(config: dict[str, Any], path: Path) -> Any:
    """The network on the meta device, and the rules that it must keep."""
    _diffusers()
    try:
        with torch.device("meta"), Unfilled():
            net = _network(config)
    except Exception as error:  # diffusers checks little, so a wrong value fails anywhere
        raise CheckpointError(
            f"{path} describes no autoencoder that diffusers can build: {error}. {GET_VAE}"
        ) from error
    full = net.config
    if (full["in_channels"], full["out_channels"]) != (3, 3):
        raise CheckpointError(
            f"{path}: from {full['in_channels']} to {full['out_channels']} channels; images have 3"
        )
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if full[key] is not None:
            raise CheckpointError(
                f"{path}: {key} is {full[key]}; latents are scaled here and never shifted, so this "
                f"autoencoder cannot be used. {GET_VAE}"
            )
    scale = full["scaling_factor"]
    if not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
        raise CheckpointError(f"{path}: scaling_factor is {scale!r}, it must be a number above 0")
    return net


def _network(config: dict[str, Any]) -> Any:
    """The network with these settings; those with an underscore are notes of diffusers."""
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    return _diffusers()(**known)


def _diffusers() -> Any:
    """Import it when it is needed: that takes seconds. Raises: ConfigError if it is missing."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ConfigError(
            f"the autoencoder of Stable Diffusion needs diffusers, which cannot be imported "
            f"({error}): pip install 'lgm-scale[sd-vae]'"
        ) from error
    return AutoencoderKL
