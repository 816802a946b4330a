"""Bundles of LGM: a folder of safetensors weights, configuration, merge tree and statistics.

    bundle/
      bundle.json                format, kind, configuration, hash of every file
      tokenizer.safetensors      EMA weights
      merge_tree.safetensors     unless the tokenizer's length control has no tree
      generator.safetensors      generator bundles: EMA weights, beside the tokenizer they need
      latent_stats.safetensors
      adapter_64.safetensors     changes for one token length, if any were trained

No pickle: reading a bundle executes nothing. A file that does not match its hash is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lgm_scale.bundle import finish_bundle, model_config, read_bundle, start_bundle
from lgm_scale.config.loading import to_dict
from lgm_scale.errors import CheckpointError
from lgm_scale.families.lgm.config import LGMModelConfig
from lgm_scale.families.lgm.latent_stats import STATS_NAME, LatentStats
from lgm_scale.families.lgm.lora import Adapter, with_adapter
from lgm_scale.families.lgm.network import MergeDiT, build_merge_dit
from lgm_scale.families.tokenizer.bundle import TOKENIZER_NAME, load_tokenizer
from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.merging.tree import TREE_NAME, MergeAssignment, MergeTree
from lgm_scale.weights import Unfilled, load_weights, save_weights

GENERATOR_NAME = "generator.safetensors"


@dataclass(frozen=True)
class LGMBundle:
    """A generator with all it needs to make images."""

    net: MergeDiT
    tokenizer: Tokenizer
    tree: MergeTree
    stats: LatentStats
    classes: tuple[str, ...]
    info: dict[str, Any]
    """Contents of bundle.json."""
    adapters: dict[int, Adapter] = field(default_factory=dict)
    """By token length; a length without one runs on `net` as it is."""
    _adapted: dict[int, MergeDiT] = field(default_factory=dict, init=False, repr=False)

    def network(self, num_tokens: int) -> MergeDiT:
        """The network for K tokens: `net`, or a copy with K's adapter, made at its first use."""
        if num_tokens not in self.adapters:
            return self.net
        if num_tokens not in self._adapted:
            self._adapted[num_tokens] = with_adapter(self.net, self.adapters[num_tokens])
        return self._adapted[num_tokens]

    def velocity(
        self, z_t: Tensor, t: Tensor, labels: Tensor, assignment: MergeAssignment, *end: Tensor
    ) -> Tensor:
        """What the sampler integrates, at each length with its own network; see `MergeDiT`."""
        return self.network(assignment.num_tokens)(z_t, t, labels, assignment, *end)


def save_lgm_bundle(
    folder: str | Path,
    config: LGMModelConfig,
    weights: dict[str, Tensor],
    stats: LatentStats,
    classes: tuple[str, ...],
    tokenizer_bundle: str | Path,
    training: dict[str, Any],
    tree: MergeTree | None = None,
    adapters: Mapping[int, Adapter] = MappingProxyType({}),
) -> None:
    """Write a generator bundle; tokenizer and merge tree are copied from the tokenizer's bundle.

    `folder` is replaced if it is a bundle already. `stats` are those of the latents that the
    generator was trained on, `tree` its merge tree, where that is not the tokenizer's.
    `adapters` are changes by token length that came with it.
    """
    source = read_bundle(tokenizer_bundle, "tokenizer")
    if TREE_NAME not in source["files"]:
        raise CheckpointError(
            f"{tokenizer_bundle} has no merge tree, and a generator needs one: its tokenizer was "
            "trained with another length_control than lgm or fixed"
        )
    aside = start_bundle(folder)
    for name in (TOKENIZER_NAME, TREE_NAME):
        shutil.copyfile(Path(tokenizer_bundle) / name, aside / name)
    if tree is not None:
        tree.save(aside / TREE_NAME)
    save_weights(weights, aside / GENERATOR_NAME)
    stats.save(aside / STATS_NAME)
    models = {"tokenizer": source["models"]["tokenizer"], "generator": to_dict(config)}
    kept = {str(k): _save_adapter(aside, k, each, training) for k, each in adapters.items()}
    finish_bundle(aside, folder, "generator", models, classes, training, kept)


def save_adapted_bundle(
    folder: str | Path,
    base: str | Path,
    num_tokens: int,
    adapter: Adapter,
    training: dict[str, Any],
) -> None:
    """Write a copy of a generator bundle with one more adapter; the base's weights stay.

    `folder` is replaced if it is a bundle already; the base may hold other adapters.

    Raises: CheckpointError if the base is no generator bundle.
    """
    info = read_bundle(base, "generator")
    aside = start_bundle(folder)
    for name in info["files"]:
        shutil.copyfile(Path(base) / name, aside / name)
    entry = _save_adapter(aside, num_tokens, adapter, training)
    adapters = info.get("adapters", {}) | {str(num_tokens): entry}
    classes = tuple(info["classes"])
    finish_bundle(aside, folder, "generator", info["models"], classes, info["training"], adapters)


def _save_adapter(
    aside: Path, num_tokens: int, adapter: Adapter, training: dict[str, Any]
) -> dict[str, Any]:
    """Write an adapter's file; return what bundle.json says about it."""
    file = f"adapter_{num_tokens}.safetensors"
    save_weights(adapter.weights, aside / file)
    return {"file": file, "alpha": adapter.alpha, "training": training}


def load_lgm_bundle(folder: str | Path, device: torch.device | str = "cpu") -> LGMBundle:
    """A generator and all it needs, frozen and in eval mode.

    Raises: CheckpointError.
    """
    info = read_bundle(folder, "generator")
    config = model_config(info, "generator", LGMModelConfig, folder)
    with Unfilled():
        net = build_merge_dit(config)
    load_weights(net, Path(folder) / GENERATOR_NAME)
    tree = MergeTree.load(Path(folder) / TREE_NAME)
    if tree.num_base_tokens != net.num_base_tokens:
        raise CheckpointError(
            f"{folder}: the merge tree has {tree.num_base_tokens} tokens, the generator "
            f"{net.num_base_tokens}; they do not belong together"
        )
    adapters = _load_adapters(info, folder, net)
    return LGMBundle(
        net=net.to(device),
        tokenizer=load_tokenizer(folder, device),
        tree=tree,
        stats=LatentStats.load(Path(folder) / STATS_NAME),
        classes=tuple(info["classes"]),
        info=info,
        adapters={k: adapter.to(device) for k, adapter in adapters.items()},
    )


def _load_adapters(info: dict[str, Any], folder: str | Path, net: MergeDiT) -> dict[int, Adapter]:
    adapters = {}
    try:
        for num_tokens, entry in info.get("adapters", {}).items():
            if entry["file"] not in info["files"]:
                raise CheckpointError(f"{entry['file']} is not among its files")
            weights = load_file(str(Path(folder) / entry["file"]))
            adapters[int(num_tokens)] = adapter = Adapter(weights, float(entry["alpha"]))
            adapter.check(net)
    except (CheckpointError, OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its adapters are damaged: {error}") from error
    return adapters
