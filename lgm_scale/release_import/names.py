"""From a release's names of weights and classes to ours; what became of every key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.storage.files import file_hash

_MAX_PROBLEMS = 8


class Renaming:
    """From a release's names of weights to ours, and back.

    Args:
        parts: Parts of the release's names -> ours; they are replaced in this order, both ways.
    """

    def __init__(self, parts: Mapping[str, str]) -> None:
        self.parts = parts

    def __call__(self, name: str) -> str:
        """Our name of a weight, given the release's."""
        for theirs, ours in self.parts.items():
            name = name.replace(theirs, ours)
        return name

    def theirs(self, name: str) -> str:
        """The release's name of a weight, given ours."""
        for theirs, ours in self.parts.items():
            name = name.replace(ours, theirs)
        return name


@dataclass(frozen=True)
class KeyReport:
    """What became of every key of a checkpoint.

    Args:
        taken: The release's name -> ours.
        ignored: The release's name -> why it was left out.
        renaming: What gave the names; tells what a missing key is called in the file.
    """

    taken: dict[str, str]
    ignored: dict[str, str]
    renaming: Renaming

    def counts(self) -> dict[str, int]:
        """Keys used under their own name, renamed, ignored."""
        used = sum(theirs == ours for theirs, ours in self.taken.items())
        return {"used": used, "renamed": len(self.taken) - used, "ignored": len(self.ignored)}

    def lines(self) -> Iterator[str]:
        """One line per key, then the counts."""
        for theirs, ours in self.taken.items():
            yield f"used     {theirs}" if theirs == ours else f"renamed  {theirs} -> {ours}"
        for theirs, reason in self.ignored.items():
            yield f"ignored  {theirs}: {reason}"
        counts = self.counts()
        parts = ", ".join(f"{count} {what}" for what, count in counts.items())
        yield f"{sum(counts.values())} keys: {parts}"
        for reason, count in Counter(self.ignored.values()).items():
            yield f"  {count} ignored: {reason}"


def translate(names: Iterable[str], renaming: Renaming, ignored: Mapping[str, str]) -> KeyReport:
    """Sort the keys into those to take and those to leave out; `fit` judges the former."""
    taken, left_out = {}, {}
    for name in names:
        reasons = [why for prefix, why in ignored.items() if name.startswith(prefix)]
        if reasons:
            left_out[name] = reasons[0]
        else:
            taken[name] = renaming(name)
    return KeyReport(taken, left_out, renaming)


def fit(
    state: Mapping[str, Tensor],
    report: KeyReport,
    expected: Mapping[str, Tensor],
    path: str | Path,
) -> dict[str, Tensor]:
    """The weights under our names, float32, if every key fits.

    Args:
        state: Weights under the release's names.
        report: What `translate` made of the state's names.
        expected: State of the network to fill; its shapes count (it may be on the meta device).
        path: For messages.

    Raises: CheckpointError naming all keys that are unknown, missing, twice there, of another
    shape, or not finite.
    """
    # Two of their names may become one of ours: found here, and not by whichever comes last.
    sources: dict[str, list[str]] = {}
    for theirs, ours in report.taken.items():
        sources.setdefault(ours, []).append(theirs)
    problems = [
        f"key {theirs}: unknown; this importer has no place for it"
        for theirs, ours in report.taken.items()
        if ours not in expected
    ]
    weights = {}
    for ours, target in expected.items():
        names = sources.get(ours, [])
        if len(names) != 1:
            found = f"given {len(names)} times ({', '.join(names)})" if names else "missing"
            key = f"{report.renaming.theirs(ours)} (here {ours})"
            problems.append(f"key {key}: {found}; expected shape {list(target.shape)}")
            continue
        value = state[names[0]]
        if value.shape != target.shape:
            problems.append(
                f"key {names[0]}: shape {list(value.shape)}, expected {list(target.shape)}"
            )
        elif not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            problems.append(f"key {names[0]}: not finite floating-point numbers ({value.dtype})")
        else:
            weights[ours] = value.to(torch.float32, copy=True)  # keys may share memory
    if problems:
        raise CheckpointError("\n".join([f"{path} does not fit:", *_shortened(problems)]))
    return weights


def _shortened(problems: list[str]) -> list[str]:
    """Lines of the first problems, and how many more there are."""
    lines = [f"  - {problem}" for problem in problems[:_MAX_PROBLEMS]]
    rest = len(problems) - len(lines)
    return [*lines, f"  - and {rest} more"] if rest else lines


def provenance(source: str | Path, report: KeyReport, release: str = "LGM") -> dict[str, Any]:
    """What a bundle says about the file that it came from."""
    return {
        "release": release,
        "file": Path(source).name,
        "sha256": file_hash(source),
        "keys": report.counts(),
    }


def class_names(source: str | None, num_classes: int) -> tuple[str, ...]:
    """Names of the classes, in the order of their indices.

    Args:
        source: A text file with one name per line; 'imagenet': the 1000 names that torchvision
            ships; None: the indices.
        num_classes: How many there must be.

    Raises: ConfigError.
    """
    if source is None:
        return tuple(str(index) for index in range(num_classes))
    if source == "imagenet":
        from torchvision.models import ResNet50_Weights

        names = list(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
    elif Path(source).is_file():
        try:
            lines = Path(source).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ConfigError(f"--classes: {source} is no text file ({error})") from error
        names = [line.strip() for line in lines if line.strip()]
    else:
        raise ConfigError(f"--classes: {source} is neither a text file nor 'imagenet'")
    if len(names) != num_classes:
        raise ConfigError(
            f"--classes: {source} has {len(names)} names, the generator {num_classes} classes"
        )
    return tuple(names)
