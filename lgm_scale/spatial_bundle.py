"""Bundles of generators on a grid: ELIT and SiT."""

from __future__ import annotations

from lgm_scale.config import SpaceConfig, SpatialModelConfig
from lgm_scale.errors import ConfigError
from lgm_scale.models.elit import ELIT, SIT_SIZES, SPLITS, SiT

__all__ = ["build_spatial_generator"]


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
