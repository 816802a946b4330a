"""The generator as Composer trains it: merge, noise, velocity, size-weighted error."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.flow import NoiseScale, flow_loss, interpolate, merged_noise, velocity_target
from lgm_scale.merging.tree import MergeAssignment, MergeTree
from lgm_scale.randomness import Purpose
from lgm_scale.training.flow_model import FlowModel


class LGMOutput(NamedTuple):
    """Shapes: v_pred, v_target [B, K, D], t [B] in [0, 1]."""

    v_pred: Tensor
    v_target: Tensor
    assignment: MergeAssignment
    t: Tensor


class LGMTrainingModel(FlowModel):
    """Reads batches {latents [B, N, D], labels [B], sample_ids [B], step int, num_tokens int}.

    Args:
        net: The diffusion transformer; a direct child, which is what Composer's sharding wraps.
        tree: Merge tree of the tokenizer that made the latents.
        mean: Per-channel mean of the latents, [D].
        std: Per-channel standard deviation of the latents, [D].
        noise_scale: Whether noise is merged like the data, or drawn per token; `flow.NoiseScale`.
        label_dropout: Share of samples that train the unconditional branch.
        timestep_mean: Mean of the normal law whose logistic function t is.
        timestep_std: Standard deviation of that law.
        seed: Seed of noise, timesteps and label dropout.
    """

    net: MergeDiT
    latent_mean: Tensor
    latent_std: Tensor
    # Given by the data. They are in the resume state, so that it never meets another data set.
    fixed_buffers = ("latent_mean", "latent_std", "merge_tree")

    def __init__(
        self,
        net: MergeDiT,
        tree: MergeTree,
        mean: Tensor,
        std: Tensor,
        noise_scale: NoiseScale,
        label_dropout: float,
        timestep_mean: float,
        timestep_std: float,
        seed: int,
    ) -> None:
        super().__init__(net, label_dropout, timestep_mean, timestep_std, seed)
        self.tree = tree
        self.noise_scale = noise_scale
        self.register_buffer("latent_mean", mean.float())
        self.register_buffer("latent_std", std.float())
        self.register_buffer("merge_tree", tree.merges.clone())

    def forward(self, batch: dict[str, Any]) -> LGMOutput:
        """Draw noise and t for this step, and predict the velocity."""
        z = (batch["latents"].float() - self.latent_mean) / self.latent_std  # [B, N, D]
        assignment = self.tree.assignment(batch["num_tokens"], z.device)
        keys, t, labels = self.draw(batch)
        noise = merged_noise(keys[Purpose.NOISE], assignment, z.shape[-1], self.noise_scale)
        z_merged = assignment.merge(z)  # [B, K, D]
        v_pred = self.net(interpolate(z_merged, noise, t), t, labels, assignment)
        return LGMOutput(v_pred, velocity_target(z_merged, noise), assignment, t)

    def loss(self, outputs: LGMOutput, batch: dict[str, Any]) -> Tensor:
        """Mean over the batch of the size-weighted squared error."""
        loss = flow_loss(outputs.v_pred, outputs.v_target, outputs.assignment, self.noise_scale)
        return self.noted(loss, outputs.t)
