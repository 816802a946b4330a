"""Notice a loss that stands out from those before it."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

__all__ = ["SpikeWatch"]

WINDOW = 50
LEAST = 20
DEVIATIONS = 6.0


class SpikeWatch:
    """Compares each loss with the last ones at the same token length. Ours.

    A spike is a loss above their mean by more than six of their standard deviations. It is no
    error: the run goes on, and a person may want to look. Spikes are not taken into the window.
    """

    def __init__(self) -> None:
        self._losses: dict[int | str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def look(self, step: int, num_tokens: int | str, loss: float) -> str | None:
        """One line if this loss is a spike."""
        before = self._losses[num_tokens]
        if len(before) >= LEAST:
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            if loss > mean + DEVIATIONS * deviation:
                return (
                    f"loss spike at step {step}, K = {num_tokens}: {loss:.4f}, where the last "
                    f"{len(before)} losses are {mean:.4f} +- {deviation:.4f}"
                )
        before.append(loss)
        return None
