"""From noise to a state on a grid: generators whose K says how much their core computes.

The state is [B, channels, side, side] at every K, and so is its noise: image i starts from the same
one at two budgets. Guidance acts on all channels. Where the weak branch runs at fewer tokens it is
a call of its own, else both branches share one batch:

    v = v_weak + w (v_cond - v_weak)

Source: ELIT (arXiv 2603.12245): classifier-free guidance with a cheap unconditional branch, and
autoguidance by a smaller budget. The interval, Heun's method and a K per step are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lgm_scale.randomness import Purpose, keyed_normal, stream_keys
from lgm_scale.sampling.config import Guidance, SamplerConfig
from lgm_scale.sampling.integration import integrate


class GridNetwork(Protocol):
    """A velocity on a grid, with a budget K per call: `SiT`, `ELIT`, or a test's formula."""

    @property
    def null_label(self) -> int:
        """The label of the unconditional branch."""
        ...

    def check_length(self, num_tokens: int) -> None:
        """Raise ConfigError for a K that the network does not have."""
        ...

    def __call__(
        self, z_t: Tensor, t: Tensor, labels: Tensor, num_tokens: int, /, *end: Tensor
    ) -> Tensor:
        """Velocity: z_t [B, C, S, S], t [B] (1 is data), labels [B] int64 -> [B, C, S, S]."""
        ...


def initial_state_noise(seed: int, image_indices: Tensor, channels: int, side: int) -> Tensor:
    """Noise of the images with these indices: [B] int64 -> [B, channels, side, side] float32.

    Drawn on the CPU, so that a GPU gives the same images as any other.
    """
    keys = stream_keys(seed, Purpose.SAMPLING_NOISE, 0, image_indices.cpu())
    return keyed_normal(keys, (channels, side, side))


def check_budgets(net: GridNetwork, config: SamplerConfig, num_tokens: int) -> None:
    """Refuse what a network cannot do, before anything is computed. Raises: ConfigError."""
    lengths = {num_tokens, *config.rows(num_tokens)}
    if config.uncond_num_tokens is not None:
        lengths.add(config.uncond_num_tokens)
    for length in sorted(lengths):
        net.check_length(length)
    config.check_guidance(num_tokens)


@dataclass
class _Guided:
    """The velocity that a batch follows. Shapes: labels [B]."""

    net: GridNetwork
    labels: Tensor
    config: SamplerConfig

    def __call__(self, z_t: Tensor, t: float, length: int, *end: float) -> Tensor:
        """Velocity at time t and K tokens: z_t [B, C, S, S] -> float32 [B, C, S, S]."""
        net, labels, config = self.net, self.labels, self.config
        times, *ends = (
            torch.full((len(z_t),), time, device=z_t.device, dtype=torch.float32)
            for time in (t, *end)
        )  # [B] each
        if not config.guided(t):
            return net(z_t, times, labels, length, *ends).float()
        # Autoguidance keeps the class: its branch is weak by its smaller budget alone.
        weak_labels = labels
        if config.guidance is Guidance.CFG:
            weak_labels = torch.full_like(labels, net.null_label)
        weak_length = config.uncond_length(length)
        if weak_length == length:  # one batch of 2 B, else two calls: K is one per call
            both = torch.cat((labels, weak_labels))
            v = net(torch.cat((z_t, z_t)), torch.cat((times, times)), both, length)
            v_cond, v_weak = v.float().chunk(2)
        else:
            v_cond = net(z_t, times, labels, length).float()
            v_weak = net(z_t, times, weak_labels, weak_length).float()
        return v_weak + config.cfg_scale * (v_cond - v_weak)


@torch.inference_mode()
def sample_state(
    net: GridNetwork,
    noise: Tensor,
    labels: Tensor,
    config: SamplerConfig,
    num_tokens: int,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Integrate the ODE from noise (t = 0) to data (t = 1).

    `noise` is what `initial_state_noise` draws, on the device where this runs; `cfg_rescale` has no
    effect, for no token is merged. With a `length_schedule`, K is that of its last steps.

    Shapes: noise [B, C, S, S] -> the state [B, C, S, S], float32.
    Raises: ConfigError for a K that the network does not have, or autoguidance without a weaker
    branch.
    """
    check_budgets(net, config, num_tokens)
    return integrate(noise, _Guided(net, labels, config), config, num_tokens, on_step=on_step)
