"""Bundles of generators on a grid: ELIT and SiT.

    bundle/
      bundle.json                format, kind, configuration, hash of every file
      generator.safetensors      EMA weights
      vae/                       the autoencoder that decodes, where the space is `sd_vae`

No merge tree and no statistics: latents are scaled by the autoencoder's own number, pixels by ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lgm_scale.bundle import finish_bundle, model_config, read_bundle, start_bundle
from lgm_scale.config.loading import to_dict
from lgm_scale.config.schema import SpaceConfig, SpatialModelConfig
from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.elit.network import ELIT, SIT_SIZES, SPLITS, SiT
from lgm_scale.families.lgm.bundle import GENERATOR_NAME, load_weights, save_weights

if TYPE_CHECKING:
    from lgm_scale.families.elit.sd_vae import SDVAE

__all__ = [
    "SPATIAL_KIND",
    "SpatialBundle",
    "build_spatial_generator",
    "load_spatial_bundle",
    "save_spatial_bundle",
]

SPATIAL_KIND = "spatial_generator"
VAE_FOLDER = "vae"


@dataclass(frozen=True)
class SpatialBundle:
    """A generator on a grid with all it needs to make images."""

    net: SiT
    vae: SDVAE | None
    """What decodes; None for pixels."""
    model: SpatialModelConfig
    space: SpaceConfig
    classes: tuple[str, ...]
    info: dict[str, Any]
    """Contents of bundle.json."""


def build_spatial_generator(model: SpatialModelConfig, space: SpaceConfig) -> SiT:
    """A generator with fresh weights: an `ELIT`, or without an interface a `SiT`.

    Raises: ConfigError for sizes that do not divide, or a split that the size does not have.
    """
    row = SIT_SIZES[model.size]
    common = (
        row.width, row.depth, row.num_heads,
        space.channels, space.side, model.patch_size, model.num_classes,
    )  # fmt: skip
    interface = model.interface
    if interface is None:
        return SiT(*common)
    known = SPLITS[interface.split]
    if model.size not in known:
        raise ConfigError(
            f"model.interface.split: {interface.split!r} knows no size {model.size!r}; it has "
            f"{', '.join(known)}"
        )
    head_blocks, _, tail_blocks = known[model.size]
    return ELIT(
        *common,
        head_blocks=head_blocks,
        tail_blocks=tail_blocks,
        group_size=interface.group_size,
        drop_mode=interface.drop_mode,
        position_rows=interface.position_rows,
    )


def save_spatial_bundle(
    folder: str | Path,
    model: SpatialModelConfig,
    space: SpaceConfig,
    weights: dict[str, Tensor],
    classes: tuple[str, ...],
    training: dict[str, Any],
    vae: str | Path | None = None,
) -> None:
    """Write a bundle, aside first, so that it is complete or absent.

    Args:
        folder: Where to; replaced if it is a bundle already.
        model: Of the network.
        space: What it generates.
        weights: State of the network.
        classes: Names of the classes.
        training: Anything about how it came about (steps, the run's configuration).
        vae: Folder of the autoencoder that decodes, which is copied; needed by `sd_vae` alone.

    Raises: ConfigError if the space and `vae` do not fit; CheckpointError for a folder that is
    none, or names of another number of classes.
    """
    if (space.kind == "sd_vae") != (vae is not None):
        rule = "needs the folder of its autoencoder" if vae is None else "has no autoencoder"
        raise ConfigError(f"vae: {vae}; a bundle in the space {space.kind!r} {rule}")
    _check_classes(folder, model, classes)
    aside = start_bundle(folder)
    save_weights(weights, aside / GENERATOR_NAME)
    if vae is not None:
        from lgm_scale.families.elit.sd_vae import save_sd_vae

        save_sd_vae(vae, aside / VAE_FOLDER)
    # The bundle's own copy decodes, wherever the original was.
    models = {"generator": to_dict(model), "space": to_dict(replace(space, vae=None))}
    finish_bundle(aside, folder, SPATIAL_KIND, models, classes, training)


def load_spatial_bundle(folder: str | Path, device: torch.device | str = "cpu") -> SpatialBundle:
    """A generator and what decodes its states, frozen and in eval mode.

    Raises: CheckpointError; ConfigError if what reads the autoencoder is not installed.
    """
    info = read_bundle(folder, SPATIAL_KIND)
    model = model_config(info, "generator", SpatialModelConfig, folder)
    space = model_config(info, "space", SpaceConfig, folder)
    classes = tuple(info["classes"])
    _check_classes(folder, model, classes)
    try:
        net = build_spatial_generator(model, space)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: its configuration is damaged: {error}") from error
    load_weights(net, Path(folder) / GENERATOR_NAME)
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
    return SpatialBundle(net.to(device), vae, model, space, classes, info)


def _check_classes(folder: str | Path, model: SpatialModelConfig, classes: tuple[str, ...]) -> None:
    if len(classes) != model.num_classes:
        raise CheckpointError(
            f"{folder}: {len(classes)} names for the {model.num_classes} classes of its generator; "
            "they do not belong together"
        )
