"""Which token length a training step runs at: a pure function of (seed, step).

Every rank computes the same K, so no rank waits for a longer one, and a resumed run goes on with
the lengths it would have had. (The authors' release draws K per rank; the distribution is the
same.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lgm_scale.randomness import Purpose, keyed_uniform, stream_keys


class LengthSchedule:
    """A cycle through `choices` (K, which may repeat), or with `weights` a draw per step.

    Before step `longest_first` every step runs at the largest choice.
    """

    def __init__(
        self,
        choices: Sequence[int],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        longest_first: int = 0,
    ) -> None:
        self.choices = tuple(choices)
        self.seed = seed
        self.longest_first = longest_first
        self.probabilities = None
        if weights is not None:
            self.probabilities = np.asarray(weights, dtype=np.float64) / sum(weights)

    def num_tokens(self, step: int) -> int:
        """The length K of a step; steps count from 0."""
        if step < self.longest_first:
            return max(self.choices)
        if self.probabilities is None:
            return self.choices[step % len(self.choices)]
        # A generator made anew from its key has no state that a resume would have to carry.
        rng = np.random.default_rng([self.seed, int(Purpose.LENGTH), step])
        return self.choices[rng.choice(len(self.choices), p=self.probabilities)]

    def per_sample(self, step: int, sample_ids: Tensor) -> Tensor:
        """One draw per image, keyed on (seed, step, sample): [B] int64 -> K [B] int64.

        Nothing is copied to the host. A schedule without weights draws evenly.
        """
        if step < self.longest_first:
            return torch.full_like(sample_ids, max(self.choices))
        uniform = keyed_uniform(stream_keys(self.seed, Purpose.LENGTH, step, sample_ids))  # [B]
        shares = self.probabilities
        if shares is None:
            shares = np.full(len(self.choices), 1 / len(self.choices))
        # The inverse of the cumulative distribution, by tensors alone: [len(choices) - 1] bounds.
        bounds = torch.tensor(np.cumsum(shares)[:-1], device=uniform.device, dtype=torch.float32)
        choices = torch.tensor(self.choices, device=uniform.device)
        return choices[torch.bucketize(uniform, bounds)]


def spread_lengths(
    choices: Sequence[int], batch_size: int, first: int = 0, every: int = 1
) -> list[int]:
    """K of the samples at places `first`, `first + every`, ... of a global batch, falling.

    Every step holds all of `choices`, each at an equal share of the places, the longest first. A
    rank reads every n-th place, and a micro-batch every n-th sample of a rank: both hold all
    lengths in these shares, to one sample each, and no rank has longer to compute than another.
    The lengths of a global batch do not depend on the number of ranks. The first has the most
    tokens.
    """
    ordered = sorted(choices, reverse=True)
    places = range(first, batch_size, every)
    return [ordered[place * len(ordered) // batch_size] for place in places]


def loader_batches(schedule: LengthSchedule, num_tokens: int) -> int:
    """Number of the stream's batches that a step at `num_tokens` takes."""
    return max(schedule.choices) // num_tokens


def steps_per_epoch(schedule: LengthSchedule, num_batches: int) -> int:
    """The most steps that an epoch of `num_batches` of the stream's batches can make.

    An epoch may begin anywhere in the cycle of lengths, and the worst beginning counts. The true
    number is less by a few steps of one cycle.
    """
    cycle = [loader_batches(schedule, k) for k in schedule.choices]
    rounds, rest = divmod(num_batches, sum(cycle))
    most = 0
    for first in range(len(cycle)):
        left, steps = rest, 0
        while left > 0:
            left -= cycle[(first + steps) % len(cycle)]
            steps += 1
        most = max(most, steps)
    return rounds * len(cycle) + most
