"""Which files the evaluation needs, where it looks for them, and what each unlocks.

    python -m lgm_scale.evaluation.commands.preflight [CONFIG.yaml] [key=value ...] [--strict]

Reads files and hashes them; touches no GPU and no network. With --strict a missing or wrong file
ends with status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lgm_scale.config.loading import read_yaml
from lgm_scale.data.manifest import read_manifest
from lgm_scale.errors import ConfigError, LGMError, MissingAssetError, exit_on_user_error
from lgm_scale.evaluation.commands.arguments import command_parser
from lgm_scale.evaluation.sweep.config import SweepConfig
from lgm_scale.published import PUBLISHED, PublishedFile
from lgm_scale.storage.files import file_hash

IMAGES = PublishedFile("your data: data_tools/images_to_mds.py", "-", "yours")


@dataclass(frozen=True)
class EvalAsset:
    """One file: its key, what is published of it, and the metrics that need it."""

    key: str
    published: PublishedFile
    unlocks: str


def assets() -> list[EvalAsset]:
    """Every file that a sweep may be given."""
    return [
        EvalAsset(
            "inception", PUBLISHED["inception"], "FID, sFID, IS, KID, precision, recall, rFID"
        ),
        EvalAsset("dinov2", PUBLISHED["dinov2_l"], "FD-DINOv2"),
        EvalAsset("vgg16", PUBLISHED["vgg16"], "LPIPS of reconstructions"),
        EvalAsset("reference", PUBLISHED["reference"], "FID and sFID as published; KID, precision "
                  "and recall after `python -m lgm_scale.evaluation.commands.reference`"),
        EvalAsset("images", IMAGES,
                  "reconstructions: rFID, PSNR, SSIM, LPIPS; a reference where none is given"),
    ]  # fmt: skip


def _expected(asset: EvalAsset) -> str:
    known = asset.published.hash_prefix
    return f"its sha256 begins with {known}" if known else "no hash is published with it"


def look(asset: EvalAsset, path: str | None) -> tuple[str, str]:
    """State ("there", "missing", "wrong" or "not given") and detail of one file."""
    if path is None:
        return "not given", f"set `{asset.key}` to use it"
    if not Path(path).exists():
        return "missing", f"looked for at {path}"
    if asset.key == "images":
        try:
            manifest = read_manifest(path, "images")
        except LGMError as error:
            return "wrong", str(error)
        return "there", f"{path}, {manifest.num_samples} images of {manifest.image_size} pixels"
    digest = file_hash(path)
    megabytes = Path(path).stat().st_size / 1e6
    detail = f"{path}, {megabytes:.1f} MB, sha256 {digest}"
    if asset.key == "reference":
        # Late: what is in it needs the evaluation with torch, the list of files does not.
        from lgm_scale.evaluation.references.files import load_reference

        try:
            return "there", f"{detail}; {', '.join(load_reference(path).held())}"
        except LGMError as error:
            return "wrong", str(error)
    known = asset.published.hash_prefix
    if known is not None and not digest.startswith(known):
        return "wrong", (
            f"{detail}, which does not begin with {known}: not the published weights, "
            "and results will not be called by the published names"
        )
    return "there", detail


def report(values: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The list as text, and the keys of files that are missing or wrong."""
    lines, bad = [], []
    for asset in assets():
        state, detail = look(asset, values.get(asset.key))
        if state in ("missing", "wrong"):
            bad.append(asset.key)
        lines += [
            f"{asset.key:10s} {state}",
            f"    unlocks  {asset.unlocks}",
            f"    found    {detail}",
            f"    from     {asset.published.url} ({asset.published.size}; {_expected(asset)})",
        ]
    return "\n".join(lines), bad


def main() -> int:
    """Command line."""
    parser = command_parser(
        "preflight",
        "List the files that metrics need, where they were looked for, and what each unlocks. "
        "Nothing is downloaded.",
    )
    parser.add_argument("config", nargs="?", help="YAML file of a sweep")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key")
    parser.add_argument("--strict", action="store_true", help="status 2 if a file is not in order")
    args = parser.parse_intermixed_args(sys.argv[1:])
    values = read_yaml(args.config, args.overrides) if args.config else {}
    if args.config and not values.keys() & {entry.name for entry in fields(SweepConfig)}:
        raise ConfigError(f"config: {args.config} has no key of a sweep; give the file of one")
    text, bad = report(values)
    print(text)
    if args.strict and bad:
        raise MissingAssetError(f"{', '.join(bad)}: not in order, see above")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
