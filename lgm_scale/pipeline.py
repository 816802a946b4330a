"""Images from a generator bundle of any family, in two lines.

    from lgm_scale import load_pipeline
    images = load_pipeline("runs/dit/bundle")(["goldfish", 207], num_tokens=64, seed=0)

What every pipeline shares: the call, classes by name, batches, the progress bar, the output.

A family of generators says the rest: its settings, its latents and how they become pixels; and,
for whoever measures it, what its work is and what its samples depend on.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from lgm_scale.bundle import check_kind, local_bundle, read_info
from lgm_scale.errors import CheckpointError, ConfigError, LGMError
from lgm_scale.families.base import families
from lgm_scale.families.generator import (
    generator_families,
    gives_average,
    solver_problems,
)
from lgm_scale.layers import cast_matrices
from lgm_scale.merging.tree import MergeTree
from lgm_scale.pixels import finite_images, to_uint8
from lgm_scale.protocols import Bundle, GeneratorNetwork, ImageTokenizer
from lgm_scale.sampling.config import SamplerConfig, Solver

# Rows of 256 tokens that one batch may hold, by device: a guided step runs twice as many.
_BATCH_ROWS = {"cuda": 128, "cpu": 32}


AnyBundle = TypeVar("AnyBundle", bound=Bundle)
AnyPipeline = TypeVar("AnyPipeline", bound="Pipeline[Any]")


class Pipeline(ABC, Generic[AnyBundle]):
    """Class labels to images, at any token count K that the network runs at.

    Image i of a call depends on (seed, first_index + i), its label and the settings alone: not on
    the other images, nor on how the call is cut into batches (up to rounding).

    Args:
        bundle: The generator with all it needs, on one device.
        dtype: Type of the networks' matrix products; the trajectory itself is float32.
        source: Where it came from, for messages.
    """

    kind: ClassVar[str]
    """Kind of its bundles, and `task` of its family."""

    def __init__(
        self,
        bundle: AnyBundle,
        dtype: torch.dtype = torch.float32,
        source: str = "this bundle",
    ) -> None:
        self.bundle, self.dtype, self.source = bundle, dtype, source
        self.device = next(bundle.net.parameters()).device
        self.classes, self.info = bundle.classes, bundle.info
        """Names of the classes, and contents of bundle.json."""
        self.num_base_tokens, self.num_classes = bundle.net.num_base_tokens, bundle.net.num_classes
        """N, the largest number of tokens, and the classes without the null label."""

    @classmethod
    def from_bundle(
        cls: type[AnyPipeline],
        folder: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AnyPipeline:
        """Load a generator bundle of this family.

        Default: a CUDA device if there is one, and bfloat16 where a GPU computes it natively.

        Raises: CheckpointError if it is none, damaged, or of another format version.
        """
        device = usable_device(device)
        pipe = cls(cls.load(folder, device), _dtype(device, dtype), str(folder))
        if pipe.dtype is not torch.float32:
            for net in pipe.unchanging():
                cast_matrices(net, pipe.dtype)
        return pipe

    # --- what a family says -------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def load(cls, folder: str | Path, device: torch.device) -> AnyBundle:
        """Read a bundle. Raises: CheckpointError."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """S, pixels along a side."""

    @abstractmethod
    def latents(
        self,
        labels: Tensor,
        indices: Tensor,
        num_tokens: int,
        seed: int,
        config: SamplerConfig,
        on_step: Callable[[], object] | None = None,
    ) -> Tensor:
        """What `decode` reads, of the images with these indices, on the pipeline's device.

        Shapes: labels, indices int64 [B] -> [B, ...].
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in about [-1, 1]. Shapes: [B, ...] -> float32 [B, 3, S, S]."""

    # --- what a family may say ----------------------------------------------------------------

    @property
    def tokenizer(self) -> ImageTokenizer | None:
        """What reconstructs images at K tokens; None in a family without such a thing."""
        return None

    @property
    def tree(self) -> MergeTree | None:
        """The merge tree; None in a family that merges nothing."""
        return None

    def parameters(self) -> dict[str, int]:
        """How many parameters each of its networks has, the generator's first."""
        return {"generator": count_parameters(self.bundle.net)}

    def protocol(self) -> dict[str, str]:
        """What samples depend on besides weights and settings.

        Raises: CheckpointError if the bundle does not say.
        """
        return {}

    def unchanging(self) -> list[Any]:
        """Networks whose weights nobody changes once they are read."""
        return [self.bundle.net]

    def replay(self) -> None:
        """Replay the network's evaluations as CUDA graphs from now on. Raises: ConfigError."""
        raise ConfigError(f"cuda-graphs: {self.kind} bundles are sampled without them, so far")

    def plain_config(self, num_tokens: int) -> SamplerConfig:
        """Settings at K tokens, before what the bundle itself stores: the family's."""
        return SamplerConfig(**generator_families()[self.kind].sampler_defaults)

    def check(self, config: SamplerConfig, num_tokens: int) -> None:
        """Refuse settings that this generator cannot do. Raises: ConfigError, CheckpointError."""
        config.check_guidance(num_tokens)

    def decoder_flops(self) -> int:
        """Operations of turning one image's latents into pixels."""
        return 0

    # --- what follows from it -----------------------------------------------------------------

    def row_flops(self, num_tokens: int) -> int:
        """Operations of one network row at K tokens."""
        return self.bundle.net.flops(num_tokens)

    def image_flops(self, config: SamplerConfig, num_tokens: int) -> int:
        """Operations of one image: every network row at its own length, and the decoder."""
        rows = config.rows(num_tokens)
        network = sum(count * self.row_flops(length) for length, count in rows.items())
        return network + self.decoder_flops()

    def default_config(self, num_tokens: int) -> SamplerConfig:
        """Settings of a call at K tokens that names none: the bundle's own, where it has some."""
        config = self.plain_config(num_tokens)
        if gives_average(self.info):  # two evaluations; its guidance is in the weights
            config = replace(
                config, solver=Solver.MEAN_FLOW, cfg_scale=1.0, num_steps=3, timestep_shift=0.5
            )
        stored = self.info.get("sampling", {}).get(str(num_tokens), {})
        try:
            return replace(config, **stored)
        except (TypeError, ConfigError) as error:
            raise CheckpointError(f"bundle.json: sampling at K = {num_tokens}: {error}") from error

    def config(
        self, num_tokens: int, cfg_scale: float | None = None, **settings: Any
    ) -> SamplerConfig:
        """The complete settings of a call, checked against the bundle. Raises: see `__call__`."""
        self.check(SamplerConfig(), num_tokens)  # a length that it lacks is the first to be told
        known = SamplerConfig.__dataclass_fields__
        unknown = sorted(set(settings) - set(known))
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"{unknown[0]}: no such sampler setting{hint}")
        if cfg_scale is not None:
            settings["cfg_scale"] = cfg_scale
        config = replace(self.default_config(num_tokens), **settings)
        self.check(config, num_tokens)
        if problems := list(solver_problems(self.info, [config], "sampler")):
            raise ConfigError(problems)
        return config

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        num_tokens: int | None = None,
        cfg_scale: float | None = None,
        seed: int = 0,
        *,
        batch_size: int | None = None,
        first_index: int = 0,
        output: Literal["numpy", "pil"] = "numpy",
        progress_bar: bool = True,
        **settings: Any,
    ) -> np.ndarray | list[Image.Image]:
        """Make one image per class label.

        Args:
            class_labels: Indices or names.
            num_tokens: K. Default: N, all tokens.
            cfg_scale: Guidance; 1 turns it off. Default: see `default_config`.
            seed: Seed of the noise.
            batch_size: Images at once. Default: what fits the device comfortably.
            first_index: Index of the first image; its noise depends on it.
            output: A uint8 array [B, S, S, 3], or a list of PIL images.
            progress_bar: Show one.
            **settings: Any other field of `SamplerConfig`.

        Raises: ConfigError naming what is wrong; CheckpointError if the bundle lacks what a
        setting needs.
        """
        labels = self.class_indices(class_labels)
        num_tokens = self.num_base_tokens if num_tokens is None else num_tokens
        config = self.config(num_tokens, cfg_scale, **settings)
        if output not in ("numpy", "pil"):
            raise ConfigError(f"output: {output!r} is neither 'numpy' nor 'pil'")
        size = self.batch_size(num_tokens) if batch_size is None else batch_size
        if size < 1:
            raise ConfigError(f"batch_size: {size} must be 1 or more")
        chunks = []
        steps = (config.num_steps - 1) * math.ceil(len(labels) / size)
        with tqdm(
            total=steps, desc=f"K={num_tokens}", unit="step", disable=not progress_bar
        ) as bar:
            for start in range(0, len(labels), size):
                part = torch.tensor(labels[start : start + size])
                indices = torch.arange(start, start + len(part)) + first_index
                latents = self.latents(part, indices, num_tokens, seed, config, bar.update)
                chunks.append(self._pictures(latents))
        nothing = np.empty((0, self.image_size, self.image_size, 3), dtype=np.uint8)
        images = np.concatenate(chunks) if chunks else nothing
        return [Image.fromarray(image) for image in images] if output == "pil" else images

    def class_indices(self, class_labels: int | str | Sequence[int | str]) -> list[int]:
        """Indices of classes given by index or name. Raises: ConfigError with the nearest names."""
        single = isinstance(class_labels, (int, str, np.integer))
        labels = [class_labels] if single else list(class_labels)  # type: ignore[arg-type]
        return [self._class_index(label) for label in labels]

    def _class_index(self, label: int | str) -> int:
        names, num_classes = self.classes, self.num_classes
        if isinstance(label, (bool, float)):
            raise ConfigError(f"class_labels: {label!r} is neither an index nor a name")
        if isinstance(label, str):
            lower = [name.casefold() for name in names]
            if label.casefold() in lower:
                return lower.index(label.casefold())
            if not label.lstrip("-").isdigit():
                near = difflib.get_close_matches(label.casefold(), lower, n=3, cutoff=0.0)
                nearest = ", ".join(names[lower.index(name)] for name in near)
                raise ConfigError(f"class_labels: no class is named {label!r}; nearest: {nearest}")
        if not 0 <= int(label) < num_classes:
            raise ConfigError(
                f"class_labels: index {int(label)} is outside [0, {num_classes - 1}], the classes "
                "of this bundle"
            )
        return int(label)

    def batch_size(self, num_tokens: int) -> int:
        """Images at once that fit the device comfortably at K tokens."""
        rows = _BATCH_ROWS.get(self.device.type, _BATCH_ROWS["cpu"])
        return max(1, min(rows, rows * 256 // max(self.bundle.net.block_lengths(num_tokens))))

    def _pictures(self, latents: Tensor) -> np.ndarray:
        """Images to hand out. Shapes: [B, ...] -> uint8 [B, S, S, 3]."""
        pixels = self.decode(latents)
        if not finite_images(pixels).all():
            raise LGMError(
                f"images are not finite in {self.dtype}: the weights are damaged, or need float32"
            )
        return to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device of this name; by default a CUDA device if there is one. Raises: ConfigError."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(
            f"device: {device!r} is no device; write cpu, cuda, or cuda:1 for the second of them"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {device} is asked for, and no CUDA device is visible")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {device} is asked for, and {torch.cuda.device_count()} CUDA devices are "
            "visible; they count from cuda:0"
        )
    return device


def _dtype(device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def count_parameters(module: GeneratorNetwork | nn.Module) -> int:
    """All of a network's parameters."""
    return sum(p.numel() for p in module.parameters())


def load_pipeline(
    folder: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    revision: str | None = None,
) -> Pipeline[Any]:
    """The pipeline of whatever generator a bundle holds.

    `folder` may be owner/name of a repository of the model hub, if there is no such folder; it is
    downloaded then, at `revision` (a branch, tag or commit). `demo` is the package's own generator
    of ten classes of clothes.

    Default: a CUDA device if there is one, and bfloat16 where a GPU computes it natively.

    Raises: CheckpointError if it is no generator bundle, damaged, or of another format version.
    """
    folder = local_bundle(folder, revision)
    info = read_info(folder)
    check_kind(info, folder, *generator_families())
    return generator_families()[info["kind"]].pipeline().from_bundle(folder, device, dtype)


def load_image_tokenizer(
    folder: str | Path, device: torch.device | str = "cpu"
) -> tuple[ImageTokenizer, dict[str, str]]:
    """What reconstructs images in a bundle, and the hashes of the files that it depends on.

    `folder` may be a repository of the model hub, as in `load_pipeline`.

    Raises: CheckpointError; ConfigError if the bundle's family has none.
    """
    folder = local_bundle(folder)
    info = read_info(folder)
    family = families().get(info["kind"])
    if family is None:
        raise CheckpointError(f"{folder} is a {info['kind']} bundle, which no family here reads")
    own = [name for name in family.reconstruction_files if name in info["files"]]
    files = {name: info["files"][name] for name in own}
    return family.reconstructor(folder, device), files
