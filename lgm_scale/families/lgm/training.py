"""The generator as Composer trains it: merge, noise, velocity, size-weighted error."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lgm_scale.families.lgm.config import LGMObjectiveConfig
from lgm_scale.families.lgm.feature_alignment import FeatureAlignment
from lgm_scale.families.lgm.latent_stats import LatentStats
from lgm_scale.families.lgm.network import MergeDiT
from lgm_scale.flow import (
    NoiseScale,
    contrasted,
    flow_loss,
    merged_noise,
)
from lgm_scale.merging.tree import MergeAssignment, MergeTree
from lgm_scale.packing import Packing
from lgm_scale.randomness import Purpose
from lgm_scale.training.flow_model import Draws, FlowModel


class LGMOutput(NamedTuple):
    """Shapes: v_pred, v_target [B, K, D], t [B] in [0, 1]."""

    v_pred: Tensor
    v_target: Tensor
    assignment: MergeAssignment
    t: Tensor
    distance: Tensor | None = None
    """To the teacher's features, [B], in a run that aligns its own with them."""


class LGMTrainingModel(FlowModel):
    """Reads batches {latents [B, N, D], labels [B], sample_ids [B], step int, num_tokens int}.

    With lengths.per_sample num_tokens is a list of B ints, equal ones side by side, and an output
    a list of one for each of them. With objective.feature_alignment also features [B, N, C].

    Args:
        net: The diffusion transformer.
        tree: Merge tree of the tokenizer that made the latents.
        stats: Statistics of the latents.
        objective: Also whether noise is merged like the data, or drawn per token.
        lengths: Every K of a step that holds several.
        feature_means: Mean features of each token, [N, C], with objective.feature_alignment.
    """

    net: MergeDiT
    feature_layer: nn.Linear
    feature_means: Tensor
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
        lengths: Iterable[int] = (),
        feature_means: Tensor | None = None,
    ) -> None:
        super().__init__(net, objective, seed)
        self.tree = tree
        self.lengths = sorted(set(lengths))
        self.noise_scale = NoiseScale(objective.noise_scale)
        self.register_buffer("latent_mean", stats.mean.float())
        self.register_buffer("latent_std", stats.std.float())
        self.register_buffer("merge_tree", tree.merges.clone())
        self.alignment = objective.feature_alignment
        if self.alignment is not None:
            assert feature_means is not None
            self.feature_layer = nn.Linear(net.pos_embed.shape[-1], self.alignment.channels)
            self.register_buffer("feature_means", feature_means.float())
            self.fixed_buffers = (*self.fixed_buffers, "feature_means")

    def parameter_groups(self) -> dict[str, list[nn.Module]]:
        """The network, and what is trained beside it and goes into no bundle."""
        groups = super().parameter_groups()
        if self.alignment is not None:
            groups["feature_alignment"] = [self.feature_layer]
        return groups

    def forward(self, batch: dict[str, Any]) -> LGMOutput | list[LGMOutput]:
        """Draw noise and t for this step, and predict the velocity."""
        z = (batch["latents"].float() - self.latent_mean) / self.latent_std  # [B, N, D]
        draws = self.draw(batch)
        net = self._velocity(batch)
        if isinstance(batch["num_tokens"], list):
            return self._packed(net, z, draws, batch["num_tokens"])
        assignment = self.tree.assignment(batch["num_tokens"], z.device)
        noise = merged_noise(draws.keys[Purpose.NOISE], assignment, z.shape[-1], self.noise_scale)
        found = self.predict(
            lambda z_t, t, labels, *end: net(z_t, t, labels, assignment, *end),
            assignment.merge(z),  # [B, K, D]
            noise,
            draws,
            self.relative_sizes(assignment),
        )
        distances = net.distances if isinstance(net, FeatureAlignment) else ()
        return LGMOutput(found.v_pred, found.v_target, assignment, found.t, *distances)

    def _velocity(self, batch: dict[str, Any]) -> Any:
        """The network, or one that looks at its features in passing."""
        if self.alignment is None:
            return self.net
        means = self.feature_means
        return FeatureAlignment(self.net, self.feature_layer, self.alignment, means, batch)

    def _packed(self, net: Any, z: Tensor, draws: Draws, lengths: list[int]) -> list[LGMOutput]:
        """The same where every sample has a K of its own: the network runs once for all of them."""
        runs = {k: len(list(samples)) for k, samples in itertools.groupby(lengths)}
        cuts = [self.tree.assignment(k, z.device) for k in runs]
        layout = Packing(tuple(runs.values()), tuple(runs))
        noise_keys = layout.samples(draws.keys[Purpose.NOISE])

        def on_row(row: Tensor, t: Tensor, *others: Tensor) -> Tensor:
            times = len(t) // len(lengths)  # guidance asks for all samples twice, row after row
            groups = Packing(layout.counts * times, layout.lengths * times).groups(row)
            labels, *end = others
            return layout.join(net(groups, t, labels, cuts * times, *end))

        merged = [cut.merge(part) for cut, part in zip(cuts, layout.samples(z), strict=True)]
        drawn = zip(noise_keys, cuts, strict=True)
        noise = [merged_noise(*pair, z.shape[-1], self.noise_scale) for pair in drawn]
        found = self.predict(
            on_row,
            layout.join(merged),  # [T, D]
            layout.join(noise),
            draws,
            self._row_sizes(cuts, layout),
            layout.spread,
        )
        v_pred, v_target = layout.groups(found.v_pred), layout.groups(found.v_target)
        aligned = isinstance(net, FeatureAlignment)
        distances = net.distances if aligned else itertools.repeat(None)
        times = layout.samples(found.t)
        return list(map(LGMOutput, v_pred, v_target, cuts, times, distances))

    def relative_sizes(self, assignment: MergeAssignment) -> Tensor | None:
        """Sizes of the clusters relative to N / K, which guidance is divided by: [K, 1]."""
        if self.noise_scale is NoiseScale.LEGACY:  # guidance by size belongs to merged noise
            return None
        mean = assignment.num_base_tokens / assignment.num_tokens
        return assignment.sizes[:, None].float() / mean

    def _row_sizes(self, cuts: Sequence[MergeAssignment], layout: Packing) -> Tensor | None:
        """The same for every token of a packed row: [T, 1]."""
        sizes = [self.relative_sizes(cut) for cut in cuts]
        repeated = zip(sizes, layout.counts, strict=True)
        own = [each.repeat(count, 1) for each, count in repeated if each is not None]
        return torch.cat(own) if own else None

    def loss(self, outputs: LGMOutput | list[LGMOutput], batch: dict[str, Any]) -> Tensor:
        """Mean over the batch of the size-weighted squared error, contrasted; and alignment."""
        if self.alignment is None:
            return self._flow_loss(outputs, {})
        listed = [outputs] if isinstance(outputs, LGMOutput) else outputs
        distance = torch.cat([o.distance for o in listed if o.distance is not None]).mean()
        on = batch["step"] < self.alignment.steps
        terms = {"feature_alignment": distance} if on else {}
        return self._flow_loss(outputs, terms) + self.alignment.weight * distance

    def _flow_loss(self, outputs: LGMOutput | list[LGMOutput], terms: dict[str, Tensor]) -> Tensor:
        """The loss of the velocity, which is noted with other terms of the step."""
        if isinstance(outputs, LGMOutput):
            return self.noted(self._per_sample(outputs), outputs.t, terms)
        losses = list(map(self._per_sample, outputs))
        found = {o.assignment.num_tokens: loss for o, loss in zip(outputs, losses, strict=True)}
        for k in self.lengths:  # also those that are not here: ranks add up what they noted
            self.record.add_group(f"loss/K={k}", found.get(k, losses[0][:0]))
        return self.noted(torch.cat(losses), torch.cat([output.t for output in outputs]), terms)

    def _per_sample(self, output: LGMOutput) -> Tensor:
        sized = {"assignment": output.assignment, "scale": self.noise_scale}
        error = partial(flow_loss, output.v_pred, **sized)
        return contrasted(error, output.v_target, self.objective.contrastive)
