"""The release's tokenizer checkpoint {model, ema, args} as a tokenizer bundle."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgm_scale.errors import CheckpointError
from lgm_scale.families.tokenizer.bundle import save_tokenizer_bundle
from lgm_scale.families.tokenizer.config import TOKENIZER_SIZES, TokenizerModelConfig
from lgm_scale.families.tokenizer.network import build_tokenizer
from lgm_scale.merging.tree import MergeTree
from lgm_scale.release_import.names import KeyReport, Renaming, fit, provenance, translate
from lgm_scale.release_import.reading import read_dictionary, shape_of, weights_of
from lgm_scale.weights import Unfilled

our_tokenizer_name = Renaming(
    {
        "encoder.model.": "encoder.vit.",
        "post_quant_conv.": "decoder.latent_in.",
        "quant_conv.": "to_latent.",
        "quantize.embedding": "quantizer.codes",
        "merge_module.": "merging.",
        "decoder.model.": "decoder.vit.",
        "decoder.to_pixel.model.": "decoder.out.",
    }
)
"""Our name of a weight of the tokenizer, given the release's."""
IGNORED = {
    "repa_model.": "frozen teacher of the representation loss; training reads it from its own file",
    "decoder_dino.": "auxiliary decoder of the representation loss; not needed for use",
    "post_quant_conv_dino.": "input of the auxiliary decoder; not needed for use",
    "to_pixel_dino.": "output of the auxiliary decoder; not needed for use",
    "decoder.model.patch_embed.": "never read: the decoder sees no image",
    "quantize.codebook_used": "statistics of training, no weight",
}
"""Prefix -> why keys that begin with it are left out."""

_ENTRIES = {"ema": "ema", "model": "model"}
_BACKBONES = {"s": "vit_small", "b": "vit_base", "l": "vit_large"}


def import_tokenizer(
    source: str | Path, folder: str | Path, weights: str | None = None
) -> tuple[KeyReport, list[str]]:
    """Write a tokenizer bundle from the release's checkpoint.

    Args:
        source: The checkpoint.
        folder: Bundle to write.
        weights: Which of its weights, 'ema' or 'model'; None: the average, if there is one.

    Returns: what became of every key, and remarks for the user.

    Raises: CheckpointError.
    """
    content = read_dictionary(source)
    found = weights_of(content, _ENTRIES, weights, source)
    config = config_from_shapes(found.state, source)
    agreed = check_args(content.get("args"), config, source)
    report = translate(found.state, our_tokenizer_name, IGNORED)
    with torch.device("meta"), Unfilled():
        expected = build_tokenizer(config).state_dict()
    ours = fit(found.state, report, expected, source)
    tree = MergeTree.from_embeddings(ours["merging.embeddings"], config.num_codebooks)
    training = {"weights": found.kind, "imported": provenance(source, report)}
    save_tokenizer_bundle(folder, config, ours, tree, training)
    spoken = f"agree with the shapes: {', '.join(agreed)}" if agreed else "say nothing to check"
    return report, [found.remark, f"model: {config}", f"args {spoken}", about_ties(tree)]


def about_ties(tree: MergeTree) -> str:
    """One line: whether the release may have made another tree of the same embeddings.

    Its script clusters in TF32 on a GPU. Measured over 256 random unit vectors of 768 channels:
    a similarity is off by up to 4e-7 in float32, by 9e-5 in TF32.
    """
    single, tensor_cores = tree.near_ties(1e-6), tree.near_ties(1e-4)
    line = (
        f"near ties: of {tree.num_base_tokens - tree.num_blocks} merges {single} lie within "
        f"float32 rounding (1e-6) of the next, {tensor_cores} within that of TF32 (1e-4), in which "
        "the release clusters on a GPU"
    )
    if not tensor_cores:
        return line
    return (
        f"{line}: its clusters may be others there. Import generators with its merge dictionary "
        "(--merge-tree)"
    )


def config_from_shapes(state: Mapping[str, Tensor], path: str | Path) -> TokenizerModelConfig:
    """The model that these weights belong to. Raises: CheckpointError naming key and shapes."""
    _, num_base_tokens, width = shape_of(state, "encoder.latent_tokens", (1, None, None), path)
    latent_dim, _ = shape_of(state, "quant_conv.weight", (None, width), path)
    form = (None, None, latent_dim)
    num_codebooks, codebook_size, _ = shape_of(state, "quantize.embedding", form, path)
    kernel = "encoder.model.patch_embed.proj.weight"
    patch_size = shape_of(state, kernel, (width, 3, None, None), path)[-1]
    positions = shape_of(state, "encoder.model.pos_embed", (1, None, width), path)[1]
    grid = math.isqrt(positions - 1)
    if grid < 1 or grid**2 != positions - 1:
        raise CheckpointError(
            f"{path}: key encoder.model.pos_embed: {positions} positions; expected a square number "
            "of patches and one class token"
        )
    if num_base_tokens % num_codebooks != 0 or num_base_tokens == num_codebooks:
        raise CheckpointError(
            f"{path}: key quantize.embedding: {num_codebooks} codebooks cannot share "
            f"{num_base_tokens} tokens equally, two or more each"
        )
    return TokenizerModelConfig(
        size=_size(state, width, path),  # type: ignore[arg-type]  # a key of TOKENIZER_SIZES
        image_size=grid * patch_size,
        patch_size=patch_size,
        num_base_tokens=num_base_tokens,
        latent_dim=latent_dim,
        num_codebooks=num_codebooks,
        codebook_size=codebook_size,
    )


def _size(state: Mapping[str, Tensor], width: int, path: str | Path) -> Any:
    """The key of `TOKENIZER_SIZES` that these weights have. Raises: CheckpointError."""
    blocks = [re.match(r"encoder\.model\.blocks\.(\d+)\.", name) for name in state]
    depth = len({match.group(1) for match in blocks if match})
    scaled = "encoder.model.blocks.0.ls1.gamma" in state
    for name, row in TOKENIZER_SIZES.items():
        if (row.width, row.depth, row.layer_scale is not None) == (width, depth, scaled):
            return name
    known = ", ".join(f"{name}: {row.width} x {row.depth}" for name, row in TOKENIZER_SIZES.items())
    raise CheckpointError(
        f"{path}: encoder of width {width} and {depth} blocks, {'with' if scaled else 'without'} "
        f"layer scale; known sizes: {known} (all but tiny and mini with layer scale)"
    )


def check_args(args: object, config: TokenizerModelConfig, path: str | Path) -> list[str]:
    """Compare the release's `args` with the model read from the shapes.

    Returns: the arguments that agree. Those that are absent or of no plain type say nothing.

    Raises: CheckpointError naming every argument that contradicts.
    """
    expected: dict[str, object] = {
        "image_size": config.image_size,
        "encoder_patch_size": config.patch_size,
        "decoder_patch_size": config.patch_size,
        "num_latent_tokens": config.num_base_tokens,
        "codebook_embed_dim": config.latent_dim,
        "num_codebooks": config.num_codebooks,
        "codebook_size": config.codebook_size,
        "codebook_l2_norm": True,
        "tau": 0.07,
        "enc_type": "vit",
        "dec_type": "vit",
        "to_pixel": "linear",
        "variable_method": "ours2",
    }
    values = vars(args) if isinstance(args, argparse.Namespace) else args
    values = values if isinstance(values, dict) else {}
    spoken = {name: values.get(name) for name in [*expected, "encoder_model", "decoder_model"]}
    spoken = {name: v for name, v in spoken.items() if isinstance(v, (bool, int, float, str))}
    problems = []
    for name, value in spoken.items():
        if name in expected and value != expected[name]:
            problems.append(f"args.{name}: {value!r}, expected {expected[name]!r}")
        backbone = _BACKBONES.get(config.size, "")
        if name not in expected and not str(value).startswith(backbone):
            problems.append(f"args.{name}: {value!r}, expected a {backbone}")
    if problems:
        lines = [f"{path}: args and weights contradict each other:"]
        raise CheckpointError("\n".join([*lines, *(f"  - {problem}" for problem in problems)]))
    return list(spoken)


def run_import(args: argparse.Namespace) -> tuple[KeyReport, list[str]]:
    """Do what `python -m lgm_scale.release_import tokenizer` asks for."""
    return import_tokenizer(args.source, args.folder, args.weights)
