"""Losses of a step, kept on the device until somebody reads them."""

from __future__ import annotations

from torch import Tensor

__all__ = ["LossRecord"]


class LossRecord:
    """Mean of each loss term over the micro-batches of a step, weighted by their samples.

    A step's terms may differ from the last step's (no alignment loss at K = N); within a step
    they are the same.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._samples = 0
        self._notes: dict[str, Tensor] = {}
        self.latest: dict[str, Tensor] = {}
        """Terms of the last micro-batch."""

    def add(self, num_samples: int, terms: dict[str, Tensor]) -> None:
        """Note one micro-batch; terms are scalars and are detached. No synchronisation."""
        self.latest = {name: term.detach().float() for name, term in terms.items()}
        for name, term in self.latest.items():
            weighted = term * num_samples
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
        self._samples += num_samples

    def note(self, name: str, value: Tensor) -> None:
        """Note what a step has once, such as a gradient norm."""
        self._notes[name] = value.detach().float()

    def notes(self) -> dict[str, Tensor]:
        """What was noted for this step."""
        return dict(self._notes)

    def take(self) -> dict[str, Tensor]:
        """Means of the step with its notes, and start anew."""
        means = {name: total / self._samples for name, total in self._sums.items()} | self._notes
        self._sums, self._samples, self._notes = {}, 0, {}
        return means
