"""The release's generator checkpoint {model, model_ema} as a generator bundle."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lgm_scale.bundle import read_bundle
from lgm_scale.errors import CheckpointError, DataError
from lgm_scale.families.lgm.bundle import save_lgm_bundle
from lgm_scale.families.lgm.config import DIT_SIZES, LGMModelConfig
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.lora import Adapter
from lgm_scale.families.lgm.network import build_merge_dit
from lgm_scale.families.lgm.release_tree import read_tree
from lgm_scale.families.tokenizer.release import about_ties
from lgm_scale.merging.tree import TREE_NAME, MergeTree
from lgm_scale.release_import.names import (
    KeyReport,
    Renaming,
    class_names,
    fit,
    provenance,
    translate,
)
from lgm_scale.release_import.reading import (
    Weights,
    entries,
    read_dictionary,
    shape_of,
    weights_of,
)
from lgm_scale.weights import Unfilled

ENTRIES = {"ema": "model_ema", "model": "model"}
our_generator_name = Renaming(
    {
        "transformer.blocks.": "blocks.",
        "x_embedder": "x_embed",
        "t_embedder": "t_embed",
        "y_embedder.embedding_table": "label_embed.table",
        "adaLN_modulation": "modulation",
        "final_layer": "final",
    }
)
"""Our name of a weight of the diffusion transformer, given the release's."""


@dataclass(frozen=True)
class Surroundings:
    """What the bundle of a generator needs, and its checkpoint does not hold.

    Args:
        tokenizer: Bundle of the tokenizer that made the latents.
        latent_stats: File with their mean and std per channel.
        merge_tree: The release's merge dictionary; None: the tokenizer's own tree.
        classes: Where the classes' names are from: a text file, 'imagenet', or None for indices.
        noise_scale: How it was trained to see noise; the checkpoint does not say.
    """

    tokenizer: str | Path
    latent_stats: str | Path
    merge_tree: str | Path | None = None
    classes: str | None = None
    noise_scale: str = "corrected"

    @property
    def own_tree(self) -> MergeTree:
        """The tokenizer's merge tree."""
        return MergeTree.load(Path(self.tokenizer) / TREE_NAME)

    def config(self, state: Mapping[str, Tensor], source: str | Path) -> LGMModelConfig:
        """The model of these weights, under the release's names. Raises: CheckpointError."""
        models = read_bundle(self.tokenizer, "tokenizer")["models"]["tokenizer"]
        tree = self.own_tree
        config = config_from_shapes(state, tree.num_blocks, source)
        found = (config.num_base_tokens, config.latent_dim)
        if found != (tree.num_base_tokens, models.get("latent_dim")):
            raise CheckpointError(
                f"{source}: N = {found[0]}, D = {found[1]}; the tokenizer {self.tokenizer} has "
                f"N = {tree.num_base_tokens}, D = {models.get('latent_dim')}: they do not belong "
                "together"
            )
        return config

    def save(
        self,
        folder: str | Path,
        config: LGMModelConfig,
        weights: dict[str, Tensor],
        training: dict[str, Any],
        adapters: Mapping[int, Adapter] = MappingProxyType({}),
    ) -> list[str]:
        """Write the bundle; return remarks. Raises: CheckpointError, ConfigError, DataError."""
        own = self.own_tree
        tree, remarks = None, ["merge tree: the tokenizer's", about_ties(own)]
        if self.merge_tree is not None:
            tree, about_tree = read_tree(self.merge_tree, own)
            remarks = [about_tree]
        stats = read_stats(self.latent_stats, config.latent_dim)
        if tree is not None:
            stats = replace(stats, contrasts=None)  # they belong to another tree
        for num_tokens in adapters:
            (tree or own).assignment(num_tokens)
        training = training | {"config": {"objective": {"noise_scale": self.noise_scale}}}
        names = class_names(self.classes, config.num_classes)
        save_lgm_bundle(
            folder, config, weights, stats, names, self.tokenizer, training, tree, adapters
        )
        noise = f"noise scale: {self.noise_scale} (--noise-scale); the checkpoint does not say"
        return [*remarks, noise]


def import_generator(
    source: str | Path,
    folder: str | Path,
    around: Surroundings,
    weights: str | None = None,
) -> tuple[KeyReport, list[str]]:
    """Write a generator bundle from the release's checkpoint.

    Args:
        source: The checkpoint.
        folder: Bundle to write.
        around: What the checkpoint does not hold.
        weights: Which of its weights, 'ema' or 'model'; None: the average, if there is one.

    Returns: what became of every key, and remarks for the user.

    Raises: CheckpointError, ConfigError, DataError.
    """
    content = read_dictionary(source)
    found = weights_of(content, ENTRIES, weights, source)
    if any(".lora_A." in name for name in found.state):
        raise CheckpointError(
            f"{source} holds a LoRA: import it with `python -m lgm_scale.release_import lora`"
        )
    config = around.config(found.state, source)
    report = translate(found.state, our_generator_name, {})
    with torch.device("meta"), Unfilled():
        expected = build_merge_dit(config).state_dict()
    tensors = fit(found.state, report, expected, source)
    training = training_of(content, found, source, report)
    remarks = around.save(folder, config, tensors, training)
    return report, [found.remark, f"model: {config}", *remarks]


def training_of(
    content: Mapping[Any, Any], found: Weights, source: str | Path, report: KeyReport
) -> dict[str, Any]:
    """What the bundle says about where its weights are from."""
    imported = provenance(source, report)
    if isinstance(content.get("epoch"), int):
        imported["epoch"] = content["epoch"]
    return {"weights": found.kind, "imported": imported}


def config_from_shapes(
    state: Mapping[str, Tensor], num_blocks: int, path: str | Path
) -> LGMModelConfig:
    """The model that these weights belong to. Raises: CheckpointError naming key and shapes."""
    _, num_base_tokens, width = shape_of(state, "pos_embed", (1, None, None), path)
    latent_dim = shape_of(state, "x_embedder.weight", (width, None), path)[1]
    rows = shape_of(state, "y_embedder.embedding_table.weight", (None, width), path)[0]
    head = shape_of(state, "transformer.blocks.0.attn.q_norm.weight", (None,), path)[0]
    blocks = [re.match(r"transformer\.blocks\.(\d+)\.", name) for name in state]
    depth = len({match.group(1) for match in blocks if match})
    if rows < 2:
        raise CheckpointError(f"{path}: key y_embedder: {rows} rows, expected classes + 1")
    # Of fused qkv only the width is seen; the per-head norm tells the width of a head.
    for name, row in DIT_SIZES.items():
        if (row.width, row.depth, row.num_heads * head) == (width, depth, width):
            return LGMModelConfig(
                size=name,  # type: ignore[arg-type]  # a key of DIT_SIZES
                latent_dim=latent_dim,
                num_base_tokens=num_base_tokens,
                num_blocks=num_blocks,
                num_classes=rows - 1,
            )
    known = ", ".join(
        f"{name}: {row.width} x {row.depth} x {row.num_heads}" for name, row in DIT_SIZES.items()
    )
    raise CheckpointError(
        f"{path}: width {width}, {depth} blocks, heads of {head} channels; known sizes (width x "
        f"blocks x heads): {known}"
    )


def read_stats(path: str | Path, latent_dim: int) -> LatentStats:
    """Mean and std per channel, from tensors of shape [1, 1, D] or [D].

    Raises: DataError if they are missing, of another shape, not finite, or std is not positive.
    """
    content = read_dictionary(path)
    found = {}
    for name in ("mean", "std"):
        value = content.get(name)
        if not isinstance(value, Tensor):
            raise DataError(f"{path}: no tensor {name!r}; it holds {entries(content)}")
        if tuple(value.shape) not in ((latent_dim,), (1, 1, latent_dim)):
            raise DataError(
                f"{path}: {name} of shape {list(value.shape)}, expected [1, 1, {latent_dim}] or "
                f"[{latent_dim}]"
            )
        found[name] = value.detach().reshape(-1).float()
    if not all(bool(torch.isfinite(value).all()) for value in found.values()):
        raise DataError(f"{path}: mean or std is not finite")
    if bool((found["std"] <= 0).any()):
        raise DataError(f"{path}: std must be positive in every channel")
    if "contrast_mean" in content:  # a file of ours
        return replace(LatentStats.load(path), **found)
    return LatentStats(found["mean"], found["std"])


def surroundings(args: argparse.Namespace) -> Surroundings:
    """What the command line says."""
    return Surroundings(
        args.tokenizer, args.latent_stats, args.merge_tree, args.classes, args.noise_scale
    )


def run_import(args: argparse.Namespace) -> tuple[KeyReport, list[str]]:
    """Do what `python -m lgm_scale.release_import generator` asks for."""
    return import_generator(args.source, args.folder, surroundings(args), args.weights)
