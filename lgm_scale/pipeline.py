"""Images from a generator bundle, in two lines.

from lgm_scale import LGMPipeline
images = LGMPipeline.from_bundle("runs/dit/bundle")(["goldfish", 207], num_tokens=64, seed=0)
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lgm_scale.bundle import GeneratorBundle, load_generator
from lgm_scale.errors import CheckpointError, ConfigError, LGMError
from lgm_scale.objectives.flow import NoiseScale
from lgm_scale.pixels import finite_images, to_uint8
from lgm_scale.sampling import CFGRescale, SamplerConfig, sample_latents
from lgm_scale.sampling.solver import check_nested

__all__ = ["LGMPipeline", "default_cfg_scale"]

# Published with 256 base tokens, per-position guidance and 25 grid points.
_PUBLISHED_CFG_SCALE = {32: 10.5, 64: 8.0, 128: 6.5}
# Rows of 256 tokens that one batch may hold, by device: a guided step runs twice as many.
_BATCH_ROWS = {"cuda": 128, "cpu": 32}


def default_cfg_scale(num_base_tokens: int, num_tokens: int) -> float:
    """Per-position guidance scale w to start from.

    With 256 base tokens, the published values (32: 10.5, 64: 8.0, 128: 6.5), linear in log K
    between them and constant outside. Otherwise 1 + N / (2 K): as the published values do, it grows
    where clusters are large; the mean strength over tokens is that of plain guidance at 1.5.
    """
    if num_base_tokens != 256:
        return 1 + num_base_tokens / (2 * num_tokens)
    lengths, scales = zip(*sorted(_PUBLISHED_CFG_SCALE.items()), strict=True)
    return float(np.interp(math.log(num_tokens), [math.log(length) for length in lengths], scales))


class LGMPipeline:
    """Class labels to images, at any token length the merge tree allows.

    Image i of a call depends on (seed, first_index + i), its label and the settings alone: not on
    the other images, nor on how the call is cut into batches (up to rounding).

    Args:
        bundle: Generator, tokenizer, merge tree and statistics, on one device.
        dtype: Of the networks' matrix products; the trajectory itself is float32.
    """

    def __init__(self, bundle: GeneratorBundle, dtype: torch.dtype = torch.float32) -> None:
        self.bundle = bundle
        self.dtype = dtype
        self.device = bundle.net.pos_embed.device

    @classmethod
    def from_bundle(
        cls,
        folder: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LGMPipeline:
        """Load a generator bundle.

        Args:
            folder: A generator bundle.
            device: Default: a CUDA device if there is one, else the CPU.
            dtype: Default: bfloat16 where a GPU computes it natively, else float32.

        Raises: CheckpointError if it is none, damaged, or of another format version.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device: {device} is asked for, and no CUDA device is visible")
        if dtype is None:
            native = device.type == "cuda" and torch.cuda.is_bf16_supported(
                including_emulation=False
            )
            dtype = torch.bfloat16 if native else torch.float32
        return cls(load_generator(folder, device), dtype)

    @property
    def num_base_tokens(self) -> int:
        """N, the largest number of tokens."""
        return self.bundle.net.num_base_tokens

    @property
    def noise_scale(self) -> NoiseScale:
        """Noise that the generator was trained with; corrected if the bundle does not say."""
        objective = self.bundle.info.get("training", {}).get("config", {}).get("objective", {})
        return NoiseScale(objective.get("noise_scale", NoiseScale.CORRECTED.value))

    def default_config(self, num_tokens: int) -> SamplerConfig:
        """Settings of a call at K tokens that names none: the bundle's own, where it has some."""
        if self.noise_scale == NoiseScale.LEGACY:  # per-position guidance needs merged noise
            config = SamplerConfig(cfg_scale=1.5, cfg_rescale=CFGRescale.NONE)
        else:
            config = SamplerConfig(cfg_scale=default_cfg_scale(self.num_base_tokens, num_tokens))
        stored = self.bundle.info.get("sampling", {}).get(str(num_tokens), {})
        try:
            return replace(config, **stored)
        except (TypeError, ConfigError) as error:
            raise CheckpointError(f"bundle.json: sampling at K = {num_tokens}: {error}") from error

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
            num_tokens: K, from the tree's number of blocks to N. Default: N.
            cfg_scale: Guidance; 1 turns it off. Default: see `default_cfg_scale`.
            seed: Of the noise.
            batch_size: Images at once. Default: what fits the device comfortably.
            first_index: Index of the first image; its noise depends on it.
            output: A uint8 array [B, S, S, 3], or a list of PIL images.
            progress_bar: Show one.
            **settings: Any other field of `SamplerConfig`.

        Raises: ConfigError naming what is wrong; CheckpointError if the bundle lacks what a
        growing length needs.
        """
        labels = self.class_indices(class_labels)
        num_tokens = self.num_base_tokens if num_tokens is None else num_tokens
        config = self.config(num_tokens, cfg_scale, **settings)
        if output not in ("numpy", "pil"):
            raise ConfigError(f"output: {output!r} is neither 'numpy' nor 'pil'")
        size = self._batch_size(num_tokens) if batch_size is None else batch_size
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
        images = np.concatenate(chunks) if chunks else self._decode_nothing()
        return [Image.fromarray(image) for image in images] if output == "pil" else images

    def config(
        self, num_tokens: int, cfg_scale: float | None = None, **settings: Any
    ) -> SamplerConfig:
        """The complete settings of a call, checked against the bundle. Raises: see `__call__`."""
        self.bundle.tree.assignment(num_tokens)  # a length outside the tree is the first to be told
        known = SamplerConfig.__dataclass_fields__
        unknown = sorted(set(settings) - set(known))
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"{unknown[0]}: no such sampler setting{hint}")
        if cfg_scale is not None:
            settings["cfg_scale"] = cfg_scale
        config = replace(self.default_config(num_tokens), **settings)
        contrasts = self.bundle.stats.contrasts
        check_nested(config, num_tokens, self.bundle.tree, self.noise_scale, contrasts)
        return config

    def class_indices(self, class_labels: int | str | Sequence[int | str]) -> list[int]:
        """Indices of classes given by index or name. Raises: ConfigError with the nearest names."""
        single = isinstance(class_labels, (int, str, np.integer))
        labels = [class_labels] if single else list(class_labels)  # type: ignore[arg-type]
        return [self._class_index(label) for label in labels]

    def _class_index(self, label: int | str) -> int:
        names, num_classes = self.bundle.classes, self.bundle.net.num_classes
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

    def _batch_size(self, num_tokens: int) -> int:
        rows = _BATCH_ROWS.get(self.device.type, _BATCH_ROWS["cpu"])
        return max(1, min(rows, rows * 256 // num_tokens))

    @torch.inference_mode()
    def latents(
        self,
        labels: Tensor,
        indices: Tensor,
        num_tokens: int,
        seed: int,
        config: SamplerConfig,
        on_step: Callable[[], object] | None = None,
    ) -> Tensor:
        """Latents of the images with these indices, as the decoder reads them.

        Shapes: labels, indices int64 [B] -> [B, N, D] on the pipeline's device.
        """
        net, stats = self.bundle.net, self.bundle.stats
        with self._autocast():
            latents = sample_latents(
                self.bundle.velocity, self.bundle.tree, seed, indices, labels.to(self.device),
                net.null_label, num_tokens, net.latent_dim, config, self.noise_scale,
                stats.contrasts, on_step,
            )  # fmt: skip
        return latents * stats.std.to(latents) + stats.mean.to(latents)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in about [-1, 1]. Shapes: [B, N, D] -> float32 [B, 3, S, S]."""
        with self._autocast():
            return self.bundle.tokenizer.decode(latents).float()

    def _pictures(self, latents: Tensor) -> np.ndarray:
        """Images to hand out. Shapes: [B, N, D] -> uint8 [B, S, S, 3]."""
        pixels = self.decode(latents)
        if not finite_images(pixels).all():
            raise LGMError(
                f"images are not finite in {self.dtype}: the weights are damaged, or need float32"
            )
        return to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()

    def _decode_nothing(self) -> np.ndarray:
        side = self.bundle.tokenizer.image_size
        return np.empty((0, side, side, 3), dtype=np.uint8)

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)
