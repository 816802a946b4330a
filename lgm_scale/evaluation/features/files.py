"""Which files of others the feature spaces read, and what each unlocks. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lgm_scale.published import PUBLISHED, Asset

WEIGHTS = {
    "inception": ("inception", "FID, sFID, IS, KID, precision, recall, rFID"),
    "dinov2": ("dinov2_l", "FD-DINOv2"),
    "vgg16": ("vgg16", "LPIPS of reconstructions"),
}
"""Key of a sweep, which is also an option of commands -> name in `PUBLISHED`, what it unlocks."""

REFERENCE = ("adm_imagenet256", "FID and sFID as published; KID, precision and recall after "
             "`python -m lgm_scale.evaluation.commands.reference`")  # fmt: skip
"""The same of `reference`, which may as well be made of one's own images."""


def weights_of(values: Mapping[str, Any]) -> list[Asset]:
    """The weights that a sweep or a command names, whether they are there or not."""
    return [
        Asset(key, str(values[key]), published, unlocks)
        for key, (published, unlocks) in WEIGHTS.items()
        if values.get(key) is not None
    ]


def assets_of(values: Mapping[str, Any]) -> list[Asset]:
    """The same, and the published reference that a sweep's own may be made of."""
    found = weights_of(values)
    if values.get("reference") is not None:
        published, unlocks = REFERENCE
        found.append(Asset("reference", PUBLISHED[published].path, published, unlocks))
    return found
