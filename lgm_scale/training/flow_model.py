"""What training a generator by rectified flow is, whatever its state looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lgm_scale.config.schema import FlowObjectiveConfig
from lgm_scale.flow import interpolate, sample_timesteps, training_keys, velocity_target
from lgm_scale.mean_flow import adaptively_weighted, mean_flow_velocity, sample_spans
from lgm_scale.randomness import Purpose, keyed_uniform
from lgm_scale.training.model import TrainingModel

TIMESTEP_BINS = tuple(f"loss/t={low:.2f}-{low + 0.25:.2f}" for low in (0.0, 0.25, 0.5, 0.75))
"""Names of the four equal parts of [0, 1] by which the loss is reported, besides its mean."""


def timestep_bins(t: Tensor) -> Tensor:
    """Which of `TIMESTEP_BINS` a sample is in; t = 1 is in the last.

    Shapes: t [B] in [0, 1] -> [B] int64.
    """
    return (t * len(TIMESTEP_BINS)).long().clamp(0, len(TIMESTEP_BINS) - 1)


class Draws(NamedTuple):
    """What the samples of a step draw. Shapes: each keys[purpose], t and labels [B]."""

    keys: dict[Purpose, Tensor]
    t: Tensor
    labels: Tensor


class Predicted(NamedTuple):
    """A prediction, what it is compared with, and when. Shapes: as the state twice, t [B]."""

    v_pred: Tensor
    v_target: Tensor
    t: Tensor


class FlowModel(TrainingModel):
    """What training a generator by rectified flow is, whatever its state looks like.

    Args:
        net: The network; a direct child, which is what Composer's sharding wraps.
        objective: Law of the timesteps, and share of the unconditional branch.
        seed: Seed of noise, timesteps and label dropout.
    """

    def __init__(self, net: nn.Module, objective: FlowObjectiveConfig, seed: int) -> None:
        super().__init__(net)
        self.objective = objective
        self.seed = seed

    def draw(self, batch: dict[str, Any]) -> Draws:
        """Times and labels of this step, and the keys of everything else."""
        others = () if self.objective.mean_flow is None else (Purpose.END_TIME,)
        keys = training_keys(self.seed, batch["step"], batch["sample_ids"], *others)
        law = self.objective.timestep_mean, self.objective.timestep_std
        t = sample_timesteps(keys[Purpose.TIMESTEP], *law)
        dropped = keyed_uniform(keys[Purpose.LABEL_DROPOUT]) < self.objective.label_dropout
        return Draws(keys, t, torch.where(dropped, self.net.null_label, batch["labels"]))

    def predict(
        self,
        net: Callable[..., Tensor],
        z: Tensor,
        noise: Tensor,
        draws: Draws,
        sizes: Tensor | None = None,
        spread: Callable[[Tensor], Tensor] = lambda times: times,
    ) -> Predicted:
        """The network's velocity on the way from noise to z; with `mean_flow`, as its average says.

        `net` is (z_t, t, labels, and with `mean_flow` end) -> velocity. Guidance is divided by
        `sizes`, those of merged tokens relative to their mean.

        Shapes: z and noise [B, ...], sizes [K, 1] -> as z twice, [B]. Of samples that lie packed
        z and noise are [T, D], sizes [T, 1], and `spread` gives every token its sample's time.
        """
        keys, t, labels = draws
        flow = self.objective.mean_flow
        if flow is None:
            target = velocity_target(z, noise)
            return Predicted(net(interpolate(z, noise, spread(t)), t, labels), target, t)
        law = self.objective.timestep_mean, self.objective.timestep_std
        t, end = sample_spans(keys[Purpose.END_TIME], t, flow.share, *law)
        guidance = 1 + (flow.guidance - 1) / (1.0 if sizes is None else sizes)
        v_pred, v_target = mean_flow_velocity(
            net, interpolate(z, noise, spread(t)), (t, end), labels, self.net.null_label,
            velocity_target(z, noise), guidance, spread,
        )  # fmt: skip
        return Predicted(v_pred, v_target, t)

    @override
    def below_zero(self) -> str:
        if not self.objective.contrastive:
            return ""
        return "a loss below 0 is no error: objective.contrastive takes a distance off"

    def noted(
        self, loss: Tensor, t: Tensor, terms: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Tensor:
        """The mean of a loss per sample, which is noted by time as well. Shapes: [B] x 2 -> [].

        `terms` are others of the step, scalars, which are noted beside it. With
        `mean_flow.adaptive` samples are weighted; what is noted is without weights.
        """
        self.record.add(len(loss), {"loss": loss.mean(), **terms})
        self.record.add_groups(TIMESTEP_BINS, timestep_bins(t), loss)
        flow = self.objective.mean_flow
        return adaptively_weighted(loss, 0.0 if flow is None else flow.adaptive).mean()
