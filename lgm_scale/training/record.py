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

    def add(self, num_samples: int, terms: dict[str, Tensor]) -> None:
        """Note one micro-batch; terms are scalars and are detached. No synchronisation."""
        for name, term in terms.items():
            weighted = term.detach().float() * num_samples
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
        self._samples += num_samples

    def take(self) -> dict[str, Tensor]:
        """Means of the step, and start anew."""
        means = {name: total / self._samples for name, total in self._sums.items()}
        self._sums, self._samples = {}, 0
        return means
