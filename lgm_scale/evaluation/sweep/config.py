"""Configuration of a sweep. Free of torch.

Precedence: defaults here, then the YAML file, then `key=value` overrides. `load_sweep` reads,
type-checks and compares the configuration with the files it names; every problem comes in one
ConfigError, before a network is built.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from pydantic import ConfigDict

from lgm_scale.config.loading import InvalidValues, load_config, read_yaml
from lgm_scale.errors import ConfigError

__all__ = ["METRIC_KEYS", "Cell", "CellsConfig", "SearchConfig", "SweepConfig", "load_sweep"]

_STRICT = ConfigDict(extra="forbid", strict=True)
METRIC_KEYS = (
    "fid", "sfid", "is", "kid", "precision", "recall", "fd_dinov2", "pixel_frechet",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplerSection:
    """Sampler settings; a list means every one of its values. Defaults are the published ones.

    Those below are LGM's; `families` says which ones differ for generators on a grid.
    """

    __pydantic_config__ = _STRICT
    cfg_scale: tuple[float, ...] = (1.0,)
    """Guidance; 1 is off."""
    cfg_interval: tuple[tuple[float, float], ...] = ((0.15, 1.0),)
    cfg_rescale: tuple[Literal["none", "per_position"], ...] = ("per_position",)
    num_steps: tuple[int, ...] = (25,)
    """Points of the time grid: 25 points are 24 Euler steps."""
    timestep_shift: tuple[float, ...] = (0.2,)
    solver: tuple[Literal["euler", "heun"], ...] = ("euler",)
    uncond_num_tokens: tuple[int | None, ...] = (None,)
    """Tokens of guidance's weak branch; null: as many as the step has."""
    guidance: tuple[Literal["cfg", "autoguidance"], ...] = ("cfg",)
    """What the weak branch lacks: the class, or with `autoguidance` tokens alone."""
    length_schedule: tuple[tuple[tuple[float, int], ...], ...] = ((),)
    """Growing length: [t, K] pairs; the last K is the cell's."""


@dataclass(frozen=True, kw_only=True)
class CellsConfig(SamplerSection):
    """One entry of `cells`: every combination of its values is a cell."""

    __pydantic_config__ = _STRICT
    num_tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Find the guidance first, on few images; the best cell of each K is run on `num_images`.

    Scales rise; a line of scales stops where guidance has clearly gone too far.
    """

    __pydantic_config__ = _STRICT
    num_images: int = 10_000
    metric: Literal["fid", "fd_dinov2", "pixel_frechet"] = "fid"
    margin: float = 0.1
    """A scale counts as worse when the metric is above the line's best by more than this."""
    patience: int = 3
    """Worse scales in a row that end a line."""
    max_is: float | None = 350.0
    """An Inception Score that ends a line; null: none does."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep over cells: token counts and sampler settings."""

    __pydantic_config__ = _STRICT
    bundle: str
    """Generator bundle."""
    out: str
    """Folder of the report; finished work is kept below it."""
    cells: tuple[CellsConfig, ...]
    """Entries with num_tokens and sampler settings, each a value or a list of values."""
    sampler: SamplerSection = field(default_factory=SamplerSection)
    """Settings of every cell that does not say otherwise."""
    num_images: int = 50_000
    """Samples per cell; image i has class i mod num_classes."""
    search: SearchConfig | None = None
    metrics: tuple[
        Literal["fid", "sfid", "is", "kid", "precision", "recall", "fd_dinov2", "pixel_frechet"],
        ...,
    ] = METRIC_KEYS
    """Those without their file or statistics are off, each with one line."""
    reference: str | None = None
    """Statistics to compare with: ADM's npz, another npz with mu and sigma, EDM2's pkl, or a file
    of `python -m eval.reference`. Null: the images of `images`."""
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
    quantise: Literal["round", "truncate"] = "round"
    """How pixels become 8 bits; `truncate` is how the release and ADM stored their samples."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the generator's and decoder's matrix products; features are always float32."""
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
    """One point of a sweep: a token count and complete sampler settings."""

    num_tokens: int
    cfg_scale: float
    cfg_interval: tuple[float, float]
    cfg_rescale: str
    num_steps: int
    timestep_shift: float
    solver: str
    uncond_num_tokens: int | None
    length_schedule: tuple[tuple[float, int], ...]
    guidance: str = "cfg"

    def settings(self) -> dict[str, Any]:
        """Fields of `SamplerConfig`."""
        values = asdict(self)
        del values["num_tokens"]
        return values

    def values(self) -> dict[str, Any]:
        """For protocols and results. Plain guidance is left out: it was once all there was."""
        values = asdict(self)
        if self.guidance == "cfg":
            del values["guidance"]
        return values

    @property
    def lengths(self) -> set[int]:
        """Every number of tokens that it names."""
        weak = set() if self.uncond_num_tokens is None else {self.uncond_num_tokens}
        return {self.num_tokens} | weak | {k for _, k in self.length_schedule}

    @property
    def label(self) -> str:
        """Short, for people: what differs from plain Euler at one length."""
        parts = [f"K = {self.num_tokens}", f"w = {self.cfg_scale:g}"]
        if self.cfg_scale > 1 and self.cfg_interval != (0.15, 1.0):
            parts.append(f"t in [{self.cfg_interval[0]:g}, {self.cfg_interval[1]:g}]")
        parts.append(f"{self.num_steps} points")
        if self.solver != "euler":
            parts.append(self.solver)
        if self.uncond_num_tokens is not None:
            weak = "uncond" if self.guidance == "cfg" else self.guidance
            parts.append(f"{weak} at {self.uncond_num_tokens}")
        if self.length_schedule:
            parts.append("grows " + " ".join(f"{t:g}:{k}" for t, k in self.length_schedule))
        return ", ".join(parts)


def expand(config: SweepConfig) -> list[Cell]:
    """All cells, in the order of the entries and of their lists."""
    names = [entry.name for entry in fields(Cell)]
    return [
        Cell(*values)
        for entry in config.cells
        for values in itertools.product(*(getattr(entry, name) for name in names))
    ]


def load_sweep(path: str, overrides: list[str]) -> SweepConfig:
    """Read and validate a sweep. Raises: ConfigError with every problem."""
    from lgm_scale.evaluation.sweep.families import sampler_defaults
    from lgm_scale.evaluation.sweep.rules import broken_rules

    values = read_yaml(path, overrides)
    return check_sweep(values, path, broken_rules, sampler_defaults(values.get("bundle")))


def check_sweep(
    values: dict[str, Any], source: str, rules: Any, sampler: dict[str, Any] | None = None
) -> SweepConfig:
    """Type-check plain values, and hear the rules.

    Args:
        values: Keys of a sweep.
        source: Where they were read, for messages.
        rules: Configuration -> problems.
        sampler: Defaults of `sampler` that are not `SamplerSection`'s; None: all are.

    Raises: ConfigError with every problem.
    """
    given = values.get("sampler", {})
    if sampler and isinstance(given, dict):
        values = values | {"sampler": sampler | given}
    values = with_lists(values)
    problems: list[str] = []
    try:
        config = load_config(values, SweepConfig, source)
    except InvalidValues as error:
        problems, config = error.problems, error.rest
    if config is not None:
        told = {problem.split(":")[0] for problem in problems}
        problems += [item for item in rules(config) if item.split(":")[0] not in told]
    if problems or config is None:
        raise ConfigError(problems, source)
    return config


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
