"""A network's evaluation as one CUDA graph: the host launches a graph where it launched kernels.

Small batches of few tokens leave a GPU waiting for its host, which launches over a thousand
kernels for one evaluation. The numbers are those of the kernels that were recorded: the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Recorder = Callable[[Callable[..., Tensor], list[Tensor]], tuple[Callable[[], object], Tensor]]
"""(function, its inputs) -> (what computes it again from the same inputs, where its result is)."""


def record_graph(call: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Any, Tensor]:
    """Record `call` on the current CUDA device, after one run in which libraries set up."""
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*inputs)
    return graph.replay, out


class ReplayedVelocity:
    """A velocity that is recorded once for each (batch size, cut), and replayed from then on.

    A graph reads and writes fixed memory: weights must stay where they are, and the last `keep`
    graphs hold what one evaluation needs. Shapes: those of the velocity.

    Args:
        velocity: (z_t, t, labels, assignment, maybe end) -> Tensor, without waiting for the GPU.
        record: Makes a graph.
        keep: Graphs at most; the oldest one goes.
    """

    def __init__(
        self, velocity: Callable[..., Tensor], record: Recorder = record_graph, keep: int = 8
    ) -> None:
        self.velocity, self.record, self.keep = velocity, record, keep
        self._graphs: dict[Any, tuple[list[Tensor], Callable[[], object], Tensor, Any]] = {}

    def __call__(
        self, z_t: Tensor, t: Tensor, labels: Tensor, assignment: Any, *end: Tensor
    ) -> Tensor:
        """Velocity at the state, which the caller may keep."""
        given = (z_t, t, labels, *end)
        # The cut is part of the graph, and kept with it: no other one has its identity then.
        key = (id(assignment), *((tuple(x.shape), x.dtype) for x in given))
        if key not in self._graphs:
            while len(self._graphs) >= self.keep:
                del self._graphs[next(iter(self._graphs))]
            inputs = [x.clone() for x in given]
            again, out = self.record(
                lambda z, s, y, *r: self.velocity(z, s, y, assignment, *r), inputs
            )
            self._graphs[key] = (inputs, again, out, assignment)
        inputs, again, out, _ = self._graphs[key]
        for mine, new in zip(inputs, given, strict=True):
            mine.copy_(new)
        again()
        return out.clone()  # the next replay writes there again
