"""Configuration of a sweep. Free of torch.

Precedence: defaults here, then the YAML file, then `key=value` overrides. `rules.load_sweep` reads,
type-checks and compares the configuration with the files it names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from lgm_scale.config.schema import STRICT, required
from lgm_scale.sampling.config import Guidance, SamplerConfig, Solver

METRIC_KEYS = (
    "fid", "sfid", "is", "kid", "precision", "recall", "fd_dinov2", "pixel_frechet",
)  # fmt: skip


if TYPE_CHECKING:
    SamplerLists = SamplerConfig  # fields of the same names
else:
    _HINTS = get_type_hints(SamplerConfig)
    SamplerLists = make_dataclass(
        "SamplerLists",
        [
            (entry.name, tuple[_HINTS[entry.name], ...], field(default=(entry.default,)))
            for entry in fields(SamplerConfig)
        ],
        namespace={
            "__doc__": "Sampler settings, of which a list means every one of its values.",
            "__pydantic_config__": STRICT,
        },
        frozen=True,
        kw_only=True,
    )


@dataclass(frozen=True, kw_only=True)
class CellsConfig(SamplerLists):
    """One entry of `cells`: every combination of its values is a cell."""

    __pydantic_config__ = STRICT
    num_tokens: tuple[int, ...] = required([64])


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Find the guidance first, on few images; the best cell of each K is run on `num_images`.

    Scales rise; a line of scales stops where guidance has clearly gone too far.
    """

    __pydantic_config__ = STRICT
    num_images: int = 10_000
    """Samples per cell of the search."""
    metric: Literal["fid", "fd_dinov2", "pixel_frechet", "fashion_frechet"] = "fid"
    """What is searched for; lower is better."""
    margin: float = 0.1
    """A scale counts as worse when the metric is above the line's best by more than this."""
    patience: int = 3
    """Worse scales in a row that end a line."""
    max_is: float | None = 350.0
    """An Inception Score that ends a line; null: none does."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep over cells: token counts and sampler settings."""

    __pydantic_config__ = STRICT
    bundle: str = required("runs/dit_xl/bundle")
    """Generator bundle; demo: the package's own."""
    out: str = required("runs/sweep")
    """Folder of the report; finished work is kept below it."""
    cells: tuple[CellsConfig, ...]
    """Entries with num_tokens and sampler settings, each a value or a list of values."""
    sampler: SamplerLists = field(default_factory=SamplerLists)
    """Settings of every cell that does not say otherwise."""
    num_images: int = 50_000
    """Samples per cell; image i has class i mod num_classes."""
    search: SearchConfig | None = None
    metrics: tuple[
        Literal[
            "fid", "sfid", "is", "kid", "precision", "recall", "fd_dinov2", "pixel_frechet",
            "fashion_accuracy", "fashion_frechet", "fashion_precision", "fashion_recall",
        ],
        ...,
    ] = METRIC_KEYS  # fmt: skip
    """Those without their file or statistics are off, each with one line. Those of Fashion-MNIST
    need no file: the classifier is in the package, and is loaded if one is named."""
    reference: str | None = None
    """Statistics to compare with: ADM's npz, another npz with mu and sigma, EDM2's pkl, or a file
    of the command `reference`. Null: the images of `images`."""
    images: str | None = None
    """MDS folder of validation images, for reconstructions (rFID, PSNR, SSIM, LPIPS)."""
    inception: str | None = None
    """weights-inception-2015-12-05-6726825d.pth, for FID, sFID, IS, KID, precision, recall."""
    dinov2: str | None = None
    """dinov2_vitl14_pretrain.pth, for FD-DINOv2."""
    vgg16: str | None = None
    """vgg16-397923af.pth, for LPIPS of reconstructions."""
    num_components: int = 0
    """Principal components of the validation pixels, for a distance without any weights; 0: off."""
    seed: int = 0
    """Of the noise."""
    quantise: Literal["round", "truncate"] = "round"
    """How pixels become 8 bits; `truncate` is how the release and ADM stored their samples."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the generator's and decoder's matrix products; features are always float32."""
    chunk_size: int = 250
    """Images per file of finished work: what an interruption can lose per rank."""
    batch_size: int = 50
    """Images at once."""
    save_npz: bool = False
    """Keep the samples of every final cell as an npz of ADM's form, in the order of the images."""
    keep_features: bool = True
    """Keep the features of finished cells: about 20 kB per image with Inception."""
    metrics_log: str | None = None
    """metrics.jsonl of the generator's training, for its loss at each K."""
    commands: tuple[str, ...] = ()
    """Shown in the report: the commands that made all this."""
    part: str | None = None
    """i/n: make only every n-th chunk, from the i-th on, and stop before any number is computed.
    For several independent jobs; the same command without it does what is left, and reduces."""


@dataclass(frozen=True)
class Cell:
    """One point of a sweep: a token count, and complete sampler settings."""

    num_tokens: int
    sampler: SamplerConfig

    def values(self) -> dict[str, Any]:
        """For protocols and results. Plain guidance is left out: it was once all there was."""
        values = {"num_tokens": self.num_tokens} | self.sampler.settings()
        if self.sampler.guidance is Guidance.CFG:
            del values["guidance"]
        return values

    @property
    def label(self) -> str:
        """Short, for people: what differs from plain Euler at one length."""
        sampler = self.sampler
        parts = [f"K = {self.num_tokens}", f"w = {sampler.cfg_scale:g}"]
        if sampler.cfg_scale > 1 and sampler.cfg_interval != (0.15, 1.0):
            parts.append(f"t in [{sampler.cfg_interval[0]:g}, {sampler.cfg_interval[1]:g}]")
        parts.append(f"{sampler.num_steps} points")
        if sampler.solver is not Solver.EULER:
            parts.append(sampler.solver.value)
        if sampler.uncond_num_tokens is not None:
            weak = "uncond" if sampler.guidance is Guidance.CFG else sampler.guidance.value
            parts.append(f"{weak} at {sampler.uncond_num_tokens}")
        if sampler.length_schedule:
            parts.append("grows " + " ".join(f"{t:g}:{k}" for t, k in sampler.length_schedule))
        return ", ".join(parts)


def combinations(config: SweepConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """(K, fields of `SamplerConfig`) of all cells, in the order of the entries and their lists."""
    names = [entry.name for entry in fields(SamplerConfig)]
    for entry in config.cells:
        lists = [entry.num_tokens, *(getattr(entry, name) for name in names)]
        for num_tokens, *values in itertools.product(*lists):
            yield num_tokens, dict(zip(names, values, strict=True))


def expand(config: SweepConfig) -> list[Cell]:
    """All cells. Raises: ConfigError for settings that make no sense together."""
    return [Cell(k, SamplerConfig(**settings)) for k, settings in combinations(config)]


def with_lists(values: dict[str, Any]) -> dict[str, Any]:
    """Single values as lists of one, and `sampler`'s values in every entry of `cells`."""
    sampler = values.get("sampler")
    if isinstance(sampler, dict):
        sampler = {key: _as_list(key, value) for key, value in sampler.items()}
        values = values | {"sampler": sampler}
    if isinstance(values.get("cells"), list):
        common = sampler if isinstance(sampler, dict) else {}
        cells = [
            common | {key: _as_list(key, value) for key, value in entry.items()}
            if isinstance(entry, dict)
            else entry
            for entry in values["cells"]
        ]
        values = values | {"cells": cells}
    return values


_DEPTH = {"cfg_interval": 1, "length_schedule": 2}
"""How deep the lists of one value are nested."""


def _as_list(key: str, value: Any) -> Any:
    depth, inner = 0, value
    while isinstance(inner, list):
        depth, inner = depth + 1, inner[0] if inner else None
    if key == "length_schedule" and value == []:
        return [[]]
    return value if depth > _DEPTH.get(key, 0) else [value]
