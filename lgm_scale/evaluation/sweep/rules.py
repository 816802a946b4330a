"""Rules of a sweep: its keys alone, and against the files it names. Free of torch.

`load_sweep` is the door: every problem comes in one ConfigError, before a network is built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lgm_scale.bundle import bundle_folder, check_kind, read_info
from lgm_scale.config.loading import check_config, read_yaml
from lgm_scale.data.fashion_mnist import CLASSES, IMAGE_SIZE
from lgm_scale.data.manifest import Manifest, read_manifest
from lgm_scale.errors import CheckpointError, ConfigError, LGMError
from lgm_scale.evaluation.features.files import REFERENCE, weights_of
from lgm_scale.evaluation.sweep.config import (
    METRIC_KEYS,
    Cell,
    SweepConfig,
    combinations,
    with_lists,
)
from lgm_scale.families.generator import (
    GeneratorFacts,
    GeneratorFamily,
    generator_families,
    solver_problems,
)
from lgm_scale.published import COMMAND, PUBLISHED, missing_lines
from lgm_scale.sampling.config import SamplerConfig

_COMMANDS = "lgm_scale.evaluation.commands"


def load_sweep(path: str, overrides: list[str]) -> SweepConfig:
    """Read and validate a sweep. Raises: ConfigError with every problem."""
    values = read_yaml(path, overrides)
    if "task" in values and "cells" not in values:
        raise ConfigError(
            f"config: {path} configures a training (task: {values['task']}), and a sweep is "
            "needed; give one such as yamls/eval_sweep.yaml, with bundle=... of the run"
        )
    try:
        defaults = _family(_read_generator_info(values.get("bundle", ""))).sampler_defaults
    except (CheckpointError, TypeError):
        defaults = {}  # what is wrong with the bundle, the rules will tell
    return check_sweep(values, path, broken_rules, defaults)


def check_sweep(
    values: dict[str, Any],
    source: str,
    rules: Callable[[SweepConfig], list[str]],
    defaults: Mapping[str, Any],
) -> SweepConfig:
    """Type-check plain values, and hear the rules.

    `source` is for messages; `defaults` are those that the family of generators has for `sampler`.

    Raises: ConfigError with every problem.
    """
    given = values.get("sampler", {})
    if isinstance(given, dict):
        values = values | {"sampler": {**defaults, **given}}
    return check_config(with_lists(values), SweepConfig, rules, source)


def _read_generator_info(folder: str) -> dict[str, Any]:
    """bundle.json without its weights; those are checked when they are loaded.

    Raises: CheckpointError if it is no generator bundle.
    """
    info = read_info(bundle_folder(folder))
    check_kind(info, folder, *generator_families())
    return info


def _family(info: dict[str, Any]) -> GeneratorFamily:
    return generator_families()[info["kind"]]


def broken_rules(
    config: SweepConfig, info: dict[str, Any] | None = None, made: Sequence[str] = ()
) -> list[str]:
    """Every rule that the configuration breaks, alone and against the files it names.

    Args:
        config: The sweep.
        info: bundle.json, where the generator is not in a bundle yet.
        made: Keys of inputs that are not there yet, and of which nothing can be said. Without the
            bundle that is also the cells, whose defaults are those of its family.
    """
    problems = [*_numbers(config), *_files(config, made), *_search(config), *_metrics(config)]
    facts: GeneratorFacts | None = None
    classes: list[str] = []
    if "bundle" not in made:
        cells, wrong = _cells(config)
        problems += [*wrong, *_without_effect(cells)]
        try:
            info = info or _read_generator_info(config.bundle)
            folder = str(bundle_folder(config.bundle))
            facts, classes = _family(info).facts(info, folder), list(info["classes"])
            pairs = [(cell.num_tokens, cell.sampler) for cell in cells]
            problems += _family(info).length_problems(info, folder, pairs)
            problems += solver_problems(info, [cell.sampler for cell in cells], "cells")
            problems += [*facts.problems, *_fashion(config, facts, classes)]
            if len(classes) != facts.num_classes:
                problems.append(
                    f"bundle: {config.bundle} names {len(classes)} classes and its generator has "
                    f"{facts.num_classes}; export the bundle again"
                )
        except (LGMError, KeyError, TypeError) as error:
            problems.append(f"bundle: {_one_line(error)}")
    if config.images is not None and "images" not in made:
        try:
            problems += _images(config, read_manifest(config.images, "images"), facts, classes)
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


def _cells(config: SweepConfig) -> tuple[list[Cell], list[str]]:
    """Cells that make sense, and what is wrong with the others."""
    cells: list[Cell] = []
    problems: dict[str, None] = {}  # each is told once, in order
    for num_tokens, settings in combinations(config):
        try:
            cell = Cell(num_tokens, SamplerConfig(**settings))
            cell.sampler.length_at(0.0, num_tokens)
            cell.sampler.check_guidance(num_tokens)
            cells.append(cell)
        except ConfigError as error:
            problems |= {f"cells: {problem}": None for problem in error.problems}
    if not cells and not problems:
        problems[
            "cells: is empty; list entries such as {num_tokens: 32, cfg_scale: [1.0, 1.5]}"
        ] = None
    for cell, times in Counter(cells).items():
        if times > 1:
            problems[f"cells: {cell.label} occurs {times} times; name each cell once"] = None
    return cells, list(problems)


def _metrics(config: SweepConfig) -> Iterator[str]:
    """Metrics that are asked for by name, and that no file of this sweep can give."""
    nothing = not (config.inception or config.dinov2 or config.num_components)
    if nothing or config.metrics == METRIC_KEYS:  # told already; whatever there is
        return
    others = {"fd_dinov2": "dinov2", "pixel_frechet": "num_components"}
    for metric in config.metrics:
        key = others.get(metric, "inception")
        if not getattr(config, key):
            yield (
                f"metrics: {metric} is asked for and needs {key}, which is not given; set {key} "
                f"(`python -m {_COMMANDS}.preflight` says what it is), or leave {metric} out"
            )


def _without_effect(cells: Sequence[Cell]) -> Iterator[str]:
    """Lengths of the weak branch that are above that of every cell."""
    longest = max((cell.num_tokens for cell in cells), default=0)
    weak = {cell.sampler.uncond_num_tokens or 0 for cell in cells}
    for length in sorted(length for length in weak if length > longest > 0):
        yield (
            f"cells: uncond_num_tokens {length} has no effect where no cell has more than "
            f"{longest} tokens; name fewer, or leave it out"
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
    if search.max_is is not None and search.max_is <= 0:
        yield f"search.max_is: {search.max_is} must be above 0; null: no score ends a line"
    if search.margin < 0:
        yield f"search.margin: {search.margin} must be 0 or more"
    if search.metric not in config.metrics:
        yield f"search.metric: {search.metric} is not among `metrics`; add it there"


def _files(config: SweepConfig, made: Sequence[str]) -> Iterator[str]:
    if Path(config.out).exists() and not Path(config.out).is_dir():
        yield f"out: {config.out} is a file; choose a folder"
    hints = {
        "metrics_log": "give the metrics.jsonl of the generator's training, or leave the key out",
        "reference": f"make one with `python -m {_COMMANDS}.reference SOURCE --out "
        f"{config.reference}{_features(config)}`, where SOURCE is "
        f"{PUBLISHED[REFERENCE[0]].path} (`{COMMAND} --fetch {REFERENCE[0]}`) or images of yours; "
        "or leave the key out",
    }
    for key, hint in hints.items():
        value = getattr(config, key)
        if value is not None and key not in made and not Path(value).is_file():
            yield f"{key}: {value} is not a file; {hint}"
    for line in missing_lines(weights_of(vars(config))):
        yield f"{line}; or leave the key out, and its metrics are off"
    judged = any(map(_is_fashion, config.metrics))
    if not (config.inception or config.dinov2 or config.num_components or judged):
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


def _features(config: SweepConfig) -> str:
    """Options of the command `reference` for the features that this sweep compares."""
    given = {"inception": config.inception, "dinov2": config.dinov2}
    words = [f" --{name} {path}" for name, path in given.items() if path]
    return "".join(words) + " --fashion-mnist" * any(map(_is_fashion, config.metrics))


def _is_fashion(metric: str) -> bool:
    return metric.startswith("fashion_")


def _fashion(config: SweepConfig, facts: GeneratorFacts, classes: list[str]) -> Iterator[str]:
    """Fashion-MNIST's classifier knows its own images and classes alone."""
    named = next(filter(_is_fashion, config.metrics), None)
    if named and (facts.image_size, *classes) != (IMAGE_SIZE, *CLASSES):
        yield (
            f"metrics: {named} is for generators of Fashion-MNIST, {IMAGE_SIZE} pixels and the "
            f"classes {', '.join(CLASSES)}; {config.bundle} makes {facts.image_size} pixels of "
            f"{', '.join(classes[:3])}...: leave the metrics of fashion_ out"
        )


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


def _images(
    config: SweepConfig, manifest: Manifest, facts: GeneratorFacts | None, classes: list[str]
) -> Iterator[str]:
    assert config.images is not None
    if facts is not None:
        yield from wrong_image_size(config.images, manifest, facts.image_size)
        yield from _other_classes(config.images, manifest, classes)
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
