"""Configuration of a run that trains an ELIT or its host SiT, and its rules. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lgm_scale.config.schema import STRICT, FlowObjectiveConfig, GeneratorRun
from lgm_scale.data.manifest import Manifest
from lgm_scale.errors import CheckpointError, DataError
from lgm_scale.families.base import UNSIZED
from lgm_scale.published import COMMAND, PUBLISHED

CONFIG_NAME = PUBLISHED["sd_vae_config"].name
WEIGHTS_NAME = PUBLISHED["sd_vae_weights"].name
GET_VAE = (
    f"`{COMMAND} --fetch sd_vae_config sd_vae_weights` gets {CONFIG_NAME} and {WEIGHTS_NAME} "
    f"({PUBLISHED['sd_vae_weights'].size}) of stabilityai/sd-vae-ft-mse into "
    f"{Path(PUBLISHED['sd_vae_config'].path).parent}; stabilityai/sd-vae-ft-ema will do as well. "
    "Give that folder: nothing is downloaded unless you ask"
)
"""What to do where the autoencoder is missing."""

ENCODED_SIZE = 256
"""Pixels along a side of the images that are encoded to latents, unless another is asked for."""


@dataclass(frozen=True)
class SiTSize:
    """Width, blocks and heads; millions of parameters at 256 px, patch 2, with the fixed table."""

    width: int
    depth: int
    num_heads: int
    params_m: float
    elit_params_m: float


SIT_SIZES = {
    #               width depth heads SiT ELIT (published; tiny is ours)
    "tiny": SiTSize(128, 6, 4, 2.03, 2.87),
    "s": SiTSize(384, 12, 6, 32.96, 37.36),
    "b": SiTSize(768, 12, 12, 130.50, 144.90),
    "l": SiTSize(1024, 24, 16, 458.09, 482.27),
    "xl": SiTSize(1152, 28, 16, 675.11, 705.12),
}

SPLITS: dict[str, dict[str, tuple[int, int, int]]] = {
    "released": {"s": (8, 2, 2), "b": (8, 2, 2), "l": (8, 12, 4), "xl": (8, 16, 4)},
    "declared": {
        "tiny": (1, 4, 1),
        "s": (2, 8, 2),
        "b": (2, 8, 2),
        "l": (4, 16, 4),
        "xl": (4, 20, 4),
    },
    "paper": {"b": (3, 6, 3), "xl": (4, 20, 4)},
}
"""Blocks before Read, in the core, after Write.

released: what the released code runs, and with it every released checkpoint: it puts Read where an
argument of another method says. declared: what its own arguments say. paper: what the paper says.
"""


@dataclass(frozen=True, kw_only=True)
class InterfaceConfig:
    """ELIT's latent interface; see `network.ELIT`."""

    __pydantic_config__ = STRICT
    split: Literal["released", "declared", "paper"]
    """Blocks before Read, in the core and after Write, by size: `SPLITS`."""
    group_size: int = 4
    """Side of a window in tokens. Published: 4 at 256 px, 8 at 512 px, which is 16 windows."""
    drop_mode: Literal["skip_core", "remove"] = "skip_core"
    """Whether latents that the core does not see still reach Write, as released, or do not."""
    position_rows: int = 4096
    """Rows of the latents' position table: the released number, of which N are ever read."""


@dataclass(frozen=True, kw_only=True)
class ELITModelConfig:
    """A generator on a grid: `network.ELIT`, or without `interface` its host `SiT`."""

    __pydantic_config__ = STRICT
    size: Literal["tiny", "s", "b", "l", "xl"] = "b"
    """Width, blocks and heads."""
    patch_size: int = 2
    """Side of a token, in places of the state."""
    num_classes: int = 1000
    """Classes of the data."""
    end_time: bool = False
    """Give the average velocity up to a time that is passed besides; for objective.mean_flow."""
    interface: InterfaceConfig | None = None
    """null: SiT, without an interface."""


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """What a generator on a grid generates."""

    __pydantic_config__ = STRICT
    kind: Literal["sd_vae", "pixels"]
    """`sd_vae`: four channels at an eighth of the side, from data_tools/encode_latents.py
    --encoder sd-vae. `pixels`: the images themselves, from data_tools/images_to_mds.py."""
    image_size: int = 256
    """Pixels along a side of the images."""
    vae: str | None = None
    """Folder of the autoencoder that decodes; for `sd_vae`. Its encoder made the latents."""
    flip: bool = False
    """Mirror half of the images; the published recipes do not."""

    @property
    def channels(self) -> int:
        """Channels of the state."""
        return 4 if self.kind == "sd_vae" else 3

    @property
    def downsampling(self) -> int:
        """Pixels per place of the state, along a side."""
        return 8 if self.kind == "sd_vae" else 1

    @property
    def side(self) -> int:
        """Side of the state, in its own pixels."""
        return self.image_size // self.downsampling


@dataclass(frozen=True, kw_only=True)
class ELITRun(GeneratorRun):
    """Train a generator on a grid of latents or pixels: ELIT or SiT."""

    __pydantic_config__ = STRICT
    task: Literal["spatial_generator"]
    model: ELITModelConfig
    space: SpaceConfig
    objective: FlowObjectiveConfig = field(default_factory=FlowObjectiveConfig)


def token_lengths(model: ELITModelConfig, space: SpaceConfig) -> tuple[int, ...]:
    """Every K that a network runs at: k latents in each of its windows; N without them."""
    grid = space.side // model.patch_size
    if model.interface is None:
        return (grid**2,)
    group_size = model.interface.group_size
    return tuple(k * (grid // group_size) ** 2 for k in range(1, group_size**2 + 1))


def elit_rules(config: ELITRun) -> Iterator[str]:
    """Every rule between model, space and lengths that the configuration breaks."""
    model, space = config.model, config.space
    if model.num_classes < 1:
        yield f"model.num_classes: {model.num_classes} must be 1 or more"
    problems = [*_space(config), *_grid(config)]
    yield from problems
    if not problems:
        known = token_lengths(model, space)
        yield from length_rules(config.lengths.choices, known, "lengths.choices")
    why = (
        "is for generators of merged tokens; the first and last blocks of this one see all tokens "
        "at every length"
    )
    if config.train.attention != "auto":
        yield UNSIZED.format(config.train.attention)
    if config.train.batch_scaling == "constant_tokens":
        yield f"train.batch_scaling: constant_tokens {why}"
    if config.train.device_microbatch_tokens is not None:
        yield f"train.device_microbatch_tokens: {config.train.device_microbatch_tokens} {why}"
    if space.kind == "sd_vae" and space.vae is None:
        yield (
            "space.vae: missing; name the folder of the autoencoder that made the latents, as "
            "diffusers keeps it. It is copied into the result, and nothing is downloaded"
        )
    if space.kind == "pixels" and space.vae is not None:
        yield "space.vae: has no effect with space.kind: pixels; remove it"


def _space(config: ELITRun) -> Iterator[str]:
    space, model = config.space, config.model
    if space.image_size < 1 or space.image_size % space.downsampling != 0:
        yield (
            f"space.image_size: {space.image_size} is not divisible by {space.downsampling}, by "
            "which the space makes images smaller"
        )
    elif model.patch_size < 1 or space.side % model.patch_size != 0:
        valid = [p for p in range(1, space.side + 1) if space.side % p == 0]
        yield (
            f"model.patch_size: {model.patch_size} does not divide the state's side "
            f"{space.side}; valid: {', '.join(map(str, valid))}"
        )


def _grid(config: ELITRun) -> Iterator[str]:
    interface, patch = config.model.interface, config.model.patch_size
    if interface is None or patch < 1:
        return
    grid = config.space.side // patch
    if interface.group_size < 1 or grid % interface.group_size != 0:
        valid = [g for g in range(1, grid + 1) if grid % g == 0]
        yield (
            f"model.interface.group_size: windows of {interface.group_size} x "
            f"{interface.group_size} tokens do not divide the grid of {grid} x {grid}; valid: "
            f"{', '.join(map(str, valid))}"
        )
    if interface.position_rows < grid**2:
        yield (
            f"model.interface.position_rows: {interface.position_rows} rows for {grid**2} "
            "latents; needs one each"
        )
    if config.model.size not in SPLITS[interface.split]:
        yield (
            f"model.interface.split: {interface.split} knows no size {config.model.size}; it has "
            f"{', '.join(SPLITS[interface.split])}"
        )


def length_rules(chosen: Iterable[int], known: Sequence[int], key: str) -> Iterator[str]:
    """The problem of K that a generator on a grid does not have.

    `known` are the K that there are, rising; `key` says what asks for the chosen ones.
    """
    strange = sorted(set(chosen) - set(known))
    if strange and len(known) == 1:
        yield f"{key}: {strange}; without an interface the network runs at {known[0]} tokens alone"
    elif strange:
        yield (
            f"{key}: {strange} are no budgets; K is k latents in each of {known[0]} windows, k "
            f"from 1 to {len(known)}: {known[0]}, {known[1]}, ..., {known[-1]}"
        )


def check_grids(
    where: str, manifest: Manifest, channels: int, side: int, encoder_id: str | None
) -> None:
    """Check a folder of grids against the model and the autoencoder that will use it.

    Args:
        where: Its name, for messages.
        manifest: Its manifest.
        channels: Channels of the model's input.
        side: Latents along a side of the model's input.
        encoder_id: Hash of the encoder's weights; None leaves the check out.

    Raises: DataError if it has other shapes or another encoder.
    """
    found = (manifest.extra.get("channels"), manifest.extra.get("side"))
    if found != (channels, side):
        raise DataError(
            f"{where} holds latents of {found[0]} channels x {found[1]} x {found[1]}, of images of "
            f"{manifest.image_size} pixels; the model wants {channels} x {side} x {side}. Give the "
            "model the channels and the image size of the latents, or encode with another "
            "--image-size or --vae"
        )
    made_by = manifest.extra.get("encoder_id")
    if encoder_id is not None and made_by != encoder_id:
        raise DataError(
            f"{where} was encoded by encoder {str(made_by)[:12]}, but that of the configured "
            f"autoencoder is {encoder_id[:12]}: its decoder does not know these latents. Encode "
            "again with this autoencoder, or configure the one that was used (another decoder to "
            "the same encoder will do)"
        )


def vae_file(folder: str | Path, name: str) -> Path:
    """A file of an autoencoder's folder. Raises: CheckpointError with what is there instead."""
    folder = Path(folder)
    if (folder / name).is_file():
        return folder / name
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}: the folder of an autoencoder is needed. {GET_VAE}")
    names = sorted(child.name for child in folder.iterdir())
    listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    hint = ""
    if (folder / "vae" / name).is_file():
        hint = f" Did you mean {folder / 'vae'}?"
    elif name == WEIGHTS_NAME and any(other.endswith((".bin", ".ckpt", ".pt")) for other in names):
        hint = " A pickle is never read: it could run anything."
    raise CheckpointError(f"{folder} has no {name}, but: {listed or 'nothing'}.{hint} {GET_VAE}")
