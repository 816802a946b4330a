"""The `data` section of a run: where samples come from, and how patiently. Free of torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pydantic import ConfigDict

from lgm_scale.storage.clients import is_remote
from lgm_scale.storage.transfer import Patience

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1)
"""For every section of a configuration: an unknown key is an error, a string is no number, a number
is finite, and no text is empty."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One MDS folder of images (tokenizer) or latents (generator)."""

    __pydantic_config__ = STRICT
    path: str
    """A folder, or object storage: `s3://bucket/folder`, `gs://...`, whatever streaming reads."""
    cache: str | None = None
    """Local folder for what comes from object storage; needed there, and only there."""
    proportion: float | None = None
    """Share of the epoch, relative to the other sources; null for all: every sample once."""
    classes: tuple[str, ...] | None = None
    """Only these classes, in this order; null for all."""
    rename: dict[str, str] = field(default_factory=dict)
    """Class name -> the name it counts as. Classes of one name are one class."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run trains on: one source (`path`), or several (`mixture`)."""

    __pydantic_config__ = STRICT
    path: str | None = None
    """The one source; this and the next three are as in `mixture`."""
    cache: str | None = None
    """As in `mixture`."""
    classes: tuple[str, ...] | None = None
    """As in `mixture`."""
    rename: dict[str, str] = field(default_factory=dict)
    """As in `mixture`."""
    mixture: tuple[SourceConfig, ...] = ()
    """Several sources in place of `path`."""
    num_samples: int | None = None
    """How many samples an epoch must have; data of another size are refused."""
    num_workers: int = 2
    """Processes per rank that read and decode; 0: the rank itself."""
    cache_limit: str | None = None
    """Limit of all caches of a node together, such as `200gb`; null for no limit."""
    predownload: int | None = None
    """Samples that each worker fetches ahead; null: 8 batches."""
    timeout: float = 30.0
    """Seconds without a byte after which a request to object storage is given up and repeated."""
    retry_seconds: float = 300.0
    """Seconds for which a file that cannot be had is asked for again before the run stops."""

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """Every source, the plain form included."""
        if self.path is None:
            return self.mixture
        one = SourceConfig(
            path=self.path, cache=self.cache, classes=self.classes, rename=self.rename
        )
        return (one, *self.mixture)

    @property
    def patience(self) -> Patience:
        """How long to try."""
        return Patience(self.timeout, self.retry_seconds)


def as_sources(
    data: str | os.PathLike[str] | Sequence[SourceConfig],
) -> tuple[SourceConfig, ...]:
    """Sources as they are; a path is one."""
    if isinstance(data, (str, os.PathLike)):
        return (SourceConfig(path=os.fspath(data)),)
    return tuple(data)


def broken_data_rules(data: DataConfig) -> Iterator[str]:
    """Rules between the keys of the section, as lines `key: value; rule; fix`."""
    yield from _plain_or_mixture(data)
    named = [(f"data.mixture[{i}]", source) for i, source in enumerate(data.mixture)]
    if data.path is not None:
        named.insert(0, ("data", data.sources[0]))
    for name, source in named:
        yield from broken_source(source, name)
    yield from _unique([(name, source.cache or source.path) for name, source in named])
    positive = {"timeout": data.timeout, "retry_seconds": data.retry_seconds}
    for key in ("predownload", "num_samples"):
        if getattr(data, key) is not None:
            positive[key] = getattr(data, key)
    for key, value in positive.items():
        if value <= 0:
            yield f"data.{key}: {value} must be above 0"
    if data.cache_limit is not None and _num_bytes(data.cache_limit) is None:
        yield f"data.cache_limit: {data.cache_limit!r} is no size; write it as 200gb"


def _plain_or_mixture(data: DataConfig) -> Iterator[str]:
    if data.path is None and not data.mixture:
        yield "data.path: missing; name an MDS folder, or list several under data.mixture"
    if data.path is not None and data.mixture:
        yield "data.mixture: has no place beside data.path; make the path an entry of the mixture"
    if data.path is None:
        for key in ("cache", "classes", "rename"):
            if getattr(data, key):
                yield f"data.{key}: has no effect without data.path; set it in data.mixture"
    given = [source.proportion is not None for source in data.mixture]
    if any(given) and not all(given):
        yield "data.mixture: some sources have a proportion and some not; give one to all or none"


def broken_source(source: SourceConfig, name: str = "data") -> Iterator[str]:
    """Rules of one source, whose keys are those of `name`."""
    if is_remote(source.path) and source.cache is None:
        yield (
            f"{name}.cache: missing; path {source.path} is object storage, name a local folder "
            "for its shards"
        )
    if not is_remote(source.path) and source.cache is not None:
        yield f"{name}.cache: has no effect, path {source.path} is local; remove it"
    if source.proportion is not None and source.proportion <= 0:
        yield f"{name}.proportion: {source.proportion} must be above 0"
    if source.classes is not None and len(set(source.classes)) != len(source.classes):
        twice = sorted({c for c in source.classes if source.classes.count(c) > 1})
        yield f"{name}.classes: {', '.join(twice)} twice; name each class once"
    if source.classes is not None and not source.classes:
        yield f"{name}.classes: empty; name at least one class, or null for all"


def _unique(named: list[tuple[str, str]]) -> Iterator[str]:
    seen: dict[str, str] = {}
    for name, folder in named:
        if folder in seen:
            yield f"{name}: {folder} is the folder of {seen[folder]}, too; each needs its own"
        seen[folder] = name


def _num_bytes(text: str) -> float | None:
    """`200gb` -> 200 * 2^30; None if it is no size."""
    lower = text.lower().strip()
    for power, unit in enumerate(("kb", "mb", "gb", "tb", "pb"), start=1):
        if lower.endswith(unit):
            try:
                value = float(lower[: -len(unit)]) * 1024**power
            except ValueError:
                return None
            return value if value > 0 else None
    return float(lower) if lower.isdigit() and int(lower) > 0 else None
