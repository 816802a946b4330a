"""The pipeline of generators on a grid, ELIT and SiT: class labels to states to images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lgm_scale.errors import CheckpointError
from lgm_scale.families.elit.bundle import ELIT_KIND, ELITBundle, load_elit_bundle
from lgm_scale.families.elit.sampling import check_budgets, initial_state_noise, sample_state
from lgm_scale.pipeline import Pipeline, count_parameters
from lgm_scale.pixels import PIXEL_STD
from lgm_scale.sampling.config import SamplerConfig


class ELITPipeline(Pipeline[ELITBundle]):
    """Class labels to images, at any budget the network has; see `Pipeline`.

    K is k times the number of the network's windows; a call that names none runs at N, all of the
    work. The state has one size at every K, and an image index one noise. Without other settings
    it samples as published: 50 Euler steps, no guidance.
    """

    kind = ELIT_KIND

    def __init__(
        self, bundle: ELITBundle, dtype: torch.dtype = torch.float32, source: str = "this bundle"
    ) -> None:
        super().__init__(bundle, dtype, source)
        if (bundle.space.kind == "sd_vae") != (bundle.vae is not None):
            raise CheckpointError(
                f"{source}: the space {bundle.space.kind!r} and its decoder do not belong together"
            )

    @classmethod
    def load(cls, folder: str | Path, device: torch.device) -> ELITBundle:
        """Read a bundle. Raises: CheckpointError."""
        return load_elit_bundle(folder, device)

    @property
    def image_size(self) -> int:
        """S, pixels along a side."""
        return self.bundle.space.image_size

    def parameters(self) -> dict[str, int]:
        """How many parameters each of its networks has."""
        found = {"generator": count_parameters(self.bundle.net)}
        if self.bundle.vae is not None:
            found["autoencoder"] = count_parameters(self.bundle.vae)
        return found

    def protocol(self) -> dict[str, str]:
        """The noise's scale: there is but one way to see noise on a grid."""
        return {"noise_scale": "whole state, the same at every K"}

    def check(self, config: SamplerConfig, num_tokens: int) -> None:
        """Refuse budgets that the network does not have. Raises: ConfigError."""
        check_budgets(self.bundle.net, config, num_tokens)

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
        """States of the images with these indices, in the scale that the network was trained in.

        Shapes: labels, indices int64 [B] -> [B, channels, side, side] on the pipeline's device.
        """
        net = self.bundle.net
        noise = initial_state_noise(seed, indices, net.channels, net.side).to(self.device)
        with self._autocast():
            return sample_state(net, noise, labels.to(self.device), config, num_tokens, on_step)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in about [-1, 1]. Shapes: [B, channels, side, side] -> float32 [B, 3, S, S]."""
        vae = self.bundle.vae
        if vae is None:
            return latents * PIXEL_STD
        with self._autocast():
            return vae.decode(latents / vae.scale).float()

    @cached_property
    def _decoder_flops(self) -> int:
        vae = self.bundle.vae
        return 0 if vae is None else int(vae.decode_flops(self.image_size))

    def decoder_flops(self) -> int:
        """Operations of decoding one state; pixels need none."""
        return self._decoder_flops
