"""Alignment of the network's features with those of the tokenizer's encoder, while it is young.

A linear layer is to find, in what the K tokens are after some block, where the teacher's features
of these tokens point. What is a constant of the token, which positions alone tell, is taken off the
teacher's; they are normalised over the N tokens, and merged as the latents are.

Source: REPA (arXiv 2410.06940) in iREPA's form (arXiv 2512.10794), whose convolution has no meaning
for tokens that are no places: a layer per token stands for it. Early stop: arXiv 2505.16792. The
tokenizer as teacher, the constant, and features that are merged: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lgm_scale.families.lgm.config import FeatureAlignmentConfig
from lgm_scale.merging.tree import MergeAssignment

EPS = 1e-6


def normalised(features: Tensor) -> Tensor:
    """Every channel of an image with mean 0 and deviation 1 over the tokens. Shapes: [B, N, C]."""
    centred = features - features.mean(-2, keepdim=True)
    return centred / centred.square().mean(-2, keepdim=True).sqrt().clamp_min(EPS)


def feature_distance(found: Tensor, teacher: Tensor, assignment: MergeAssignment) -> Tensor:
    """One minus the cosine between tokens, each weighted by what it stands for.

    Shapes: found [B, K, C], teacher [B, N, C] -> [B].
    """
    cosine = F.cosine_similarity(found.float(), assignment.merge(teacher), dim=-1)  # [B, K]
    return ((1 - cosine) * assignment.sizes).sum(-1) / assignment.num_base_tokens


class FeatureAlignment:
    """A network called for its velocity, whose features are compared with the teacher's besides.

    For one micro-batch, in whose forward pass it is made.

    Args:
        net: The network.
        layer: From its features to the teacher's.
        config: Of which block, and until when.
        means: The teacher's mean features of each token, [N, C].
        batch: The micro-batch, with features [B, N, C] of the teacher.
    """

    def __init__(
        self,
        net: nn.Module,
        layer: nn.Linear,
        config: FeatureAlignmentConfig,
        means: Tensor,
        batch: dict[str, Any],
    ) -> None:
        self.net, self.layer, self.config = net, layer, config
        on = batch["step"] < config.steps
        self.teacher = normalised(batch["features"].float() - means) if on else None
        self.distances: list[Tensor] = []
        """Of the samples at each K, [B_g]; zeros once the alignment is over."""

    def __call__(
        self,
        z_t: Tensor | Sequence[Tensor],
        t: Tensor,
        labels: Tensor,
        assignment: MergeAssignment | Sequence[MergeAssignment],
    ) -> Any:
        """The velocity, as the network gives it; see `MergeDiT`."""
        several = not isinstance(assignment, MergeAssignment)
        counts = [len(z) for z in z_t] if several else [len(t)]
        if self.teacher is None:
            # A zero gradient, not none: DDP waits for one, and its weights stay in the state.
            nothing = t.new_zeros(len(t), self.layer.in_features)
            self.distances = list((0.0 * self.layer(nothing).float().sum(-1)).split(counts))
            return self.net(z_t, t, labels, assignment)
        velocity, features = self.net(z_t, t, labels, assignment, features_after=self.config.block)
        cuts, groups = (assignment, features) if several else ([assignment], [features])
        self.distances = [
            feature_distance(self.layer(own), teacher, cut)
            for own, teacher, cut in zip(groups, self.teacher.split(counts), cuts, strict=True)
        ]
        return velocity
