"""From noise to latents of merged tokens, at one length or growing.

Noise of image i depends on (seed, i) alone, so an image does not change with the batch it is
made in, the number of ranks or the length of the sweep; and it is one full-length noise, so the
same image index at two lengths is the same picture at two levels of detail. A trajectory that
grows takes the noise of its new tokens from that same draw.

Source: LGM paper and release, sampling; guided and unguided steps are told apart here, so the
unconditional half is not computed where guidance is off. Growing length is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.families.lgm.guidance import Velocity, coarse_guided_velocity, guided_velocity
from lgm_scale.flow import NoiseScale, merged_noise
from lgm_scale.merging.nesting import ContrastStats, Nesting, contrast_basis, split_clusters
from lgm_scale.merging.tree import MergeAssignment, MergeTree
from lgm_scale.randomness import Purpose, stream_keys
from lgm_scale.sampling.config import Guidance, SamplerConfig
from lgm_scale.sampling.integration import integrate


def initial_noise(
    seed: int, image_indices: Tensor, assignment: MergeAssignment, dim: int, scale: NoiseScale
) -> Tensor:
    """Noise of the images with these indices: [B] int64 -> [B, K, dim] float32, on the CPU.

    Drawn on the CPU, so that a GPU gives the same images as any other.
    """
    keys = stream_keys(seed, Purpose.SAMPLING_NOISE, 0, image_indices.cpu())
    return merged_noise(keys, assignment.to("cpu"), dim, scale)


@dataclass
class _Trajectory:
    """What the steps of one batch share; its methods are what an integrator asks for.

    Shapes: noise [B, K, D] at the last length, labels [B] int64.
    """

    velocity: Velocity
    noise: Tensor
    labels: Tensor
    null_label: int
    final: MergeAssignment
    config: SamplerConfig
    tree: MergeTree | None
    contrasts: ContrastStats | None
    nestings: dict[tuple[int, int], Nesting] = field(default_factory=dict)

    def cut(self, num_tokens: int) -> MergeAssignment:
        """The cut at K: the caller's own, or where that has another length the tree's."""
        if num_tokens == self.final.num_tokens:
            return self.final
        if self.tree is None:
            raise ConfigError(
                f"sampler: a step at {num_tokens} tokens and one at {self.final.num_tokens} need "
                "the merge tree that relates them; pass `tree`"
            )
        return self.tree.assignment(num_tokens, self.final.labels.device)

    def nesting(self, fine: int, coarse: int) -> Nesting:
        """Two cuts of the tree and what relates them; made once per batch."""
        if (fine, coarse) not in self.nestings:
            self.nestings[fine, coarse] = Nesting.between(self.cut(fine), self.cut(coarse))
        return self.nestings[fine, coarse]

    def start(self, num_tokens: int) -> Tensor:
        """The noise as seen at K' <= K tokens: [B, K', D]."""
        if num_tokens == self.final.num_tokens:
            return self.noise
        # Merged, not drawn again: an image is the same one whether its trajectory grows or not.
        return self.nesting(self.final.num_tokens, num_tokens).merge(self.noise)

    def grow(self, z_t: Tensor, t: float, num_tokens: int) -> Tensor:
        """Split clusters at time t, if K asks for it. Shapes: z_t [B, K', D] -> [B, K, D]."""
        if num_tokens == z_t.shape[1]:
            return z_t
        if self.contrasts is None or self.tree is None:
            raise ConfigError("sampler: length_schedule needs the data's contrasts; pass them")
        nesting = self.nesting(num_tokens, z_t.shape[1])
        basis = contrast_basis(self.tree)  # [N, R], kept with the tree: built at the first split
        return split_clusters(z_t, t, self.noise, nesting, self.final, basis, self.contrasts)

    def guided(self, z_t: Tensor, t: float, length: int, *end: float) -> Tensor:
        """Velocity at time t, guided where the settings say so: [B, K, D] -> float32 [B, K, D]."""
        config = self.config
        times, *ends = (
            torch.full((len(z_t),), time, device=z_t.device, dtype=torch.float32)
            for time in (t, *end)
        )  # [B] each
        if not config.guided(t):
            return self.velocity(z_t, times, self.labels, self.cut(length), *ends).float()
        state = (self.velocity, z_t, times, self.labels)
        strength = (config.cfg_scale, config.cfg_rescale)
        # The weak branch is the same network: without the class, with fewer tokens, or both. Where
        # it has all tokens, both branches share one batch.
        coarse = config.uncond_length(length)
        if coarse == length:
            null = self.null_label
            return guided_velocity(*state, null, self.cut(length), *strength).float()
        null = None if config.guidance is Guidance.AUTOGUIDANCE else self.null_label
        return coarse_guided_velocity(*state, null, self.nesting(length, coarse), *strength)


@torch.inference_mode()
def sample(
    velocity: Velocity,
    noise: Tensor,
    labels: Tensor,
    null_label: int,
    assignment: MergeAssignment,
    config: SamplerConfig,
    tree: MergeTree | None = None,
    contrasts: ContrastStats | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Integrate the ODE from noise (t = 0) to data (t = 1).

    `noise` [B, K, D] is at the length asked for, also when the trajectory starts with fewer;
    `labels` are int64 [B]. `tree` is needed by `config.nested` alone, the data's `contrasts` by a
    growing length.

    Shapes: -> unmerged latents [B, N, D], standardised.
    Raises: ConfigError if something needed is missing, or autoguidance has no weaker branch.
    """
    num_tokens = assignment.num_tokens
    config.check_guidance(num_tokens)
    path = _Trajectory(velocity, noise, labels, null_label, assignment, config, tree, contrasts)
    start = path.start(config.length_at(0.0, num_tokens))
    z_t = integrate(start, path.guided, config, num_tokens, path.grow, on_step)
    return assignment.unmerge(z_t)


def sample_latents(
    velocity: Velocity,
    tree: MergeTree,
    seed: int,
    image_indices: Tensor,
    labels: Tensor,
    null_label: int,
    num_tokens: int,
    latent_dim: int,
    config: SamplerConfig,
    scale: NoiseScale = NoiseScale.CORRECTED,
    contrasts: ContrastStats | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Latents of the images with these indices, from their noise on.

    Shapes: image_indices, labels [B] int64 (the device of `labels` is where it runs)
    -> unmerged latents [B, N, D], standardised.
    Raises: ConfigError for a length outside the tree, or a method that this generator's noise
    does not allow; CheckpointError if the contrasts are missing.
    """
    check_nested(config, num_tokens, tree, scale, contrasts)
    assignment = tree.assignment(num_tokens, labels.device)
    noise = initial_noise(seed, image_indices, assignment, latent_dim, scale).to(labels.device)
    return sample(velocity, noise, labels, null_label, assignment, config, tree, contrasts, on_step)


def check_nested(
    config: SamplerConfig,
    num_tokens: int,
    tree: MergeTree,
    scale: NoiseScale,
    contrasts: ContrastStats | None,
) -> None:
    """Refuse what a generator cannot do, before anything is computed.

    Raises: ConfigError for a length outside the tree, autoguidance without a weaker branch, or a
    second length under legacy noise; CheckpointError if the contrasts are missing.
    """
    config.check_guidance(num_tokens)
    for length in config.rows(num_tokens):
        tree.assignment(length)
    if config.nested and scale == NoiseScale.LEGACY:
        raise ConfigError(
            "sampler: uncond_num_tokens and length_schedule need a generator trained with "
            "noise_scale 'corrected'; with 'legacy' noise a merged state is not a state at the "
            "smaller length"
        )
    grows = len({length for _, length in config.length_schedule}) > 1
    if grows and contrasts is None:
        raise CheckpointError(
            "length_schedule: the latent statistics hold no contrasts of the merge tree, which a "
            "growing length draws its new tokens from. Encode the latents again with "
            "data_tools/encode_latents.py, and export the bundle again"
        )
