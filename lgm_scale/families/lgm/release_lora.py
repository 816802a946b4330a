"""The release's LoRA checkpoints, each for one token length, as adapters of a generator bundle.

Its trainer saves what peft wraps: the frozen base and one adapter, both under {model} alone. The
adapter is called '256' whatever length it was trained at.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lgm_scale.bundle import model_config, read_bundle
from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.lgm.bundle import GENERATOR_NAME, save_adapted_bundle
from lgm_scale.families.lgm.config import LGMModelConfig
from lgm_scale.families.lgm.importers import RELEASED_ALPHA
from lgm_scale.families.lgm.lora import TARGETS, Adapter, adapter_shapes
from lgm_scale.families.lgm.network import build_merge_dit
from lgm_scale.families.lgm.release import (
    ENTRIES,
    Surroundings,
    our_generator_name,
    surroundings,
    training_of,
)
from lgm_scale.merging.tree import TREE_NAME, MergeTree
from lgm_scale.release_import.names import KeyReport, Renaming, fit, translate
from lgm_scale.release_import.reading import read_dictionary, weights_of
from lgm_scale.weights import Unfilled

_PREFIX = "base_model.model."


class PeftRenaming(Renaming):
    """From names inside peft's wrapper to ours, and back.

    Args:
        names: All names of a checkpoint.

    Raises: CheckpointError unless they hold matrices of exactly one adapter.
    """

    def __init__(self, names: Iterable[str], path: str | Path) -> None:
        super().__init__(our_generator_name.parts)
        found = [re.search(r"\.lora_[AB]\.(?:(.+)\.)?weight$", name) for name in names]
        adapters = sorted({match.group(1) or "" for match in found if match})
        if len(adapters) != 1:
            listed = ", ".join(map(repr, adapters)) or "none"
            raise CheckpointError(f"{path}: one adapter is needed; found: {listed}")
        self.end = f".{adapters[0]}.weight" if adapters[0] else ".weight"

    def __call__(self, name: str) -> str:
        """Our name of a weight, given peft's."""
        name = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if ".lora_" in name:
            name = name.removesuffix(self.end) + ".weight" if name.endswith(self.end) else name
        return super().__call__(name)

    def theirs(self, name: str) -> str:
        """Peft's name of a weight, given ours."""
        inner = super().theirs(name)
        if ".lora_" in inner:
            return _PREFIX + inner.removesuffix(".weight") + self.end
        layers = "|".join(map(re.escape, TARGETS))
        return _PREFIX + re.sub(rf"\.({layers})\.(\w+)$", r".\1.base_layer.\2", inner)


def import_lora(
    source: str | Path,
    folder: str | Path,
    num_tokens: int,
    around: Surroundings | str | Path,
    alpha: float = RELEASED_ALPHA,
    weights: str | None = None,
) -> tuple[KeyReport, list[str]]:
    """Write a generator bundle with an adapter for K tokens.

    Args:
        source: The checkpoint.
        folder: Bundle to write.
        num_tokens: K, the length that the adapter was trained at; the checkpoint does not say.
        around: What the checkpoint does not hold; or a generator bundle with the same base, to
            which the adapter is added.
        alpha: Numerator of the adapter's scale alpha / rank; the checkpoint does not say.
        weights: Which of its weights, 'ema' or 'model'; None: the average, if there is one.

    Returns: what became of every key, and remarks for the user.

    Raises: CheckpointError, ConfigError, DataError.
    """
    content = read_dictionary(source)
    found = weights_of(content, ENTRIES, weights, source)
    renaming = PeftRenaming(found.state, source)
    report = translate(found.state, renaming, {})
    if isinstance(around, Surroundings):
        state = {our_generator_name.theirs(report.taken[n]): v for n, v in found.state.items()}
        config = around.config(state, source)
    else:
        config = _base_config(around, num_tokens)
    with torch.device("meta"), Unfilled():
        net = build_merge_dit(config)
    matrices = [n for n in found.state if ".lora_A." in n]
    rank = min((len(found.state[n]) for n in matrices if found.state[n].ndim == 2), default=0)
    shapes = adapter_shapes(net, rank)
    expected = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    has_base = any(".lora_" not in name for name in report.taken)
    if has_base or isinstance(around, Surroundings):
        expected |= net.state_dict()
    tensors = fit(found.state, report, expected, source)
    adapter = Adapter({name: tensors.pop(name) for name in shapes}, alpha)
    training = training_of(content, found, source, report)
    remarks = [
        found.remark,
        f"model: {config}",
        f"adapter: for K = {num_tokens} (--num-tokens), rank {rank}, alpha {alpha:g} (--alpha); "
        "the checkpoint says neither K nor alpha",
    ]
    if isinstance(around, Surroundings):
        remarks += around.save(folder, config, tensors, training, {num_tokens: adapter})
    else:
        _check_base(tensors, around, source)
        save_adapted_bundle(folder, around, num_tokens, adapter, training)
        same = "its weights are those in the checkpoint" if has_base else "the checkpoint has none"
        remarks.append(f"base: {around} (--base); {same}")
    return report, remarks


def _base_config(base: str | Path, num_tokens: int) -> LGMModelConfig:
    """Configuration of a bundle that an adapter is added to. Raises: ConfigError."""
    info = read_bundle(base, "generator")
    noise = info["training"].get("config", {}).get("objective", {}).get("noise_scale")
    if noise != "legacy":
        raise ConfigError(
            f"--base: {base} has the noise scale {noise!r}, and the release's LoRA is trained "
            "under 'legacy'; import the checkpoint without --base, with its own base weights"
        )
    if str(num_tokens) in info.get("adapters", {}):
        raise ConfigError(f"--num-tokens: {base} has an adapter for {num_tokens} already")
    MergeTree.load(Path(base) / TREE_NAME).assignment(num_tokens)
    return model_config(info, "generator", LGMModelConfig, base)


def _check_base(tensors: dict[str, Tensor], base: str | Path, source: str | Path) -> None:
    """Raise CheckpointError unless the checkpoint's base weights, if any, are the bundle's."""
    held = load_file(Path(base) / GENERATOR_NAME) if tensors else {}
    other = [name for name, value in tensors.items() if not torch.equal(value, held[name])]
    if other:
        raise CheckpointError(
            f"{source}: {len(other)} of its base weights differ from those of {base}, "
            f"{other[0]} first; import it without --base, with its own base weights"
        )


def run_import(args: argparse.Namespace) -> tuple[KeyReport, list[str]]:
    """Do what `python -m lgm_scale.release_import lora` asks for."""
    if not (math.isfinite(args.alpha) and args.alpha > 0):
        raise ConfigError(f"--alpha: {args.alpha:g} must be a positive number")
    if args.num_tokens < 1:
        raise ConfigError(f"--num-tokens: {args.num_tokens} must be 1 or more")
    if args.base is not None and args.noise_scale != "legacy":
        raise ConfigError("--base: that bundle brings the noise scale; leave --noise-scale away")
    around = surroundings(args) if args.base is None else args.base
    return import_lora(args.source, args.folder, args.num_tokens, around, args.alpha, args.weights)
