"""Bundles of tokenizers: a folder of safetensors weights, configuration and merge tree.

    bundle/
      bundle.json                format, kind, configuration, hash of every file
      tokenizer.safetensors      EMA weights
      merge_tree.safetensors     unless the tokenizer's length control has no tree

A generator's bundle contains these files of the tokenizer that it needs. No pickle: reading a
bundle executes nothing. A file that does not match its hash is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgm_scale.bundle import finish_bundle, model_config, read_bundle, start_bundle
from lgm_scale.config.loading import to_dict
from lgm_scale.families.tokenizer.config import RECONSTRUCTION_FILES, TokenizerModelConfig
from lgm_scale.families.tokenizer.network import Tokenizer, build_tokenizer
from lgm_scale.merging.tree import MergeTree
from lgm_scale.weights import Unfilled, load_weights, save_weights

TOKENIZER_NAME, TREE_NAME = RECONSTRUCTION_FILES


def save_tokenizer_bundle(
    folder: str | Path,
    config: TokenizerModelConfig,
    weights: dict[str, Tensor],
    tree: MergeTree | None,
    training: dict[str, Any],
) -> None:
    """Write a tokenizer bundle, aside first, so that it is complete or absent.

    `folder` is replaced if it is a bundle already; `tree` is None if the length control has none.
    """
    aside = start_bundle(folder)
    save_weights(weights, aside / TOKENIZER_NAME)
    if tree is not None:
        tree.save(aside / TREE_NAME)
    finish_bundle(aside, folder, "tokenizer", {"tokenizer": to_dict(config)}, (), training)


def tokenizer_id(folder: str | Path) -> str:
    """Hash of the tokenizer's weights: what latents and generators refer to."""
    return read_bundle(folder, "tokenizer")["files"][TOKENIZER_NAME]


def load_tokenizer(folder: str | Path, device: torch.device | str = "cpu") -> Tokenizer:
    """The tokenizer of a tokenizer or generator bundle, frozen and in eval mode.

    Raises: CheckpointError.
    """
    info = read_bundle(folder, "tokenizer")
    config = model_config(info, "tokenizer", TokenizerModelConfig, folder)
    with Unfilled():
        tokenizer = build_tokenizer(config)
    load_weights(tokenizer, Path(folder) / TOKENIZER_NAME)
    return tokenizer.to(device)
