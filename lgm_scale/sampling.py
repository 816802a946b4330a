"""From noise to latents: the ODE solver and classifier-free guidance.

Noise of image i depends on (seed, i) alone, so an image does not change with the batch it is
made in, the number of ranks or the length of the sweep; and it is one full-length noise, so the
same image index at two lengths is the same picture at two levels of detail.

Source: LGM paper and release, sampling; guided and unguided steps are told apart here, so the
unconditional half is not computed where guidance is off.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from lgm_scale.errors import ConfigError
from lgm_scale.merging import MergeAssignment
from lgm_scale.objectives.flow import NoiseScale, merged_noise, shift_timesteps
from lgm_scale.randomness import Purpose, stream_keys

__all__ = ["CFGRescale", "SamplerConfig", "Velocity", "guided_velocity", "initial_noise", "sample"]

Velocity = Callable[[Tensor, Tensor, Tensor, MergeAssignment], Tensor]
"""(z_t [B, K, D], t [B], labels [B], assignment) -> v [B, K, D]: a `MergeDiT` or its like."""


class CFGRescale(str, Enum):
    """NONE: v_u + w (v_c - v_u). PER_POSITION: v_c + (w - 1) / size_j (v_c - v_u).

    PER_POSITION belongs to the noise-scale correction: a large cluster has less noise, so its
    guidance is divided by its size.
    """

    NONE = "none"
    PER_POSITION = "per_position"


@dataclass(frozen=True)
class SamplerConfig:
    """How images are sampled. `num_steps` counts grid points: 25 points are 24 evaluations."""

    num_steps: int = 25
    cfg_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.15, 1.0)
    cfg_rescale: CFGRescale = CFGRescale.PER_POSITION
    timestep_shift: float = 0.2

    def __post_init__(self) -> None:
        """Refuse settings without meaning, all at once."""
        lo, hi = self.cfg_interval
        problems = []
        if self.num_steps < 2:
            problems.append(f"num_steps: {self.num_steps} grid points; needs 2 or more")
        if self.cfg_scale < 1:
            problems.append(f"cfg_scale: {self.cfg_scale} is below 1; 1 turns guidance off")
        if not 0 <= lo <= hi <= 1:
            problems.append(f"cfg_interval: ({lo}, {hi}) must be ordered and inside [0, 1]")
        if self.timestep_shift <= 0:
            problems.append(f"timestep_shift: {self.timestep_shift} must be above 0")
        if problems:
            raise ConfigError(problems, "sampler")

    def grid(self) -> list[float]:
        """The shifted time grid, from 0 to 1."""
        points = torch.linspace(0, 1, self.num_steps, dtype=torch.float64)
        return shift_timesteps(points, self.timestep_shift).tolist()

    def guided(self, t: float) -> bool:
        """Whether the step that starts at t is guided."""
        return self.cfg_scale > 1 and self.cfg_interval[0] <= t <= self.cfg_interval[1]

    def num_forwards(self) -> int:
        """Network evaluations per image: one for an unguided step, two for a guided one."""
        return sum(2 if self.guided(t) else 1 for t in self.grid()[:-1])


def initial_noise(
    seed: int, image_indices: Tensor, assignment: MergeAssignment, dim: int, scale: NoiseScale
) -> Tensor:
    """Noise of the images with these indices: [B] int64 -> [B, K, dim] float32, on the CPU.

    Drawn on the CPU, so that a GPU gives the same images as any other.
    """
    keys = stream_keys(seed, Purpose.SAMPLING_NOISE, 0, image_indices.cpu())
    return merged_noise(keys, assignment.to("cpu"), dim, scale)


def guided_velocity(
    velocity: Velocity,
    z_t: Tensor,
    t: Tensor,
    labels: Tensor,
    null_label: int,
    assignment: MergeAssignment,
    cfg_scale: float,
    cfg_rescale: CFGRescale,
) -> Tensor:
    """Both branches in one batch, and their combination on all D channels.

    Shapes: z_t [B, K, D], t [B], labels [B] -> [B, K, D].
    """
    both = torch.cat((labels, torch.full_like(labels, null_label)))
    v_cond, v_uncond = velocity(torch.cat((z_t, z_t)), torch.cat((t, t)), both, assignment).chunk(2)
    if cfg_rescale is CFGRescale.NONE:
        return v_uncond + cfg_scale * (v_cond - v_uncond)
    strength = (cfg_scale - 1) / assignment.sizes.to(v_cond.dtype)  # [K]
    return v_cond + strength[:, None] * (v_cond - v_uncond)


@torch.inference_mode()
def sample(
    velocity: Velocity,
    noise: Tensor,
    labels: Tensor,
    null_label: int,
    assignment: MergeAssignment,
    config: SamplerConfig,
) -> Tensor:
    """Integrate the ODE from noise (t = 0) to data (t = 1) with Euler steps.

    Shapes: noise [B, K, D], labels [B] int64 -> unmerged latents [B, N, D], standardised.
    """
    z_t = noise
    grid = config.grid()
    for t, t_next in itertools.pairwise(grid):
        times = torch.full((len(z_t),), t, device=z_t.device, dtype=torch.float32)
        if config.guided(t):
            v = guided_velocity(
                velocity, z_t, times, labels, null_label, assignment,
                config.cfg_scale, config.cfg_rescale,
            )  # fmt: skip
        else:
            v = velocity(z_t, times, labels, assignment)
        z_t = z_t + (t_next - t) * v.float()
    return assignment.unmerge(z_t)
