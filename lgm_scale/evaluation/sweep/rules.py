"""Rules of a sweep: its keys alone, and against the files it names. Free of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lgm_scale.data.manifest import Manifest, read_manifest
from lgm_scale.errors import ConfigError, LGMError
from lgm_scale.evaluation.sweep.config import Cell, SweepConfig, expand
from lgm_scale.evaluation.sweep.families import Family, family_of, read_generator_info

__all__ = ["broken_rules", "repeated_lengths", "wrong_image_size"]


def broken_rules(config: SweepConfig, info: dict[str, Any] | None = None) -> list[str]:
    """Every rule that the configuration breaks, alone and against the files it names.

    Args:
        config: Of the sweep.
        info: Contents of bundle.json, where the generator is not in a bundle yet.
    """
    problems = [*_numbers(config), *_cells(config), *_files(config), *_search(config)]
    family: Family | None = None
    try:
        family = family_of(info or read_generator_info(config.bundle), config.bundle)
        problems += family.problems(expand(config))
    except (LGMError, KeyError, TypeError) as error:
        problems.append(f"bundle: {_one_line(error)}")
    if config.images is not None:
        try:
            problems += _images(config, read_manifest(config.images, "images"), family)
        except LGMError as error:
            problems.append(f"images: {_one_line(error)}")
    return problems


def _numbers(config: SweepConfig) -> Iterator[str]:
    for key in ("batch_size", "chunk_size"):
        if getattr(config, key) < 1:
            yield f"{key}: {getattr(config, key)} must be 1 or more"
    if config.num_components < 0:
        yield f"num_components: {config.num_components} must be 0 (off) or more"
    if config.num_images < 2:
        yield f"num_images: {config.num_images} have no covariance; needs 2 or more"
    elif config.num_images <= config.num_components:
        yield (
            f"num_images: {config.num_images} images cannot fill {config.num_components} "
            "dimensions, and the distance would be wrong; make it larger than num_components, or "
            "lower num_components"
        )
    if config.part is not None and not _is_part(config.part):
        yield f"part: {config.part!r} is not i/n with 0 <= i < n; the first of eight is 0/8"


def _is_part(text: str) -> bool:
    index, _, count = text.partition("/")
    return index.isdigit() and count.isdigit() and int(index) < int(count)


def _cells(config: SweepConfig) -> Iterator[str]:
    cells = expand(config)
    if not cells:
        yield "cells: is empty; list entries such as {num_tokens: 32, cfg_scale: [1.0, 1.5]}"
    for cell, times in Counter(cells).items():
        if times > 1:
            yield f"cells: {cell.label} occurs {times} times; name each cell once"
    told: set[str] = set()
    for cell in cells:
        for problem in _sampler(cell):
            if problem not in told:
                told.add(problem)
                yield problem


def _sampler(cell: Cell) -> Iterator[str]:
    lo, hi = cell.cfg_interval
    if cell.num_steps < 2:
        yield f"cells: num_steps {cell.num_steps} grid points; needs 2 or more"
    if not cell.cfg_scale >= 1:
        yield f"cells: cfg_scale {cell.cfg_scale} is below 1; 1 turns guidance off"
    if not 0 <= lo <= hi <= 1:
        yield f"cells: cfg_interval [{lo}, {hi}] must be ordered and inside [0, 1]"
    if not cell.timestep_shift > 0:
        yield f"cells: timestep_shift {cell.timestep_shift} must be above 0"
    if cell.uncond_num_tokens is not None and cell.uncond_num_tokens < 1:
        yield f"cells: uncond_num_tokens {cell.uncond_num_tokens} must be 1 or more, or null"
    yield from _autoguidance(cell)
    if cell.length_schedule and cell.length_schedule[-1][1] != cell.num_tokens:
        yield (
            f"cells: length_schedule ends at {cell.length_schedule[-1][1]} tokens, and num_tokens "
            f"is {cell.num_tokens}; make them equal"
        )


def _autoguidance(cell: Cell) -> Iterator[str]:
    if cell.guidance != "autoguidance":
        return
    if cell.uncond_num_tokens is None:
        yield "cells: guidance autoguidance needs uncond_num_tokens, those of its weak branch"
    elif cell.uncond_num_tokens >= cell.num_tokens:
        yield (
            f"cells: uncond_num_tokens {cell.uncond_num_tokens}; autoguidance at {cell.num_tokens} "
            "tokens needs fewer in its weak branch"
        )


def _search(config: SweepConfig) -> Iterator[str]:
    search = config.search
    if search is None:
        return
    if not 2 <= search.num_images <= config.num_images:
        yield (
            f"search.num_images: {search.num_images} must be between 2 and num_images "
            f"({config.num_images})"
        )
    if search.patience < 1:
        yield f"search.patience: {search.patience} must be 1 or more"
    if search.margin < 0:
        yield f"search.margin: {search.margin} must be 0 or more"
    if search.metric not in config.metrics:
        yield f"search.metric: {search.metric} is not among `metrics`; add it there"


def _files(config: SweepConfig) -> Iterator[str]:
    if Path(config.out).exists() and not Path(config.out).is_dir():
        yield f"out: {config.out} is a file; choose a folder"
    hints = {
        "metrics_log": "give the metrics.jsonl of the generator's training, or leave the key out",
        "reference": "make one with `python -m eval.reference`, or leave the key out",
        **dict.fromkeys(
            ("inception", "dinov2", "vgg16"),
            "`python -m eval.preflight` says where it is to be had; or leave the key out, and its "
            "metrics are off",
        ),
    }
    for key, hint in hints.items():
        value = getattr(config, key)
        if value is not None and not Path(value).is_file():
            yield f"{key}: {value} is not a file; {hint}"
    if not (config.inception or config.dinov2 or config.num_components):
        yield (
            "inception: nothing can be measured: give Inception's weights here, DINOv2's as "
            "`dinov2`, or set num_components for a distance of pixels"
        )
    if config.images is None:
        if config.num_components:
            yield "images: missing, and num_components needs validation images; or set it to 0"
        if config.reference is None:
            yield "reference: missing, and so is `images`; samples have nothing to be compared with"
        if config.vgg16:
            yield "images: missing, and vgg16 measures reconstructions of them; or drop vgg16"


def repeated_lengths(lengths: Sequence[int]) -> Iterator[str]:
    """The problem of K that occur twice."""
    repeated = sorted({k for k in lengths if lengths.count(k) > 1})
    if repeated:
        yield f"lengths {repeated} occur more than once; name each K once"


def wrong_image_size(folder: str, manifest: Manifest, size: int) -> Iterator[str]:
    """The problem of images that are not of the size that a bundle makes."""
    if manifest.image_size != size:
        found = f"{manifest.image_size} pixels" if manifest.image_size else "several sizes"
        yield (
            f"images: {folder} holds images of {found}, the bundle makes {size}; convert them "
            f"with --image-size {size}"
        )


def _images(config: SweepConfig, manifest: Manifest, family: Family | None) -> Iterator[str]:
    assert config.images is not None
    if family is not None:
        yield from wrong_image_size(config.images, manifest, family.image_size)
        yield from _other_classes(config.images, manifest, family.classes)
    if manifest.num_samples < 2:
        yield f"images: {config.images} holds {manifest.num_samples} image; needs 2 or more"
    elif manifest.num_samples <= config.num_components:
        yield (
            f"num_components: {config.num_components} components cannot be fitted to "
            f"{manifest.num_samples} images; choose fewer than there are images"
        )


def _other_classes(folder: str, manifest: Manifest, classes: list[str]) -> Iterator[str]:
    if list(manifest.classes) != classes:
        differing = sorted(set(classes) ^ set(manifest.classes))
        what = f"only one of them has {differing[:4]}" if differing else "their order differs"
        yield (
            f"images: {folder} has {manifest.num_classes} classes and the bundle "
            f"{len(classes)}, and they are not the same ({what}); take images of the same classes"
        )


def _one_line(error: Exception) -> str:
    """The message of an error as one line of a list."""
    if isinstance(error, ConfigError):
        return "; ".join(error.problems)
    if isinstance(error, LGMError):
        return str(error)
    return f"its bundle.json is damaged ({type(error).__name__}: {error})"
