"""What bundle.json says about a generator, by family: lengths, images, what belongs together.

Free of torch: rules of a sweep are heard before a network is built. What a built generator can do,
its pipeline says (`lgm_scale.pipeline`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lgm_scale.bundle import check_kind, model_config, read_info
from lgm_scale.config.schema import SpaceConfig, SpatialModelConfig
from lgm_scale.errors import CheckpointError
from lgm_scale.evaluation.sweep.config import Cell
from lgm_scale.families.elit.rules import length_rules, token_lengths

__all__ = ["Family", "family_of", "outside_lengths", "read_generator_info", "sampler_defaults"]


class Family(ABC):
    """A generator as its bundle describes it.

    Args:
        info: Contents of bundle.json.
        folder: Of the bundle, for messages.

    Raises: CheckpointError, KeyError, TypeError for damaged descriptions.
    """

    sampler: ClassVar[dict[str, Any]] = {}
    """Defaults of a sweep's sampler that differ from those in `config`."""
    image_size: int
    """S, pixels along a side."""
    num_classes: int

    def __init__(self, info: dict[str, Any], folder: str) -> None:
        self.folder, self.classes = folder, list(info["classes"])

    def problems(self, cells: Sequence[Cell]) -> Iterator[str]:
        """Everything that does not fit: the cells, and the bundle in itself."""
        yield from self.outside(cells)
        yield from self.strangers()
        if len(self.classes) != self.num_classes:
            yield (
                f"bundle: {self.folder} names {len(self.classes)} classes and its generator has "
                f"{self.num_classes}; export the bundle again"
            )

    @abstractmethod
    def outside(self, cells: Sequence[Cell]) -> Iterator[str]:
        """Lengths that the generator does not have."""

    def strangers(self) -> Iterator[str]:
        """Parts of the bundle that cannot have been trained together."""
        yield from ()


class MergedFamily(Family):
    """LGM: a tokenizer with its merge tree, and a transformer on merged tokens."""

    def __init__(self, info: dict[str, Any], folder: str) -> None:
        super().__init__(info, folder)
        self.tokenizer, self.generator = info["models"]["tokenizer"], info["models"]["generator"]
        self.image_size = self.tokenizer["image_size"]
        self.num_classes = self.generator["num_classes"]

    def outside(self, cells: Sequence[Cell]) -> Iterator[str]:
        """K that the tokenizer's merge tree does not have."""
        lengths = sorted({cell.num_tokens for cell in cells})
        low, high = self.tokenizer["num_codebooks"], self.tokenizer["num_base_tokens"]
        yield from (f"cells: {text}" for text in outside_lengths(lengths, low, high))

    def strangers(self) -> Iterator[str]:
        """Sizes in which tokenizer and generator differ."""
        pairs = {
            "latent_dim": "latent_dim",
            "num_base_tokens": "num_base_tokens",
            "num_codebooks": "num_blocks",
        }
        for ours, theirs in pairs.items():
            if self.tokenizer[ours] != self.generator[theirs]:
                yield (
                    f"bundle: {self.folder} has a tokenizer with {ours} {self.tokenizer[ours]} and "
                    f"a generator with {theirs} {self.generator[theirs]}: they do not belong "
                    "together; export the bundle again"
                )


class SpatialFamily(Family):
    """ELIT and SiT: a state on a grid, and a core that runs at some budgets."""

    sampler: ClassVar[dict[str, Any]] = {
        "cfg_interval": [0.0, 1.0],
        "cfg_rescale": "none",
        "num_steps": 51,
        "timestep_shift": 1.0,
    }

    def __init__(self, info: dict[str, Any], folder: str) -> None:
        super().__init__(info, folder)
        model: SpatialModelConfig = model_config(info, "generator", SpatialModelConfig, folder)
        space: SpaceConfig = model_config(info, "space", SpaceConfig, folder)
        self.image_size, self.num_classes = space.image_size, model.num_classes
        self.token_lengths = token_lengths(model, space)

    def outside(self, cells: Sequence[Cell]) -> Iterator[str]:
        """K of strong or weak branch, or of any step, that is no budget."""
        wanted = {length for cell in cells for length in cell.lengths}
        yield from length_rules(wanted, self.token_lengths, "cells")


_FAMILIES: dict[str, type[Family]] = {
    "generator": MergedFamily,
    "spatial_generator": SpatialFamily,
}


def read_generator_info(folder: str | Path) -> dict[str, Any]:
    """bundle.json without its weights; those are checked when they are loaded.

    Raises: CheckpointError if it is no generator bundle.
    """
    info = read_info(folder)
    check_kind(info, folder, *_FAMILIES)
    return info


def family_of(info: dict[str, Any], folder: str) -> Family:
    """The generator that bundle.json describes. Raises: as `Family`."""
    return _FAMILIES[info["kind"]](info, folder)


def sampler_defaults(bundle: Any) -> dict[str, Any]:
    """Of the bundle's family; nothing where it cannot be read, which the rules will tell."""
    try:
        return _FAMILIES[read_generator_info(bundle)["kind"]].sampler
    except (CheckpointError, TypeError):
        return {}


def outside_lengths(lengths: Sequence[int], low: int, high: int) -> Iterator[str]:
    """The problem of K that a merge tree of `high` tokens and `low` blocks does not have."""
    outside = [k for k in lengths if not low <= k <= high]
    if outside:
        yield (
            f"lengths {outside} outside [{low}, {high}], the range of this bundle's merge tree "
            f"({low} blocks that never merge, {high} base tokens)"
        )
