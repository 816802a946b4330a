"""The release's generator checkpoint {model, model_ema} as a generator bundle.

Its merge dictionary becomes a tree: for each K it has an averaging matrix [N, K] and cluster
sizes [K].
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgm_scale.bundle import read_bundle
from lgm_scale.errors import CheckpointError, ConfigError, DataError
from lgm_scale.families.lgm.bundle import save_lgm_bundle
from lgm_scale.families.lgm.config import DIT_SIZES, LGMModelConfig
from lgm_scale.families.lgm.data import LatentStats
from lgm_scale.families.lgm.network import build_merge_dit
from lgm_scale.merging.nesting import tree_from_cuts
from lgm_scale.merging.tree import TREE_NAME, MergeAssignment, MergeTree
from lgm_scale.release_import.names import KeyReport, class_names, fit, provenance, translate
from lgm_scale.release_import.reading import entries, read_dictionary, shape_of, weights_of

__all__ = [
    "config_from_shapes",
    "import_generator",
    "our_generator_name",
    "read_cuts",
    "read_stats",
    "read_tree",
    "run_import",
]

_ENTRIES = {"ema": "model_ema", "model": "model"}
_PARTS = {
    "transformer.": "",
    "x_embedder": "x_embed",
    "t_embedder": "t_embed",
    "y_embedder.embedding_table": "label_embed.table",
    "adaLN_modulation": "modulation",
    "final_layer": "final",
}


def our_generator_name(name: str) -> str:
    """Our name of a weight of the diffusion transformer, given the release's."""
    for theirs, ours in _PARTS.items():
        name = name.replace(theirs, ours)
    return name


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
        classes: Where the classes' names are from: a text file, 'imagenet', or None for indices.
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
        expected = build_merge_dit(config).state_dict()
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
    save_lgm_bundle(folder, config, tensors, stats, names, tokenizer, training, tree)
    about_noise = f"noise scale: {noise_scale} (--noise-scale); the checkpoint does not say"
    return report, [f"model: {config}", about_tree, about_noise]


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


def read_tree(path: str | Path, own: MergeTree) -> tuple[MergeTree | None, str]:
    """The tree of a merge dictionary, or of a merge_tree.safetensors.

    Args:
        path: The file.
        own: The tokenizer's merge tree. Where every given cut is one of its own it is kept, for it
            knows more: heights, and the lengths between.

    Returns: the tree (None: keep the tokenizer's), and a remark for the user.

    Raises: CheckpointError if the file cannot be read, its cuts are not nested, cross the blocks or
    have another number of base tokens.
    """
    if str(path).endswith(".safetensors"):
        tree = MergeTree.load(path)
        if (tree.num_base_tokens, tree.num_blocks) != (own.num_base_tokens, own.num_blocks):
            raise CheckpointError(
                f"{path}: a merge tree of {tree.num_base_tokens} tokens in {tree.num_blocks} "
                f"blocks; the tokenizer has {own.num_base_tokens} in {own.num_blocks}"
            )
        return tree, f"merge tree: {path}"
    cuts = read_cuts(path)
    lengths = ", ".join(str(cut.num_tokens) for cut in cuts)
    if cuts[0].num_base_tokens != own.num_base_tokens:
        raise CheckpointError(
            f"{path}: cuts of {cuts[0].num_base_tokens} base tokens; the tokenizer has "
            f"{own.num_base_tokens}"
        )
    try:
        tree = tree_from_cuts(cuts, own.num_blocks)
        same = [torch.equal(own.assignment(k.num_tokens).labels, k.labels) for k in cuts]
    except ConfigError as error:
        raise CheckpointError(f"{path}: {'; '.join(error.problems)}") from error
    if all(same):
        return (
            None,
            f"merge tree: the tokenizer's own, which has every cut of {path} (K = {lengths})",
        )
    return tree, (
        f"merge tree: from the cuts K = {lengths} of {path}. Their heights are unknown: ascending "
        "ranks stand in, and lengths between the given ones are filled in, smallest parts first. "
        f"The tokenizer's own tree differs at {same.count(False)} of {len(same)} lengths"
    )


def read_cuts(path: str | Path) -> list[MergeAssignment]:
    """All cuts of a merge dictionary, by K.

    Keys are K, as numbers or text; a value is one or more tensors, in a tuple, list or dictionary:
    an averaging (or membership) matrix [N, K] or labels [N], and optionally the sizes [K].

    Raises: CheckpointError naming the K that makes no sense.
    """
    cuts: dict[int, MergeAssignment] = {}
    for key, value in read_dictionary(path).items():
        digits = re.fullmatch(r"\D*(\d+)\D*", str(key)) if isinstance(key, (int, str)) else None
        if digits is None:
            raise CheckpointError(f"{path}: key {key!r} is no token length K")
        num_tokens = int(digits.group(1))
        where = f"{path}: K = {num_tokens}"
        if num_tokens in cuts:
            raise CheckpointError(f"{where}: given twice")
        cuts[num_tokens] = _cut(num_tokens, list(_tensors(value)), where)
    if len({cut.num_base_tokens for cut in cuts.values()}) != 1:
        raise CheckpointError(f"{path}: it needs one or more cuts, all of the same base tokens")
    return [cuts[num_tokens] for num_tokens in sorted(cuts)]


def _tensors(value: object) -> Iterable[Tensor]:
    """All tensors of a value, however deep it is nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _cut(num_tokens: int, tensors: list[Tensor], where: str) -> MergeAssignment:
    """One cut, from whichever of its tensors says which token belongs where."""
    tensors = [tensor.squeeze(0) if tensor.ndim == 3 else tensor for tensor in tensors]
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors) or "none"
    matrices = [tensor for tensor in tensors if tensor.ndim == 2]
    vectors = [tensor for tensor in tensors if tensor.ndim == 1]
    if matrices:
        labels = _labels(matrices[0], num_tokens, where)
    elif vectors and not max(vectors, key=len).is_floating_point():
        labels = max(vectors, key=len)
        vectors = [tensor for tensor in vectors if tensor is not labels]
    else:
        raise CheckpointError(
            f"{where}: tensors of shapes {shapes}; needed: an averaging matrix [N, {num_tokens}]"
        )
    cut = MergeAssignment.from_labels(labels.to(torch.int64))
    if cut.num_tokens != num_tokens:
        raise CheckpointError(f"{where}: it has {cut.num_tokens} clusters that are not empty")
    counts = torch.unique(labels, return_counts=True)[1].double()  # in the file's order
    for sizes in vectors:
        if sizes.shape == counts.shape and not torch.equal(sizes.double(), counts):
            raise CheckpointError(f"{where}: its sizes are not those of its clusters")
    return cut


def _labels(matrix: Tensor, num_tokens: int, where: str) -> Tensor:
    """Cluster of each token, from a matrix with one entry per row. Shapes: [N, K] -> [N]."""
    if matrix.shape[1] != num_tokens:
        raise CheckpointError(
            f"{where}: a matrix of shape {list(matrix.shape)}, expected [N, {num_tokens}]"
        )
    member = matrix.double() > 0  # [N, K]
    if not torch.equal(member.sum(1), torch.ones(len(matrix), dtype=torch.int64)):
        raise CheckpointError(f"{where}: its matrix does not put each token into one cluster")
    # What it may be: P itself (columns sum to 1), or A (zeros and ones). Anything else is no cut.
    shares = member.double() / member.sum(0).clamp_min(1)
    averaging = torch.allclose(matrix.double(), shares, atol=1e-4)
    if not averaging and not torch.equal(matrix.double(), member.double()):
        raise CheckpointError(f"{where}: its matrix neither averages clusters nor lists members")
    return member.to(torch.int64).argmax(1)


def run_import(args: argparse.Namespace) -> tuple[KeyReport, list[str]]:
    """Do what `python -m lgm_scale.release_import generator` asks for."""
    return import_generator(
        args.source, args.folder, args.tokenizer, args.latent_stats, args.merge_tree,
        args.classes, args.noise_scale, args.weights,
    )  # fmt: skip
