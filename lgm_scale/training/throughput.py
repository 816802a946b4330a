"""How fast a training run is, per token length, what it waits for, and the memory it takes."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

# A backward pass costs two forward passes: of each product, the gradient to the input and that to
# the weight.
_BACKWARD = 2


class _CudaClock:
    """Marks in the device's own queue, each reached when the work before it is done.

    The host runs ahead of a GPU: its own clock would time how fast steps are queued.
    """

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream())
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()  # waits for the work up to this mark, not for what was queued after it
        return start.elapsed_time(end) / 1e3


class _WallClock:
    """For a CPU, which is done with a step when the call returns."""

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        return end - start


_Lengths = int | list[int] | Tensor
"""K of a step, or of each image of this rank."""


@dataclass
class _Sum:
    """Images of all ranks, and the seconds that they took."""

    images: int = 0
    seconds: float = 0.0


class Throughput(Callback):
    """Log speed once per interval.

    Keys: `throughput/images_per_second` and `throughput/mfu`, over the whole interval with its
    waiting for data, and `throughput/K=64/{images_per_second, tokens_per_second, mfu}`, over the
    steps at that length. All ranks together; every step has one K on all ranks.

    Steps with one K per image (`lengths.per_sample`) have no lines per K, for their time cannot be
    told apart by image. They count in the interval's totals, which then have
    `throughput/tokens_per_second`, too; where K is drawn (int64 [B]), this rank's lengths stand for
    those of all ranks.

    A step costs two marks in the device's queue; they are read at the end of an interval, where
    the metrics wait for the device anyway.

    Args:
        interval: Steps between reports.
        flops_per_image: Operations of one forward pass at K tokens, a multiply-add being two.
        peak_flops: Operations per second of one device, as its maker states them. None: model
            FLOPs utilisation (mfu) is not reported.
        spread: K of every image of a step of all ranks, where K is a list in the batch.
    """

    def __init__(
        self,
        interval: int,
        flops_per_image: Callable[[int], float],
        peak_flops: float | None = None,
        spread: Sequence[int] = (),
    ) -> None:
        self.interval = interval
        self.flops_per_image = flops_per_image
        self.peak_flops = peak_flops
        self.spread = Counter(spread)
        self._clock = _CudaClock() if torch.cuda.is_available() else _WallClock()
        self._steps: list[tuple[_Lengths, int, Any, Any]] = []  # K, images, start, end
        self._start: Any = None
        self._interval_start: Any = None
        self._num_tokens: _Lengths = 0
        self._images = 0

    def batch_start(self, state: State, logger: Logger) -> None:
        """Mark the start of a step, and of the interval. The batch is still whole here."""
        self._num_tokens = state.batch["num_tokens"]
        self._images = len(state.batch["sample_ids"]) * dist.get_world_size()
        self._start = self._clock.mark()
        if self._interval_start is None:
            self._interval_start = self._start

    def batch_end(self, state: State, logger: Logger) -> None:
        """Mark the end of a step; report at the end of an interval."""
        end = self._clock.mark()
        self._steps.append((self._num_tokens, self._images, self._start, end))
        if len(self._steps) >= self.interval:
            metrics = self._metrics()
            # The next interval starts here: data that is waited for now is part of it.
            self._steps, self._interval_start = [], end
            logger.log_metrics(metrics)

    def _metrics(self) -> dict[str, float]:
        sums: dict[int, _Sum] = defaultdict(_Sum)
        last = self._steps[-1][3]
        whole = _Sum(seconds=self._clock.seconds(self._interval_start, last))
        operations = 0.0
        mixed = [num_tokens for num_tokens, *_ in self._steps if isinstance(num_tokens, Tensor)]
        counts: Counter[int] = Counter()  # images of all ranks in steps with several K
        for num_tokens, images, start, end in self._steps:
            whole.images += images
            if isinstance(num_tokens, list):
                counts += self.spread
            elif not isinstance(num_tokens, Tensor):
                sums[num_tokens].images += images
                sums[num_tokens].seconds += self._clock.seconds(start, end)
                operations += images * self._step_flops(num_tokens)
        metrics = {"throughput/images_per_second": whole.images / whole.seconds}
        if mixed:  # one copy to the host, and the device is done with the interval by now
            counts += Counter(torch.cat(mixed * dist.get_world_size()).tolist())
        if counts:
            operations += sum(count * self._step_flops(k) for k, count in counts.items())
            tokens = sum(k * count for k, count in counts.items())
            metrics["throughput/tokens_per_second"] = tokens / whole.seconds
        metrics |= self._mfu("throughput", operations, whole.seconds)
        for num_tokens, part in sorted(sums.items()):
            key, rate = f"throughput/K={num_tokens}", part.images / part.seconds
            metrics[f"{key}/images_per_second"] = rate
            metrics[f"{key}/tokens_per_second"] = rate * num_tokens
            metrics |= self._mfu(key, part.images * self._step_flops(num_tokens), part.seconds)
        return metrics

    def _step_flops(self, num_tokens: int) -> float:
        return (1 + _BACKWARD) * self.flops_per_image(num_tokens)

    def _mfu(self, key: str, operations: float, seconds: float) -> dict[str, float]:
        if self.peak_flops is None:
            return {}
        return {f"{key}/mfu": operations / seconds / (self.peak_flops * dist.get_world_size())}


class Resources(Callback):
    """Log once per interval what steps waited for, and the memory in use.

    Keys: `data/wait_seconds`, how long a step waited for its batch, the mean over the interval;
    `data/wait_share`, that as a share of the interval's time; `memory/host_gib`, resident memory of
    the training process, its data workers not counted; `memory/gpu_peak_gib`, the most that
    tensors took on a GPU since the start. Of several ranks, the largest: all wait for the slowest.

    A step costs nothing: the loader counts by the host's clock. Ranks compare once per interval,
    where the metrics wait for the device anyway.

    Args:
        interval: Steps between reports.
        waited: Seconds that this rank has waited for data since the start.
    """

    def __init__(self, interval: int, waited: Callable[[], float]) -> None:
        self.interval, self.waited = interval, waited
        self._steps = 0
        self._began, self._waited = 0.0, 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start the clock."""
        self._began, self._waited = time.perf_counter(), self.waited()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Report at the end of an interval."""
        self._steps += 1
        if self._steps < self.interval:
            return
        now, waited = time.perf_counter(), self.waited()
        gib = {"memory/host_gib": psutil.Process().memory_info().rss}
        if torch.cuda.is_available():
            gib["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated()
        metrics = {
            "data/wait_seconds": (waited - self._waited) / self._steps,
            "data/wait_share": (waited - self._waited) / (now - self._began),
        } | {key: size / 2**30 for key, size in gib.items()}
        self._steps, self._began, self._waited = 0, now, waited
        if dist.get_world_size() > 1:
            values = state.device.tensor_to_device(torch.tensor([*metrics.values()]))
            dist.all_reduce(values, reduce_operation="MAX")
            metrics = dict(zip(metrics, values.tolist(), strict=True))
        logger.log_metrics(metrics)
