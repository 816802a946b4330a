"""Images from a generator bundle of either family, in two lines.

from lgm_scale import load_pipeline
images = load_pipeline("runs/dit/bundle")(["goldfish", 207], num_tokens=64, seed=0)

base.py     the call, classes, batches, output
merged.py   LGM: merged tokens
spatial.py  ELIT and SiT: a grid
"""

from pathlib import Path

import torch

from lgm_scale.bundle_files import check_kind, read_info
from lgm_scale.pipeline.base import Pipeline
from lgm_scale.pipeline.merged import LGMPipeline, default_cfg_scale
from lgm_scale.pipeline.spatial import SpatialPipeline

__all__ = ["LGMPipeline", "Pipeline", "SpatialPipeline", "default_cfg_scale", "load_pipeline"]

_FAMILIES = {family.kind: family for family in (LGMPipeline, SpatialPipeline)}


def load_pipeline(
    folder: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LGMPipeline | SpatialPipeline:
    """The pipeline of whatever generator a bundle holds.

    Args:
        folder: A generator bundle of either family.
        device: Default: a CUDA device if there is one, else the CPU.
        dtype: Default: bfloat16 where a GPU computes it natively, else float32.

    Raises: CheckpointError if it is no generator bundle, damaged, or of another format version.
    """
    info = read_info(folder)
    check_kind(info, folder, *_FAMILIES)
    return _FAMILIES[info["kind"]].from_bundle(folder, device, dtype)
