"""Files of other people: which recipe needs which, and the one command that downloads.

    python -m lgm_scale.assets                              what there is, and what needs it
    python -m lgm_scale.assets yamls/tokenizer_b.yaml       what this configuration needs
    python -m lgm_scale.assets --fetch yamls/tokenizer_b.yaml inception
    python -m lgm_scale.assets --check                      compare what lies there with its sums

Files lie in assets/, below the folder where commands run, and recipes look for them there. A NAME
is that of a file, or a configuration (YAML), which stands for all that it needs. Nothing is
downloaded without --fetch and a yes: to a question, or by --yes. A download that was interrupted
goes on.
Exit status: 0 done, 2 for anything to mend.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from lgm_scale.config.loading import RECIPES, load_config, read_yaml
from lgm_scale.errors import ConfigError, LGMError, MissingAssetError, exit_on_user_error
from lgm_scale.evaluation.features.files import assets_of
from lgm_scale.families.base import add_import_option, families
from lgm_scale.published import COMMAND, FOLDER, PUBLISHED, Asset, PublishedFile, size_text
from lgm_scale.storage.files import file_hash
from lgm_scale.storage.web import fetch

Needs = dict[str, list[Asset]]
"""Configuration -> the files of others that it reads."""


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a file, or a YAML: all it needs")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--fetch", action="store_true", help="download the files named, after asking")
    what.add_argument("--check", action="store_true", help="hash what is there, compare the sums")
    parser.add_argument("--yes", action="store_true", help="with --fetch: do not ask")
    add_import_option(parser)
    args = parser.parse_intermixed_args(argv)
    if args.fetch and not args.names:
        parser.error(f"--fetch: name files or configurations; `{COMMAND}` lists them")
    if args.yes and not args.fetch:
        parser.error("--yes: goes with --fetch")
    return args


def main() -> int:
    """List, fetch or check."""
    args = parse_args(sys.argv[1:])
    configs = [name for name in args.names if name.endswith((".yaml", ".yml"))]
    unknown = [name for name in args.names if name not in configs and name not in PUBLISHED]
    if unknown:
        raise ConfigError(
            [f"{name}: no file of this name; files: {', '.join(PUBLISHED)}" for name in unknown]
        )
    needs = {name: needs_of(name) for name in configs}
    named = [asset for assets in needs.values() for asset in assets]
    chosen = {asset.published for asset in named}
    names = [name for name in PUBLISHED if name in chosen or name in args.names]
    if args.fetch:
        elsewhere = {a.published for a in named if a.present and not a.in_folder}
        fetch_all([name for name in names if name not in elsewhere], args.yes)
        for asset in named:
            if not asset.present:
                path = PUBLISHED[asset.published].path
                print(f"{asset.key}: {asset.path} is not there; set it to {path}")
    elif args.check:
        check(names if args.names else list(PUBLISHED))
    else:
        print("\n".join(listing(names, needs) if args.names else listing(PUBLISHED, recipes())))
    return 0


def needs_of(path: str) -> list[Asset]:
    """The files of others that a configuration reads, of a training or of a sweep.

    Raises: ConfigError.
    """
    values = read_yaml(path)
    if "cells" in values:
        return assets_of(values)
    family = families().get(str(values.get("task")))
    if family is None:
        raise ConfigError(
            f"{path}: neither a training (task: {', '.join(families())}) nor a sweep (cells); name "
            "the configurations that it starts"
        )
    return list(family.assets(load_config(values, family.schema, path)))


def recipes() -> Needs:
    """What each recipe of the package reads; those that read none are left out."""
    found: Needs = {}
    for path in sorted(RECIPES.rglob("*.yaml")):
        values = read_yaml(path)
        if "cells" in values or "task" in values:
            found[f"yamls/{path.relative_to(RECIPES)}"] = needs_of(str(path))
    return {name: assets for name, assets in found.items() if assets}


def listing(names: Iterable[str], needs: Needs) -> list[str]:
    """Some lines for each of these files."""
    lines = []
    for name in names:
        file = PUBLISHED[name]
        users = [
            (config, a) for config, assets in needs.items() for a in assets if a.published == name
        ]
        state = "there" if Path(file.path).is_file() else "missing"
        uses = dict.fromkeys(asset.unlocks for _, asset in users)
        keys = dict.fromkeys(f"{config} ({_place(asset)})" for config, asset in users)
        lines += [
            f"{name:15s} {state:8s} {file.path}",
            f"    unlocks   {'; '.join(uses) or 'nothing that these configurations use'}",
            f"    needed by {', '.join(keys) or 'none of them as it is'}",
            f"    size      about {file.size}",
            f"    licence   {file.licence}",
            f"    sha256    {file.sum_text}",
            f"    from      {file.url}",
        ]
    lines.append(f"To get some: {COMMAND} --fetch NAME ...")
    return lines


def _place(asset: Asset) -> str:
    """The key, and where it looks if that is another place."""
    there = "there" if asset.present else "missing"
    return asset.key if asset.in_folder else f"{asset.key}: {asset.path}, {there}"


def fetch_all(names: Sequence[str], yes: bool) -> None:
    """Download files that are not there. Raises: MissingAssetError, StorageError."""
    wanted = {name: PUBLISHED[name] for name in names if not Path(PUBLISHED[name].path).is_file()}
    for name in names:
        if name not in wanted:
            print(f"{name}: {PUBLISHED[name].path} is there already")
    if not wanted:
        return
    total = sum(file.megabytes for file in wanted.values())
    for name, file in wanted.items():
        print(f"{name}: {file.size} from {file.url}\n    licence: {file.licence}")
    begun = sum(part.stat().st_size for part in Path(FOLDER).rglob("*.part")) / 1e6
    free = shutil.disk_usage(FOLDER if Path(FOLDER).is_dir() else ".").free / 1e6
    if free < total - begun:
        raise MissingAssetError(
            f"{FOLDER}: {size_text(total)} are needed and {size_text(free)} free; make room, or "
            f"link {FOLDER} to a larger disk"
        )
    if not yes and not _agreed(f"Download {size_text(total)} into {FOLDER}/"):
        raise MissingAssetError("nothing was downloaded; the same command with --yes does not ask")
    failed = []
    for name, file in wanted.items():
        try:
            found = fetch(file.url, Path(file.path), file.sha256)
        except LGMError as error:
            failed.append(f"{error}\n    or get it by other means, and put it at {file.path}")
            continue
        print(f"{name}: {file.path}, sha256 {found}, {_verdict(file, found)[1]}", flush=True)
    if failed:
        raise MissingAssetError("\n".join(failed))


def _agreed(question: str) -> bool:
    """Whether somebody at a terminal says yes. Raises: MissingAssetError if nobody can be asked."""
    if not sys.stdin.isatty():
        raise MissingAssetError("nobody is here to be asked; add --yes to download these files")
    try:
        return input(f"{question}, under these licences? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def check(names: Sequence[str]) -> None:
    """Hash what is there, and say what the sums say. Raises: MissingAssetError if one differs."""
    wrong = []
    for name in names:
        file = PUBLISHED[name]
        if not Path(file.path).is_file():
            print(f"{name}: not there")
            continue
        found = file_hash(file.path)
        good, verdict = _verdict(file, found)
        print(f"{name}: {file.path}, sha256 {found}, {verdict}")
        if not good:
            wrong.append(f"{file.path}: {verdict}; delete it, and `{COMMAND} --fetch {name}`")
    if wrong:
        raise MissingAssetError("\n".join(wrong))


def _verdict(file: PublishedFile, found: str) -> tuple[bool, str]:
    if file.sha256 is None:
        return True, "not compared: no sum is published"
    if not found.startswith(file.sha256):
        return False, f"which is NOT the published one: {file.sum_text}"
    digits = "" if len(file.sha256) == 64 else f" in its first {len(file.sha256)} digits"
    return True, f"as published{digits} ({file.sum_from})"


if __name__ == "__main__":
    exit_on_user_error(main)
