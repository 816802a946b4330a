"""The release's generator checkpoint {model, model_ema} as a generator bundle."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lgm_scale.config.schema import GeneratorModelConfig
from lgm_scale.errors import CheckpointError, ConfigError, DataError
from lgm_scale.families.lgm.bundle import (
    TREE_NAME,
    build_generator,
    read_bundle,
    save_generator_bundle,
)
from lgm_scale.families.lgm.data import LatentStats
from lgm_scale.families.lgm.network import DIT_SIZES
from lgm_scale.families.lgm.release_cuts import read_tree
from lgm_scale.families.tokenizer.release import provenance, shape_of
from lgm_scale.merging.tree import MergeTree
from lgm_scale.release_import import CLASSES_HELP
from lgm_scale.release_import.names import KeyReport, fit, our_generator_name, translate
from lgm_scale.release_import.reading import entries, read_dictionary, weights_of

__all__ = [
    "IMPORTER",
    "GeneratorImporter",
    "class_names",
    "config_from_shapes",
    "import_generator",
    "read_stats",
]

_ENTRIES = {"ema": "model_ema", "model": "model"}


def import_generator(
    source: str | Path,
    folder: str | Path,
    tokenizer: str | Path,
    latent_stats: str | Path,
    merge_tree: str | Path | None = None,
    classes: str | None = None,
    noise_scale: str = "corrected",
    weights: str = "ema",
) -> tuple[KeyReport, list[str]]:
    """Write a generator bundle from the release's checkpoint.

    Args:
        source: The checkpoint.
        folder: Bundle to write.
        tokenizer: Bundle of the tokenizer that made the latents.
        latent_stats: File with their mean and std per channel.
        merge_tree: The release's merge dictionary; None: the tokenizer's own tree.
        classes: See `class_names`.
        noise_scale: How it was trained to see noise; the checkpoint does not say.
        weights: Which of its weights, 'ema' or 'model'.

    Returns: what became of every key, and remarks for the user.

    Raises: CheckpointError, ConfigError, DataError.
    """
    models = read_bundle(tokenizer, "tokenizer")["models"]["tokenizer"]
    own_tree = MergeTree.load(Path(tokenizer) / TREE_NAME)
    content = read_dictionary(source)
    state = weights_of(content, _ENTRIES[weights], source)
    config = config_from_shapes(state, own_tree.num_blocks, source)
    found = (config.num_base_tokens, config.latent_dim)
    if found != (own_tree.num_base_tokens, models.get("latent_dim")):
        raise CheckpointError(
            f"{source}: N = {found[0]}, D = {found[1]}; the tokenizer {tokenizer} has "
            f"N = {own_tree.num_base_tokens}, D = {models.get('latent_dim')}: they do not belong "
            "together"
        )
    report = translate(state, our_generator_name, {})
    with torch.device("meta"):
        expected = build_generator(config).state_dict()
    tensors = fit(state, report, expected, source)
    tree, about_tree = None, "merge tree: the tokenizer's"
    if merge_tree is not None:
        tree, about_tree = read_tree(merge_tree, own_tree)
    stats = read_stats(latent_stats, config.latent_dim)
    if tree is not None:
        stats = replace(stats, contrasts=None)  # they belong to another tree
    training: dict[str, Any] = {
        "weights": weights,
        "config": {"objective": {"noise_scale": noise_scale}},
        "imported": provenance(source, report),
    }
    if isinstance(content.get("epoch"), int):
        training["imported"]["epoch"] = content["epoch"]
    names = class_names(classes, config.num_classes)
    save_generator_bundle(folder, config, tensors, stats, names, tokenizer, training, tree)
    about_noise = f"noise scale: {noise_scale} (--noise-scale); the checkpoint does not say"
    return report, [f"model: {config}", about_tree, about_noise]


def config_from_shapes(
    state: Mapping[str, Tensor], num_blocks: int, path: str | Path
) -> GeneratorModelConfig:
    """The model that these weights belong to. Raises: CheckpointError naming key and shapes."""
    _, num_base_tokens, width = shape_of(state, "pos_embed", (1, None, None), path)
    latent_dim = shape_of(state, "x_embedder.weight", (width, None), path)[1]
    rows = shape_of(state, "y_embedder.embedding_table.weight", (None, width), path)[0]
    head = shape_of(state, "transformer.blocks.0.attn.q_norm.weight", (None,), path)[0]
    blocks = [re.match(r"transformer\.blocks\.(\d+)\.", name) for name in state]
    depth = len({match.group(1) for match in blocks if match})
    if rows < 2:
        raise CheckpointError(f"{path}: key y_embedder: {rows} rows, expected classes + 1")
    for name, row in DIT_SIZES.items():
        if (row.width, row.depth, row.num_heads * head) == (width, depth, width):
            return GeneratorModelConfig(
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


def class_names(source: str | None, num_classes: int) -> tuple[str, ...]:
    """Names of the classes, in the order of their indices.

    Args:
        source: A text file with one name per line; 'imagenet': the 1000 names that torchvision
            ships; None: the indices.
        num_classes: How many there must be.

    Raises: ConfigError.
    """
    if source is None:
        return tuple(str(index) for index in range(num_classes))
    if source == "imagenet":
        from torchvision.models import ResNet50_Weights

        names = list(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
    elif Path(source).is_file():
        try:
            lines = Path(source).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ConfigError(f"--classes: {source} is no text file ({error})") from error
        names = [line.strip() for line in lines if line.strip()]
    else:
        raise ConfigError(f"--classes: {source} is neither a text file nor 'imagenet'")
    if len(names) != num_classes:
        raise ConfigError(
            f"--classes: {source} has {len(names)} names, the generator {num_classes} classes"
        )
    return tuple(names)


class GeneratorImporter:
    """The importer behind `python -m lgm_scale.release_import generator`."""

    help: ClassVar[str] = "a checkpoint {model, model_ema}"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add what the checkpoint does not say: tokenizer, statistics, merge tree, noise scale."""
        add = parser.add_argument
        tokenizer_help = "of the tokenizer that made the latents"
        add("--tokenizer", required=True, metavar="BUNDLE", help=tokenizer_help)
        add(
            "--latent-stats", metavar="FILE",
            help="mean and std of the latents it was trained on: the release's latents_stats.pt, "
            "or latent_stats.safetensors of a folder of latents encoded here",
        )  # fmt: skip
        add(
            "--merge-tree", metavar="FILE",
            help="the release's merge dictionary; default: the tokenizer's own tree",
        )  # fmt: skip
        add("--classes", metavar="FILE", help=CLASSES_HELP)
        add(
            "--noise-scale", choices=["corrected", "legacy"], default="corrected",
            help="how it was trained to see noise; the checkpoint does not say",
        )  # fmt: skip

    @staticmethod
    def run(args: argparse.Namespace) -> tuple[KeyReport, list[str]]:
        """Write the bundle that the command line asks for."""
        if args.latent_stats is None:
            raise ConfigError(
                "--latent-stats: missing; images cannot be decoded without the mean and std that "
                "the generator's latents were standardised with. Give the release's "
                "latents_stats.pt, or encode images with this tokenizer (data_tools/"
                "encode_latents.py) and give latent_stats.safetensors of that folder"
            )
        return import_generator(
            args.source, args.folder, args.tokenizer, args.latent_stats, args.merge_tree,
            args.classes, args.noise_scale, args.weights,
        )  # fmt: skip


IMPORTER = GeneratorImporter
