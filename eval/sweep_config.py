"""Configuration of a sweep over token counts, and its rules. Free of torch.

Precedence: defaults here, then the YAML file, then `key=value` overrides. `load_sweep` reads,
type-checks and compares the configuration with the bundle and the images it names; every problem
comes in one ConfigError, before a network is built.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from lgm_scale.config import InvalidValues, load_config, read_yaml
from lgm_scale.data.manifest import Manifest, read_manifest
from lgm_scale.errors import ConfigError, LGMError

__all__ = [
    "SweepConfig",
    "broken_rules",
    "load_sweep",
    "outside_lengths",
    "repeated_lengths",
    "wrong_image_size",
]


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep: `num_images` samples at each K of `lengths`, compared with validation images."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    bundle: str
    """Generator bundle."""
    images: str
    """MDS folder of validation images, of the tokenizer's size and the generator's classes."""
    out: str
    """Folder of the report; finished lengths are kept below it."""
    lengths: tuple[int, ...]
    num_images: int
    """Samples per K; image i has class i mod num_classes."""
    seed: int = 0
    batch_size: int = 68
    num_steps: int = 25
    """Points of the time grid: 25 points are 24 Euler steps."""
    cfg_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.15, 1.0)
    cfg_rescale: Literal["none", "per_position"] = "per_position"
    timestep_shift: float = 0.2
    num_components: int = 48
    """Principal components of validation pixels in which distributions are compared."""
    metrics_log: str | None = None
    """metrics.jsonl of the generator's training, for its loss at each K."""
    commands: tuple[str, ...] = ()
    """Shown in the report: the commands that made all this."""


def load_sweep(path: str, overrides: list[str]) -> SweepConfig:
    """Read and validate a sweep. Raises: ConfigError with every problem."""
    values = read_yaml(path, overrides)
    problems: list[str] = []
    try:
        config = load_config(values, SweepConfig, path)
    except InvalidValues as error:
        problems, config = error.problems, error.rest
    if config is not None:
        told = {problem.split(":")[0] for problem in problems}
        found = broken_rules(config)
        problems += [problem for problem in found if problem.split(":")[0] not in told]
    if problems:
        raise ConfigError(problems, path)
    assert config is not None
    return config


def broken_rules(config: SweepConfig) -> list[str]:
    """Every rule that the configuration breaks, alone and against the files it names."""
    problems = [*_numbers(config), *_sampler(config)]
    models, classes = {}, None
    try:
        info = _read_info(config.bundle)
        models, classes = info["models"], list(info["classes"])
        problems += outside_lengths(config.lengths, models["tokenizer"])
    except (LGMError, KeyError, TypeError) as error:
        problems.append(f"bundle: {_one_line(error)}")
    try:
        manifest = read_manifest(config.images, "images")
        problems += _images(config, manifest, models.get("tokenizer", {}), classes)
    except LGMError as error:
        problems.append(f"images: {_one_line(error)}")
    if Path(config.out).exists() and not Path(config.out).is_dir():
        problems.append(f"out: {config.out} is a file; choose a folder")
    if config.metrics_log is not None and not Path(config.metrics_log).is_file():
        problems.append(
            f"metrics_log: {config.metrics_log} is not a file; give the metrics.jsonl of the "
            "generator's training, or leave the key out"
        )
    return problems


def _numbers(config: SweepConfig) -> Iterator[str]:
    for key in ("batch_size", "num_components"):
        if getattr(config, key) < 1:
            yield f"{key}: {getattr(config, key)} must be 1 or more"
    if config.num_images < 2:
        yield f"num_images: {config.num_images} have no covariance; needs 2 or more"
    elif config.num_images <= config.num_components:
        yield (
            f"num_images: {config.num_images} images cannot fill {config.num_components} "
            "dimensions, and the distance would be wrong; make it larger than num_components, or "
            "lower num_components"
        )
    if not config.lengths:
        yield "lengths: is empty; list the token counts to sweep, for example [8, 16, 32]"
    yield from repeated_lengths(config.lengths)


def _sampler(config: SweepConfig) -> Iterator[str]:
    lo, hi = config.cfg_interval
    if config.num_steps < 2:
        yield f"num_steps: {config.num_steps} grid points; needs 2 or more"
    if not config.cfg_scale >= 1:
        yield f"cfg_scale: {config.cfg_scale} is below 1; 1 turns guidance off"
    if not 0 <= lo <= hi <= 1:
        yield f"cfg_interval: [{lo}, {hi}] must be ordered and inside [0, 1]"
    if not config.timestep_shift > 0:
        yield f"timestep_shift: {config.timestep_shift} must be above 0"


def _read_info(folder: str) -> dict[str, Any]:
    """bundle.json without its weights; those are checked when they are loaded."""
    path = Path(folder) / "bundle.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} is no bundle: it has no bundle.json. Train a generator first, or give the "
            "`bundle` folder of its run"
        )
    try:
        info = json.loads(path.read_text())
        kind = info["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if kind != "generator":
        raise ConfigError(f"{folder} is a {kind} bundle; a generator bundle is needed here")
    return info


def outside_lengths(lengths: Sequence[int], tokenizer: dict[str, Any]) -> Iterator[str]:
    """The problem of K that the tokenizer's merge tree does not have."""
    low, high = tokenizer["num_codebooks"], tokenizer["num_base_tokens"]
    outside = [k for k in lengths if not low <= k <= high]
    if outside:
        yield (
            f"lengths: {outside} outside [{low}, {high}], the range of this bundle's merge tree "
            f"({low} blocks that never merge, {high} base tokens)"
        )


def repeated_lengths(lengths: Sequence[int]) -> Iterator[str]:
    """The problem of K that occur twice."""
    repeated = sorted({k for k in lengths if lengths.count(k) > 1})
    if repeated:
        yield f"lengths: {repeated} occur more than once; name each K once"


def wrong_image_size(folder: str, manifest: Manifest, tokenizer: dict[str, Any]) -> Iterator[str]:
    """The problem of images that the tokenizer does not take as they are."""
    size = tokenizer.get("image_size")
    if size is not None and manifest.image_size != size:
        found = f"{manifest.image_size} pixels" if manifest.image_size else "several sizes"
        yield (
            f"images: {folder} holds images of {found}, the bundle makes {size}; convert them "
            f"with --image-size {size}"
        )


def _images(
    config: SweepConfig, manifest: Manifest, tokenizer: dict[str, Any], classes: list[str] | None
) -> Iterator[str]:
    yield from wrong_image_size(config.images, manifest, tokenizer)
    if classes is not None and list(manifest.classes) != classes:
        differing = sorted(set(classes) ^ set(manifest.classes))
        what = f"only one of them has {differing[:4]}" if differing else "their order differs"
        yield (
            f"images: {config.images} has {manifest.num_classes} classes and the bundle "
            f"{len(classes)}, and they are not the same ({what}); take images of the same classes"
        )
    if manifest.num_samples < 2:
        yield f"images: {config.images} holds {manifest.num_samples} image; needs 2 or more"
    elif manifest.num_samples <= config.num_components:
        yield (
            f"num_components: {config.num_components} components cannot be fitted to "
            f"{manifest.num_samples} images; choose fewer than there are images"
        )


def _one_line(error: Exception) -> str:
    """The message of an error as one line of a list."""
    if isinstance(error, ConfigError):
        return "; ".join(error.problems)
    if isinstance(error, LGMError):
        return str(error)
    return f"its bundle.json is damaged ({type(error).__name__}: {error})"
