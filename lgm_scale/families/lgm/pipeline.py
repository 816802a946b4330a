"""LGM's pipeline: class labels to merged tokens to images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.lgm.bundle import LGMBundle, load_lgm_bundle
from lgm_scale.families.lgm.guidance import Velocity
from lgm_scale.families.lgm.sampling import check_nested, sample_latents
from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.flow import NoiseScale
from lgm_scale.merging.tree import MergeTree
from lgm_scale.pipeline import Pipeline, count_parameters
from lgm_scale.sampling.config import CFGRescale, SamplerConfig
from lgm_scale.sampling.replay import ReplayedVelocity

# Published with 256 base tokens, per-position guidance and 25 grid points.
_PUBLISHED_CFG_SCALE = {32: 10.5, 64: 8.0, 128: 6.5}


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


class LGMPipeline(Pipeline[LGMBundle]):
    """Class labels to images, at any token length the merge tree allows; see `Pipeline`.

    K is from the tree's number of blocks to N; guidance is by length, see `default_cfg_scale`.
    """

    kind = "generator"

    def __init__(
        self, bundle: LGMBundle, dtype: torch.dtype = torch.float32, source: str = "this bundle"
    ) -> None:
        super().__init__(bundle, dtype, source)
        self._velocity: Velocity = bundle.velocity

    @classmethod
    def load(cls, folder: str | Path, device: torch.device) -> LGMBundle:
        """Read a bundle. Raises: CheckpointError."""
        return load_lgm_bundle(folder, device)

    @property
    def image_size(self) -> int:
        """S, pixels along a side."""
        return self.bundle.tokenizer.image_size

    @property
    def tokenizer(self) -> Tokenizer:
        """What reconstructs images at K tokens."""
        return self.bundle.tokenizer

    @property
    def tree(self) -> MergeTree:
        """The merge tree."""
        return self.bundle.tree

    def parameters(self) -> dict[str, int]:
        """How many parameters each of its networks has."""
        return {
            "generator": count_parameters(self.bundle.net),
            "tokenizer": count_parameters(self.bundle.tokenizer),
        }

    def unchanging(self) -> list[Any]:
        """The network, unless adapters are added to copies of its weights."""
        return [] if self.bundle.adapters else [self.bundle.net]

    def replay(self) -> None:
        """Replay the network's evaluations as CUDA graphs from now on. Raises: ConfigError."""
        if self.device.type != "cuda":
            raise ConfigError(f"cuda-graphs: the pipeline is on {self.device}; they need a GPU")
        self._velocity = ReplayedVelocity(self.bundle.velocity)

    @property
    def noise_scale(self) -> NoiseScale:
        """Noise that the generator was trained with; corrected if the bundle does not say."""
        objective = self.info.get("training", {}).get("config", {}).get("objective", {})
        return NoiseScale(objective.get("noise_scale", NoiseScale.CORRECTED.value))

    def protocol(self) -> dict[str, str]:
        """The noise's scale: how the generator was trained to see noise.

        Raises: CheckpointError if the bundle does not say.
        """
        try:
            found = self.info["training"]["config"]["objective"]["noise_scale"]
            return {"noise_scale": NoiseScale(found).value}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.source}: bundle.json does not say training.config.objective.noise_scale "
                f"({type(error).__name__}: {error}), and sampling depends on it"
            ) from error

    def plain_config(self, num_tokens: int) -> SamplerConfig:
        """The published settings, with guidance by length."""
        if self.noise_scale == NoiseScale.LEGACY:  # per-position guidance needs merged noise
            return SamplerConfig(cfg_scale=1.5, cfg_rescale=CFGRescale.NONE)
        return SamplerConfig(cfg_scale=default_cfg_scale(self.num_base_tokens, num_tokens))

    def check(self, config: SamplerConfig, num_tokens: int) -> None:
        """Refuse settings that this generator cannot do. Raises: ConfigError, CheckpointError."""
        contrasts = self.bundle.stats.contrasts
        check_nested(config, num_tokens, self.bundle.tree, self.noise_scale, contrasts)

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
                self._velocity, self.bundle.tree, seed, indices, labels.to(self.device),
                net.null_label, num_tokens, net.latent_dim, config, self.noise_scale,
                stats.contrasts, on_step,
            )  # fmt: skip
        return latents * stats.std.to(latents) + stats.mean.to(latents)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in about [-1, 1]. Shapes: [B, N, D] -> float32 [B, 3, S, S]."""
        with self._autocast():
            return self.bundle.tokenizer.decode(latents).float()

    def decoder_flops(self) -> int:
        """Operations of decoding one image: always N latents, whatever K was."""
        return self.bundle.tokenizer.decoder_flops()
