"""Rules of a run that trains a generator on a grid: ELIT or SiT. Free of torch.

Each rule yields lines `key: value; rule; fix`, as in `lgm_scale.config.rules`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lgm_scale.config.schema import SpaceConfig, SpatialModelConfig, SpatialRun

__all__ = ["length_rules", "spatial_rules", "token_lengths"]

_SPLITS = {
    "released": ("s", "b", "l", "xl"),
    "declared": ("tiny", "s", "b", "l", "xl"),
    "paper": ("b", "xl"),
}
"""Sizes that each split is known for: those of `models.elit.SPLITS`."""


def token_lengths(model: SpatialModelConfig, space: SpaceConfig) -> tuple[int, ...]:
    """Every K that a network runs at: k latents in each of its windows; N without them."""
    grid = space.side // model.patch_size
    if model.interface is None:
        return (grid**2,)
    group_size = model.interface.group_size
    return tuple(k * (grid // group_size) ** 2 for k in range(1, group_size**2 + 1))


def spatial_rules(config: SpatialRun) -> Iterator[str]:
    """Every rule between model, space and lengths that the configuration breaks."""
    model, space = config.model, config.space
    if model.num_classes < 1:
        yield f"model.num_classes: {model.num_classes} must be 1 or more"
    problems = [*_space(config), *_grid(config)]
    yield from problems
    if not problems:
        known = token_lengths(model, space)
        yield from length_rules(config.lengths.choices, known, "lengths.choices")
    if space.kind == "sd_vae" and space.vae is None:
        yield (
            "space.vae: missing; name the folder of the autoencoder that made the latents, as "
            "diffusers keeps it. It is copied into the result, and nothing is downloaded"
        )
    if space.kind == "pixels" and space.vae is not None:
        yield "space.vae: has no effect with space.kind: pixels; remove it"


def _space(config: SpatialRun) -> Iterator[str]:
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


def _grid(config: SpatialRun) -> Iterator[str]:
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
    if config.model.size not in _SPLITS[interface.split]:
        yield (
            f"model.interface.split: {interface.split} knows no size {config.model.size}; it has "
            f"{', '.join(_SPLITS[interface.split])}"
        )


def length_rules(chosen: Iterable[int], known: Sequence[int], key: str) -> Iterator[str]:
    """The problem of K that a generator on a grid does not have.

    Args:
        chosen: K that are asked for.
        known: K that there are, rising; see `token_lengths`.
        key: What asks for them.
    """
    strange = sorted(set(chosen) - set(known))
    if strange and len(known) == 1:
        yield f"{key}: {strange}; without an interface the network runs at {known[0]} tokens alone"
    elif strange:
        yield (
            f"{key}: {strange} are no budgets; K is k latents in each of {known[0]} windows, k "
            f"from 1 to {len(known)}: {known[0]}, {known[1]}, ..., {known[-1]}"
        )
