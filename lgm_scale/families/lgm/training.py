"""The generator as Composer trains it: merge, noise, velocity, size-weighted error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgm_scale.families.lgm.config import LGMObjectiveConfig
from lgm_scale.families.lgm.data import LatentStats
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.flow import NoiseScale, flow_loss, interpolate, merged_noise, velocity_target
from lgm_scale.merging.nesting import nested_cuts
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
        net: The diffusion transformer.
        tree: Merge tree of the tokenizer that made the latents.
        stats: Statistics of the latents.
        objective: Also whether noise is merged like the data, or drawn per token.
        middle: With nested routing, K' of a step.
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
        stats: LatentStats,
        objective: LGMObjectiveConfig,
        seed: int,
        middle: Callable[[int], int] | None = None,
    ) -> None:
        super().__init__(net, objective, seed)
        self.middle = middle
        self.tree = tree
        self.noise_scale = NoiseScale(objective.noise_scale)
        self.register_buffer("latent_mean", stats.mean.float())
        self.register_buffer("latent_std", stats.std.float())
        self.register_buffer("merge_tree", tree.merges.clone())

    def forward(self, batch: dict[str, Any]) -> LGMOutput:
        """Draw noise and t for this step, and predict the velocity."""
        z = (batch["latents"].float() - self.latent_mean) / self.latent_std  # [B, N, D]
        assignment = self.tree.assignment(batch["num_tokens"], z.device)
        keys, t, labels = self.draw(batch)
        noise = merged_noise(keys[Purpose.NOISE], assignment, z.shape[-1], self.noise_scale)
        z_merged = assignment.merge(z)  # [B, K, D]
        net: Callable[..., Tensor] = self.net
        if self.middle is not None:
            inner = self.middle(batch["step"])
            cuts = nested_cuts(self.tree, assignment.num_tokens, inner, z.device)
            net = partial(net, middle=cuts)
        v_pred = net(interpolate(z_merged, noise, t), t, labels, assignment)
        return LGMOutput(v_pred, velocity_target(z_merged, noise), assignment, t)

    def loss(self, outputs: LGMOutput, batch: dict[str, Any]) -> Tensor:
        """Mean over the batch of the size-weighted squared error."""
        loss = flow_loss(outputs.v_pred, outputs.v_target, outputs.assignment, self.noise_scale)
        if self.middle is not None:
            name = f"loss/middle={self.middle(batch['step'])}"
            self.record.add_groups((name,), torch.zeros_like(outputs.t).long(), loss)
        return self.noted(loss, outputs.t)
