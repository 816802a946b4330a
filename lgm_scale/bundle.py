"""The folder of a bundle, whatever is in it: written aside, described in bundle.json, hashed.

To and from the model hub it travels as it is, its own files alone. Free of torch: what a bundle
says about itself can be read before the slow imports.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from lgm_scale.config.loading import load_config, without_removed_keys
from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.base import families
from lgm_scale.families.generator import generator_families
from lgm_scale.hub import download, is_hub_name, upload
from lgm_scale.sampling.config import SamplerConfig
from lgm_scale.storage.files import file_hash, folder_aside, replace_folder, write_whole

FORMAT_VERSION = 1
INFO_NAME = "bundle.json"
DEMO = Path(__file__).parent / "demo"
"""The generator that comes with the package, and that `demo` names."""
_SUFFIXES = (".safetensors", ".json")


def start_bundle(folder: str | Path) -> Path:
    """An empty folder aside, to write into. Raises: CheckpointError if `folder` is no bundle."""
    folder = Path(folder)
    if folder.exists() and not (folder / INFO_NAME).is_file() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} exists and is no bundle: choose another folder")
    return folder_aside(folder)


def finish_bundle(
    aside: Path,
    folder: str | Path,
    kind: str,
    models: dict[str, Any],
    classes: tuple[str, ...],
    training: dict[str, Any],
    adapters: dict[str, Any] | None = None,
) -> None:
    """Describe what lies aside, and put it in the folder's place."""
    found = sorted(path for path in aside.rglob("*") if path.is_file())
    info = {
        "format": "lgm_scale.bundle",
        "version": FORMAT_VERSION,
        "kind": kind,
        "models": models,
        "classes": list(classes),
        "files": {path.relative_to(aside).as_posix(): file_hash(path) for path in found},
        "training": training,
    } | ({"adapters": adapters} if adapters else {})
    write_info(aside, info)
    replace_folder(Path(folder), aside)


def write_info(folder: str | Path, info: dict[str, Any]) -> None:
    """Make or replace bundle.json, with the contents `info`."""
    write_whole(Path(folder) / INFO_NAME, json.dumps(info, indent=1) + "\n")


def read_info(folder: str | Path) -> dict[str, Any]:
    """Contents of bundle.json; the files are not looked at.

    Raises: CheckpointError if it is missing, damaged or of another format version.
    """
    path = Path(folder) / INFO_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is no bundle: it has no {INFO_NAME}; give the `bundle` folder of a run"
        )
    try:
        info = json.loads(path.read_text())
        version, _, files = info["version"], info["kind"], dict(info["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}; this release reads version {FORMAT_VERSION}"
        )
    for name in files:
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise CheckpointError(f"{path} is damaged: {name!r} is no file of the bundle")
    return info


def check_kind(info: dict[str, Any], folder: str | Path, *kinds: str) -> None:
    """Raise CheckpointError unless a bundle is of one of these kinds, or contains one."""
    found, known = info["kind"], families()
    if found in kinds or (found in known and set(known[found].contains) & set(kinds)):
        return
    text = f"{folder} is a {found} bundle; a {' or '.join(kinds)} bundle is needed here"
    generators = generator_families()
    if found in generators and any(kind in generators for kind in kinds):
        titles = (f"{kind}: {family.title}" for kind, family in generators.items())
        text += f" ({'; '.join(titles)})"
    raise CheckpointError(text)


def read_bundle(folder: str | Path, *kinds: str) -> dict[str, Any]:
    """Read bundle.json, and check format, kind (one of `kinds`) and every file's hash.

    Raises: CheckpointError naming the folder, what was found and what is needed.
    """
    info = read_info(folder)
    check_kind(info, folder, *kinds)
    for name, expected in info["files"].items():
        file = Path(folder) / name
        if not file.is_file() or file_hash(file) != expected:
            raise CheckpointError(
                f"{file} is missing or differs from its hash in {INFO_NAME}: copy the bundle again"
            )
    return info


def model_config(info: dict[str, Any], name: str, schema: type, folder: str | Path) -> Any:
    """One of a bundle's configurations, typed. Raises: CheckpointError."""
    try:
        return load_config(without_removed_keys(info["models"][name], schema), schema)
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: its {name} configuration is damaged: {error}") from error


def set_sampling_defaults(folder: str | Path, defaults: dict[int, dict[str, Any]]) -> None:
    """Store what a pipeline samples with at each K when a call names no settings.

    `defaults` are K -> fields of `SamplerConfig`, such as a sweep found best. Other K keep theirs.

    Raises: ConfigError for settings without meaning; CheckpointError for no generator bundle.
    """
    info = read_bundle(folder, *generator_families())
    for num_tokens, settings in defaults.items():
        unknown = sorted(settings.keys() - SamplerConfig.__dataclass_fields__.keys())
        if unknown:
            raise ConfigError(f"sampling defaults at K = {num_tokens}: no setting {unknown[0]!r}")
        SamplerConfig(**settings)
    stored = info.get("sampling", {}) | {str(k): settings for k, settings in defaults.items()}
    write_info(folder, info | {"sampling": stored})


def bundle_folder(name: str | Path) -> Path:
    """The folder of a bundle on this machine.

    `demo`, if no folder here is named so, is the package's own generator.
    """
    return DEMO if str(name) == "demo" and not Path(name).exists() else Path(name)


# --- the model hub --------------------------------------------------------------------------------


def local_bundle(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a bundle; one that is named owner/name, as no folder here, is downloaded.

    Only bundle.json is, and the safetensors and JSON files that it lists; who loads them checks
    every hash. `demo`, if no folder here is named so, is the package's own generator.
    `revision` is a branch, tag or commit of the repository.

    Raises: CheckpointError.
    """
    if not is_hub_name(name):
        if revision is not None:
            raise CheckpointError(
                f"revision: {revision!r} goes with a repository of the hub, and {name} is a path; "
                "leave it out"
            )
        return bundle_folder(name)
    folder = download(str(name), [INFO_NAME], revision)
    files = list(read_info(folder)["files"])
    _refuse_foreign(files, name)
    return download(str(name), files, folder.name)


def push_to_hub(
    folder: str | Path,
    name: str,
    card: str,
    pictures: dict[str, Path] | None = None,
    private: bool = False,
) -> str:
    """Publish a bundle on the model hub as `name` (owner/name); return its address.

    One commit: bundle.json, the files that it lists, `card` as README.md (`publish.model_card`
    makes one), and `pictures`, which the card shows, by their names in it.

    Raises: CheckpointError if the bundle is damaged, or the hub cannot be had.
    """
    folder, info = Path(folder), read_bundle(folder, *families())
    _refuse_foreign(info["files"], folder)
    own = {file: folder / file for file in (INFO_NAME, *info["files"])}
    title = f"Publish a {info['kind']} bundle"
    return upload(name, {**own, **(pictures or {}), "README.md": card}, title, private)


def _refuse_foreign(files: Iterable[str], where: str | Path) -> None:
    foreign = [file for file in files if not file.endswith(_SUFFIXES)]
    if foreign:
        raise CheckpointError(
            f"{where}: only {' and '.join(_SUFFIXES)} files travel, and its {INFO_NAME} lists "
            f"{foreign[0]!r}; it is no bundle that this project wrote"
        )
