"""Losses of a step, kept on the device until somebody reads them."""

from __future__ import annotations

import torch
from torch import Tensor


class LossRecord:
    """Mean of each loss term over the micro-batches of a step, weighted by their samples.

    A step's terms may differ from the last step's (no alignment loss at K = N); within a step
    they are the same.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._samples = 0
        self._notes: dict[str, Tensor] = {}
        self._groups: dict[str, Tensor] = {}
        self.latest: dict[str, Tensor] = {}
        """Terms of the last micro-batch."""

    def add(self, num_samples: int, terms: dict[str, Tensor]) -> None:
        """Note the terms of one micro-batch, scalars, which are detached. No synchronisation."""
        self.latest = {name: term.detach().float() for name, term in terms.items()}
        for name, term in self.latest.items():
            weighted = term * num_samples
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
        self._samples += num_samples

    def add_groups(self, names: tuple[str, ...], group: Tensor, values: Tensor) -> None:
        """Note the values of a micro-batch's samples by group. No synchronisation.

        Groups keep sums and counts, not means: over micro-batches and ranks, of which some have
        no sample in a group, a mean of means would be wrong.

        Shapes: group [B] int64 in [0, len(names)), values [B].
        """
        members = group[None, :] == torch.arange(len(names), device=group.device)[:, None]
        values = values.detach().float()
        sums = torch.where(members, values, 0.0).sum(-1)  # [G]; a NaN stays in its group
        for name, pair in zip(names, torch.stack((sums, members.sum(-1).float()), -1), strict=True):
            self._add_pair(name, pair)

    def add_group(self, name: str, values: Tensor) -> None:
        """Note the values [B_g] of a group's samples, of which there may be none. No wait.

        Ranks must note equal groups in equal order, for their sums are added up.
        """
        values = values.detach().float()
        self._add_pair(name, torch.stack((values, torch.ones_like(values))).sum(-1))

    def _add_pair(self, name: str, pair: Tensor) -> None:
        self._groups[name] = self._groups[name] + pair if name in self._groups else pair

    def take_groups(self) -> dict[str, Tensor]:
        """Hand out sum and count of each group of the step, [2], and start anew."""
        groups, self._groups = self._groups, {}
        return groups

    def note(self, name: str, value: Tensor) -> None:
        """Note what a step has once, such as a gradient norm."""
        self._notes[name] = value.detach().float()

    def notes(self) -> dict[str, Tensor]:
        """What was noted for this step, so far."""
        return dict(self._notes)

    def take(self) -> dict[str, Tensor]:
        """Hand out the step's means and notes, and start anew."""
        means = {name: total / self._samples for name, total in self._sums.items()} | self._notes
        self._sums, self._samples, self._notes = {}, 0, {}
        return means
