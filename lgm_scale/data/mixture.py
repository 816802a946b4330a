"""What an epoch takes from each source: which classes under which labels, and how often.

Everything goes by the names of classes. The classes of a mixture are the union of those of its
sources, in order of appearance; classes of one name, renamed or not, are one class. No torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.manifest import Manifest, read_labels
from lgm_scale.errors import DataError


@dataclass(frozen=True)
class View:
    """One source as a run sees it.

    Args:
        labels: [classes of the source] int64; the run's label of each, -1 if it is left out.
        kept: [num_kept] int64; ids of the samples that are used, ascending. None for all.
        num_kept: How many samples are used.
    """

    labels: NDArray[np.int64]
    kept: NDArray[np.int64] | None
    num_kept: int


def check_one_maker(
    sources: Sequence[SourceConfig], manifests: Sequence[Manifest], key: str, what: str
) -> None:
    """Raise DataError if the latents of a mixture were made in several ways.

    `key` is the entry of the manifests' `extra` that must be the same in all, `what` its name.
    """
    makers = [str(manifest.extra.get(key)) for manifest in manifests]
    for source, maker in zip(sources, makers, strict=True):
        if maker != makers[0]:
            raise DataError(
                f"data.mixture: {sources[0].path} has latents of {what} {makers[0][:12]} and "
                f"{source.path} of {maker[:12]}; latents of two {what}s do not mix. Encode one of "
                "them again"
            )


def view_sources(
    sources: Sequence[SourceConfig], folders: Sequence[Path], manifests: Sequence[Manifest]
) -> tuple[list[View], Manifest]:
    """Combine sources by the names of their classes.

    `folders` are where the files of each source lie on this machine.

    Returns: A view of each source, and the manifest of all of them together.
    Raises: DataError for class names that a source does not have.
    """
    classes: dict[str, int] = {}
    counts: list[int] = []
    views = []
    for source, folder, manifest in zip(sources, folders, manifests, strict=True):
        chosen = _chosen(source, manifest)
        labels = np.full(manifest.num_classes, -1, np.int64)
        for name in chosen:
            label = classes.setdefault(source.rename.get(name, name), len(classes))
            if label == len(counts):
                counts.append(0)
            own = manifest.classes.index(name)
            labels[own] = label
            counts[label] += manifest.class_counts[own]
        kept = None
        if len(chosen) < manifest.num_classes:
            kept = np.flatnonzero(labels[read_labels(folder, manifest)] >= 0)
        num_kept = manifest.num_samples if kept is None else len(kept)
        if num_kept == 0:
            raise DataError(f"{source.path} has no sample of {', '.join(chosen)}")
        views.append(View(labels, kept, num_kept))
    if len(sources) == 1 and tuple(classes) == manifests[0].classes:
        return views, manifests[0]
    sizes = {manifest.image_size for manifest in manifests}
    return views, replace(
        manifests[0],
        num_samples=sum(counts),
        classes=tuple(classes),
        class_counts=tuple(counts),
        image_size=sizes.pop() if len(sizes) == 1 else None,
        files={},
    )


def _chosen(source: SourceConfig, manifest: Manifest) -> tuple[str, ...]:
    """Names of the classes that are used, in the order of the configuration."""
    known = set(manifest.classes)
    chosen = manifest.classes if source.classes is None else source.classes
    for key, names in (("classes", chosen), ("rename", tuple(source.rename))):
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, manifest.classes, n=1)
                hint = f"did you mean {close[0]!r}?" if close else _some(manifest.classes)
                raise DataError(f"data: {key} names {name!r}, but {source.path} has none; {hint}")
    unused = [name for name in source.rename if name not in chosen]
    if unused:
        raise DataError(
            f"data: rename has {unused[0]!r} of {source.path}, which classes leaves out; drop it"
        )
    return chosen


def _some(classes: Sequence[str]) -> str:
    listed = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
    return f"its classes are {listed}"


def samples_per_source(sources: Sequence[SourceConfig], views: Sequence[View]) -> list[int]:
    """How many samples an epoch takes from each source.

    Without proportions an epoch takes every sample once. With them it keeps that length, and the
    shares are rounded by largest remainder.

    Raises: DataError for a proportion that is less than one sample.
    """
    sizes = [view.num_kept for view in views]
    if any(source.proportion is None for source in sources):
        return sizes
    shares = np.array([source.proportion for source in sources], np.float64)
    exact = shares / shares.sum() * sum(sizes)
    counts = np.floor(exact).astype(np.int64)
    rest = sum(sizes) - int(counts.sum())
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[:rest]] += 1
    empty = [source.path for source, count in zip(sources, counts, strict=True) if count == 0]
    if empty:
        raise DataError(
            f"data.mixture: the proportion of {empty[0]} is less than one sample of an epoch of "
            f"{sum(sizes):,}; raise it"
        )
    return counts.tolist()


def draw_passes(kept: NDArray[np.int64], count: int, key: Sequence[int]) -> list[NDArray[np.int64]]:
    """Passes over the samples of a source that have `count` samples together.

    Every sample appears floor or ceil of count / len(kept) times; which ones appear once more is
    drawn anew for every key. Each pass is ascending.
    """
    whole, rest = divmod(count, len(kept))
    passes = [kept] * whole
    if rest:
        chosen = np.random.default_rng(list(key)).choice(len(kept), rest, replace=False)
        passes.append(kept[np.sort(chosen)])
    return passes
