"""A run that trains an adapter: where it starts, and what it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgm_scale.config.loading import load_config
from lgm_scale.errors import ConfigError
from lgm_scale.families.lgm.bundle import LGMBundle, load_lgm_bundle, save_adapted_bundle
from lgm_scale.families.lgm.config import LGMModelConfig, LGMRun
from lgm_scale.families.lgm.lora import Adapter, plain_names
from lgm_scale.families.tokenizer.bundle import TOKENIZER_NAME, tokenizer_id
from lgm_scale.merging.tree import MergeTree


def load_base(config: LGMRun, tree: MergeTree) -> LGMBundle:
    """The generator that an adapter is trained on.

    Raises: CheckpointError if it is none; ConfigError with everything in which the run differs.
    """
    assert config.lora is not None
    base = load_lgm_bundle(config.lora.base)
    problems = list(_differences(config, base, tree))
    if problems:
        raise ConfigError(problems, f"lora.base: {config.lora.base} does not fit this run")
    return base


def _differences(config: LGMRun, base: LGMBundle, tree: MergeTree) -> Iterator[str]:
    there = load_config(base.info["models"]["generator"], LGMModelConfig)
    for name, value in vars(config.model).items():
        if getattr(there, name) != value:
            yield f"model.{name}: {value!r} here, {getattr(there, name)!r} there"
    objective = base.info["training"].get("config", {}).get("objective", {})
    noise = objective.get("noise_scale", config.objective.noise_scale)
    if noise != config.objective.noise_scale:
        yield f"objective.noise_scale: {config.objective.noise_scale!r} here, {noise!r} there"
    if tokenizer_id(config.tokenizer) != base.info["files"][TOKENIZER_NAME]:
        yield f"tokenizer: {config.tokenizer} is not the tokenizer that the base was trained with"
    elif not torch.equal(tree.merges, base.tree.merges):
        yield f"data: {config.data.sources[0].path} has another merge tree than the base"
    num_tokens = config.lengths.choices[0]
    if num_tokens in base.adapters:
        yield f"lengths.choices: the base has an adapter for {num_tokens} already"


def export_adapter(
    folder: Path, config: LGMRun, average: dict[str, Tensor], training: dict[str, Any]
) -> None:
    """Write a copy of the base with the averaged adapter."""
    assert config.lora is not None
    adapter = Adapter(plain_names(average), config.lora.alpha)
    save_adapted_bundle(folder, config.lora.base, config.lengths.choices[0], adapter, training)
