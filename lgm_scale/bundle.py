"""The folder of a bundle, whatever is in it: written aside, described in bundle.json, hashed.

Free of torch: what a bundle says about itself can be read before the slow imports.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from lgm_scale.config.loading import load_config
from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.base import families, generator_families
from lgm_scale.sampling.config import SamplerConfig
from lgm_scale.storage.files import file_hash, folder_aside, replace_folder, write_whole

__all__ = [
    "INFO_NAME",
    "check_kind",
    "finish_bundle",
    "model_config",
    "read_bundle",
    "read_info",
    "set_sampling_defaults",
    "start_bundle",
    "write_info",
]

FORMAT_VERSION = 1
INFO_NAME = "bundle.json"


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
        return load_config(info["models"][name], schema)
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
