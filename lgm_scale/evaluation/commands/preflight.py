"""Which files the evaluation needs, where it looks for them, and what each unlocks.

    python -m lgm_scale.evaluation.commands.preflight [CONFIG.yaml] [key=value ...] [--strict]

Reads files and hashes them; touches no GPU and no network. With --strict a missing or wrong file
ends with status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lgm_scale.config.loading import read_yaml
from lgm_scale.data.manifest import read_manifest
from lgm_scale.errors import ConfigError, LGMError, MissingAssetError, exit_on_user_error
from lgm_scale.evaluation.commands.arguments import command_parser
from lgm_scale.evaluation.features.files import REFERENCE, WEIGHTS
from lgm_scale.evaluation.sweep.config import SweepConfig
from lgm_scale.published import COMMAND, PUBLISHED
from lgm_scale.start import heavy_imports
from lgm_scale.storage.files import file_hash

USES: dict[str, tuple[str | None, str]] = {
    **WEIGHTS,
    "reference": REFERENCE,
    "images": (None, "reconstructions: rFID, PSNR, SSIM, LPIPS; a reference where none is given"),
}
"""Key of a sweep -> its name in `PUBLISHED` (None: data of yours), and what it unlocks."""
MAKE = "python -m lgm_scale.evaluation.commands.reference"


def look(key: str, path: str | None) -> tuple[str, str]:
    """State ("there", "missing", "wrong" or "not given") and detail of the file of a key."""
    if path is None:
        return "not given", f"set `{key}` to use it"
    if not Path(path).exists():
        return "missing", f"looked for at {path}"
    if key == "images":
        try:
            manifest = read_manifest(path, "images")
        except LGMError as error:
            return "wrong", str(error)
        return "there", f"{path}, {manifest.num_samples} images of {manifest.image_size} pixels"
    digest = file_hash(path)
    megabytes = Path(path).stat().st_size / 1e6
    detail = f"{path}, {megabytes:.1f} MB, sha256 {digest}"
    if key == "reference":
        # Late: what is in it needs the evaluation with torch, the list of files does not.
        with heavy_imports():
            from lgm_scale.evaluation.references.files import load_reference

        try:
            return "there", f"{detail}; {', '.join(load_reference(path).held())}"
        except LGMError as error:
            return "wrong", str(error)
    known = PUBLISHED[WEIGHTS[key][0]].sha256
    if known is not None and not digest.startswith(known):
        return "wrong", (
            f"{detail}, which does not begin with {known}: not the published weights, "
            "and results will not be called by the published names"
        )
    return "there", detail


def report(values: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The list as text, and the keys of files that are missing or wrong."""
    lines, bad = [], []
    for key, (published, unlocks) in USES.items():
        state, detail = look(key, values.get(key))
        if state in ("missing", "wrong"):
            bad.append(key)
        lines += [
            f"{key:10s} {state}", f"    unlocks  {unlocks}", f"    found    {detail}",
            f"    from     {_source(published)}",
        ]  # fmt: skip
        if published is not None and state != "there":
            lines.append(f"    get      {COMMAND} --fetch {published}")
        if key == "reference" and state == "missing":
            lines.append(
                f"             {MAKE} {PUBLISHED[REFERENCE[0]].path} "
                f"--out {values[key]} --inception {values.get('inception')}"
            )
    return "\n".join(lines), bad


def _source(published: str | None) -> str:
    if published is None:
        return "your data: python data_tools/images_to_mds.py SRC --out DST --image-size PIXELS"
    file = PUBLISHED[published]
    return f"{file.url} (about {file.size}; sha256 {file.sum_text})"


def main() -> int:
    """Command line."""
    parser = command_parser(
        "preflight",
        "List the files that metrics need, where they were looked for, and what each unlocks. "
        f"Downloads nothing; `{COMMAND}` does, when asked to.",
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
