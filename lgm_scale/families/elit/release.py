"""A checkpoint {model, ema} of ELIT's authors, or of a SiT of theirs, as a bundle on a grid."""

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
from lgm_scale.families.elit.bundle import save_elit_bundle
from lgm_scale.families.elit.config import SIT_SIZES, ELITModelConfig, InterfaceConfig, SpaceConfig
from lgm_scale.families.elit.network import build_elit, sincos_table
from lgm_scale.release_import.names import (
    KeyReport,
    Renaming,
    class_names,
    fit,
    provenance,
    translate,
)
from lgm_scale.release_import.reading import read_dictionary, shape_of, weights_of
from lgm_scale.weights import Unfilled

_READ, _WRITE = "input_token_editor.adapters.0.", "output_token_editor.adapters.0."
our_elit_name = Renaming(
    {
        f"{_READ}fit_layer.latents_attend_to_patches.0.": "read.attn.",
        f"{_READ}fit_layer.read_ff.0.": "read.mlp.",
        f"{_READ}learned_query_embed": "read.queries",
        f"{_READ}latent_pos_embed": "read.positions",
        f"{_READ}pos_embed": "read.offset",
        f"{_READ}fit_layer.": "read.",
        f"{_WRITE}patches_attend_to_latents.0.": "write.attn.",
        f"{_WRITE}write_ff.0.": "write.mlp.",
        f"{_WRITE}pos_embed": "write.offset",
        "adaLN_modulation": "modulation",
        ".q_proj.": ".q.",
        ".kv_proj.": ".kv.",
        "_norm.scale": "_norm.weight",
        "x_embedder.proj.": "x_embed.",
        "t_embedder.": "t_embed.",
        "y_embedder.embedding_table": "label_embed.table",
        "final_layer.": "final.",
    }
)
"""Our name of a weight of ELIT or SiT, given the release's."""
_IGNORED = {
    "pos_embed": "fixed positions; ours are computed, and these were found equal",
    "projectors.": "predicts features of another network in training; not needed for use",
}
_ENTRIES = {"ema": "ema", "model": "model"}
_ROUNDING = 1e-5
"""Up to here a table is the computed one."""
_DRIFT = 2.5e-3
"""Up to here it is the computed one after their training: its average includes this table, whose
factors do not sum to one in float32, so it shrinks (by 1.64e-4 from 10,000 updates on); half
precision adds up to 2.4e-4 (float16) or 2e-3 (bfloat16)."""


def import_elit(
    source: str | Path,
    folder: str | Path,
    vae: str,
    split: str = "released",
    classes: str | None = None,
    weights: str | None = None,
) -> tuple[KeyReport, list[str]]:
    """Write a bundle of an ELIT, or of a SiT if the checkpoint has no interface.

    Args:
        source: The checkpoint.
        folder: Bundle to write.
        vae: Folder of the autoencoder that decodes; it is copied into the bundle.
        split: Blocks before Read and after Write, by a key of `SPLITS`. Nothing in a checkpoint
            says it; those that were released ran as `released`.
        classes: Where the classes' names are from: a text file, 'imagenet', or None for indices.
        weights: Which of its weights, 'ema' or 'model'; None: the average, if there is one.

    Returns: what became of every key, and remarks for the user.

    Raises: CheckpointError.
    """
    found = weights_of(read_dictionary(source), _ENTRIES, weights, source)
    state = found.state
    model, space = elit_config_from_shapes(state, split, vae, source)
    positions, about_positions = _positions(state, model, space, source)
    report = translate(state, our_elit_name, _IGNORED)
    with torch.device("meta"), Unfilled():
        expected = build_elit(model, space).state_dict()
    tensors = fit(state, report, expected, source)
    if positions is not None:
        del report.ignored["pos_embed"]
        report.taken["pos_embed"] = "pos_embed"
    names = class_names(classes, model.num_classes)
    imported = provenance(source, report, "ELIT")
    training: dict[str, Any] = {"weights": found.kind, "imported": imported}
    save_elit_bundle(folder, model, space, tensors, names, training, vae, positions)
    remarks = [found.remark, f"model: {model}", about_positions]
    if model.interface is not None:
        remarks.append(f"split: {split} (--split); the checkpoint does not say")
    return report, remarks


def elit_config_from_shapes(
    state: Mapping[str, Tensor], split: str, vae: str | None, path: str | Path
) -> tuple[ELITModelConfig, SpaceConfig]:
    """Model and space that these weights belong to.

    Raises: CheckpointError naming key and shapes.
    """
    form = (None, 4, None, None)  # [C, channels of the SD-VAE, p, p]
    width, _, patch_size, _ = shape_of(state, "x_embedder.proj.weight", form, path)
    _, num_tokens, _ = shape_of(state, "pos_embed", (1, None, width), path)
    rows = shape_of(state, "y_embedder.embedding_table.weight", (None, width), path)[0]
    found = [re.match(r"blocks\.(\d+)\.", name) for name in state]
    depth = len({match.group(1) for match in found if match})
    # Width and depth name a size; heads leave no trace in the shapes of fused projections.
    sizes = [n for n, row in SIT_SIZES.items() if (row.width, row.depth) == (width, depth)]
    if not sizes:
        known = ", ".join(f"{n}: {row.width} x {row.depth}" for n, row in SIT_SIZES.items())
        raise CheckpointError(
            f"{path}: width {width} and {depth} blocks; known sizes (width x blocks): {known}"
        )
    grid = _root(num_tokens, "pos_embed", path)
    interface = None
    if f"{_READ}learned_query_embed" in state:
        window = shape_of(state, f"{_READ}learned_query_embed", (None, width), path)[0]
        position_rows = shape_of(state, f"{_READ}latent_pos_embed", (None, width), path)[0]
        interface = InterfaceConfig(
            split=split,  # type: ignore[arg-type]  # a choice of the command line
            group_size=_root(window, f"{_READ}learned_query_embed", path),
            position_rows=position_rows,
        )
    model = ELITModelConfig(
        size=sizes[0],  # type: ignore[arg-type]  # a key of SIT_SIZES
        patch_size=patch_size,
        num_classes=rows - 1,
        interface=interface,
    )
    return model, SpaceConfig(kind="sd_vae", image_size=8 * grid * patch_size, vae=vae)


def _root(number: int, key: str, path: str | Path) -> int:
    """Side of a square table of this many rows. Raises: CheckpointError."""
    root = math.isqrt(number)
    if root**2 != number:
        raise CheckpointError(f"{path}: key {key}: {number} rows; a square number is needed")
    return root


def _positions(
    state: Mapping[str, Tensor], model: ELITModelConfig, space: SpaceConfig, path: str | Path
) -> tuple[Tensor | None, str]:
    """The file's fixed positions [N, C], None if they are the computed ones; and a remark.

    Raises: CheckpointError for positions of another network.
    """
    table = state["pos_embed"][0].float()
    expected = sincos_table(table.shape[1], space.side // model.patch_size)
    error = float((table - expected).abs().max())
    if not error <= _DRIFT:  # so written, NaN is refused as well
        raise CheckpointError(
            f"{path}: key pos_embed differs from the fixed sin-cos table by {error:.3g}: these "
            "weights belong to another network"
        )
    if error <= _ROUNDING:
        return None, "positions: the fixed sin-cos table"
    return table, (
        f"positions: the file's, up to {error:.3g} from the fixed sin-cos table, as an average or "
        "half precision leaves it; kept, for its authors sample with it"
    )


def run_import(args: argparse.Namespace) -> tuple[KeyReport, list[str]]:
    """Do what `python -m lgm_scale.release_import elit` asks for."""
    return import_elit(args.source, args.folder, args.vae, args.split, args.classes, args.weights)
