"""Bundles of generators on a grid: ELIT and SiT.

    bundle/
      bundle.json                format, kind, configuration, hash of every file
      generator.safetensors      EMA weights
      positions.safetensors      fixed positions, where an import has others than are computed
      vae/                       the autoencoder that decodes, where the space is `sd_vae`

No merge tree and no statistics: latents are scaled by the autoencoder's own number, pixels by ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lgm_scale.bundle import finish_bundle, model_config, read_bundle, start_bundle
from lgm_scale.config.loading import to_dict
from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.elit.config import ELITModelConfig, SpaceConfig
from lgm_scale.families.elit.network import SiT, build_elit
from lgm_scale.weights import Unfilled, load_weights, save_weights

if TYPE_CHECKING:
    from lgm_scale.families.elit.sd_vae import SDVAE

ELIT_KIND = "spatial_generator"
VAE_FOLDER = "vae"
GENERATOR_NAME = "generator.safetensors"
POSITIONS_NAME = "positions.safetensors"


@dataclass(frozen=True)
class ELITBundle:
    """A generator on a grid with all it needs to make images."""

    net: SiT
    vae: SDVAE | None
    """What decodes; None for pixels."""
    model: ELITModelConfig
    space: SpaceConfig
    classes: tuple[str, ...]
    info: dict[str, Any]
    """Contents of bundle.json."""


def save_elit_bundle(
    folder: str | Path,
    model: ELITModelConfig,
    space: SpaceConfig,
    weights: dict[str, Tensor],
    classes: tuple[str, ...],
    training: dict[str, Any],
    vae: str | Path | None = None,
    positions: Tensor | None = None,
) -> None:
    """Write a bundle, aside first, so that it is complete or absent.

    `folder` is replaced if it is a bundle already; `training` says how the network came about
    (steps, the run's configuration). The folder `vae`, needed by `sd_vae` alone, is copied.
    `positions` [N, C] is the fixed table that it samples with; None: the one that is computed.

    Raises: ConfigError if the space and `vae` do not fit; CheckpointError for a folder that is
    none, or names of another number of classes.
    """
    if (space.kind == "sd_vae") != (vae is not None):
        rule = "needs the folder of its autoencoder" if vae is None else "has no autoencoder"
        raise ConfigError(f"vae: {vae}; a bundle in the space {space.kind!r} {rule}")
    _check_classes(folder, model, classes)
    aside = start_bundle(folder)
    save_weights(weights, aside / GENERATOR_NAME)
    if positions is not None:
        save_weights({"pos_embed": positions}, aside / POSITIONS_NAME)
    if vae is not None:
        from lgm_scale.families.elit.sd_vae import save_sd_vae

        save_sd_vae(vae, aside / VAE_FOLDER)
    # The bundle's own copy decodes, wherever the original was.
    models = {"generator": to_dict(model), "space": to_dict(replace(space, vae=None))}
    finish_bundle(aside, folder, ELIT_KIND, models, classes, training)


def load_elit_bundle(folder: str | Path, device: torch.device | str = "cpu") -> ELITBundle:
    """A generator and what decodes its states, frozen and in eval mode.

    Raises: CheckpointError; ConfigError if what reads the autoencoder is not installed.
    """
    info = read_bundle(folder, ELIT_KIND)
    model = model_config(info, "generator", ELITModelConfig, folder)
    space = model_config(info, "space", SpaceConfig, folder)
    classes = tuple(info["classes"])
    _check_classes(folder, model, classes)
    try:
        with Unfilled():
            net = build_elit(model, space)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: its configuration is damaged: {error}") from error
    load_weights(net, Path(folder) / GENERATOR_NAME)
    if POSITIONS_NAME in info["files"]:
        net.pos_embed.copy_(load_file(Path(folder) / POSITIONS_NAME)["pos_embed"])
    vae = None
    if space.kind == "sd_vae":
        from lgm_scale.families.elit.sd_vae import load_sd_vae

        vae = load_sd_vae(Path(folder) / VAE_FOLDER, device)
        found, wanted = (vae.channels, vae.downsampling), (space.channels, space.downsampling)
        if found != wanted:
            raise CheckpointError(
                f"{folder}: its autoencoder has {found[0]} channels at 1/{found[1]} of the side, "
                f"the generator's states {wanted[0]} at 1/{wanted[1]}; they do not belong together"
            )
    return ELITBundle(net.to(device), vae, model, space, classes, info)


def _check_classes(folder: str | Path, model: ELITModelConfig, classes: tuple[str, ...]) -> None:
    if len(classes) != model.num_classes:
        raise CheckpointError(
            f"{folder}: {len(classes)} names for the {model.num_classes} classes of its generator; "
            "they do not belong together"
        )
