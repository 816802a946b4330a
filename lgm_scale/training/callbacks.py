"""What happens around a step: its token length, and a record that costs no synchronisation."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import statistics
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer.core import Callback, State, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lgm_scale.parallel.collectives import on_rank_zero
from lgm_scale.storage.files import write_whole
from lgm_scale.training.length_schedule import LengthSchedule
from lgm_scale.training.record import LossRecord

log = logging.getLogger("lgm_scale")


class StepKeys(Callback):
    """Put `step` and `num_tokens` into the batch, as ints: micro-batching leaves ints whole.

    Args:
        per_sample: Whether each sample draws a length of its own: `num_tokens` is then a tensor
            [B], which micro-batching cuts like the images.
        spread: Lengths of this rank's samples, where every step holds all lengths
            (`spread_lengths`): `num_tokens` is then this list, which stays on the host.
    """

    def __init__(
        self,
        schedule: LengthSchedule,
        per_sample: bool = False,
        spread: Sequence[int] | None = None,
    ) -> None:
        self.schedule = schedule
        self.per_sample = per_sample
        self.spread = spread

    def batch_start(self, state: State, logger: Logger) -> None:
        """Key the batch before it is cut into micro-batches."""
        step = state.timestamp.batch.value
        state.batch["step"] = step
        if self.spread is not None:
            state.batch["num_tokens"] = list(self.spread)
        elif self.per_sample:
            state.batch["num_tokens"] = self.schedule.per_sample(step, state.batch["sample_ids"])
        else:
            state.batch["num_tokens"] = self.schedule.num_tokens(step)


class _Step(NamedTuple):
    """A line to be, and what of it is still on the device."""

    row: dict[str, Any]
    terms: dict[str, Tensor]
    groups: dict[str, Tensor]


class MetricsLog(Callback):
    """One JSON line per step in `metrics.jsonl`, one console line per interval.

    Loggers get the numbers of each step as `train/<key of the line>`, and the loss once more under
    the step's length, `loss/K=<K>`, with its parts by timestep.

    Losses stay on the device until the end of an interval and come over in one transfer. With
    several ranks they are averaged over the ranks then. A group of samples (a part of the
    timesteps) that had no sample in a step is left out of its line. A resume state is preceded
    by a flush, and a resumed run drops the lines of steps that it runs again: the file holds each
    step once.

    Args:
        path: The JSONL file; only rank 0 writes.
        interval: Steps between transfers.
        progress_bar: Whether rank 0 shows a bar over the whole run.
        labels: What every line says about the run as a whole.
        below_zero: What a loss below 0 means; the console says it once, when there is one.
        before_writing: Called on rank 0 before lines are written; what it raises, all ranks raise.
            A process that was replaced by another one finds out here that it must not write.
    """

    def __init__(
        self,
        path: Path,
        interval: int,
        record: LossRecord,
        progress_bar: bool = False,
        labels: dict[str, Any] | None = None,
        below_zero: str = "",
        before_writing: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = path
        self.interval = interval
        self.record = record
        self.progress_bar = progress_bar
        self.labels = labels or {}
        self.below_zero = below_zero
        self.before_writing = before_writing
        self._bar: tqdm | None = None
        self._pending: list[_Step] = []
        self._clock = 0.0
        self._run: tuple[State, Logger] | None = None
        self._spikes = SpikeWatch()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop the lines of steps that will run again, for the file holds each step once."""
        self._clock, self._run = time.monotonic(), (state, logger)
        if dist.get_global_rank() != 0:
            return
        if self.progress_bar:
            self._bar = _bar(state)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            first = state.timestamp.batch.value
            write_whole(self.path, "".join(line for line in lines if _step_of(line) < first))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Note the step; flush at the end of an interval."""
        batch: Any = state.batch
        row = {
            "step": state.timestamp.batch.value - 1,  # the timestamp has advanced
            "num_tokens": batch["num_tokens"] if isinstance(batch["num_tokens"], int) else "mixed",
            "lr": state.optimizers[0].param_groups[0]["lr"],
            **self.labels,
        }
        self._pending.append(_Step(row, self.record.take(), self.record.take_groups()))
        if self._bar is not None:
            self._bar.update()
        if len(self._pending) >= self.interval:
            self._flush()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write what is left."""
        self._flush()
        if self._bar is not None:
            self._bar.close()

    def state_dict(self) -> dict[str, Any]:
        """A resume state is being made, on all ranks: leave nothing in memory alone."""
        self._flush()
        return {}

    def _flush(self) -> None:
        if not self._pending or self._run is None:
            return
        _, logger = self._run
        steps, self._pending = self._pending, []
        values = torch.stack([term for step in steps for term in step.terms.values()])
        sums = torch.cat(
            [values.new_empty(0), *(p for step in steps for p in step.groups.values())]
        )
        if dist.get_world_size() > 1:
            dist.all_reduce(values)
            values /= dist.get_world_size()
            if sums.numel():
                dist.all_reduce(sums)
        numbers = iter(torch.cat((values, sums)).tolist())  # the interval's one synchronisation
        rows = [step.row | {name: next(numbers) for name in step.terms} for step in steps]
        groups = [{name: (next(numbers), next(numbers)) for name in s.groups} for s in steps]
        means = [{name: s / n for name, (s, n) in pairs.items() if n} for pairs in groups]
        seconds, self._clock = time.monotonic() - self._clock, time.monotonic()
        for step, row, parts in zip(steps, rows, means, strict=True):
            key = f"loss/K={row['num_tokens']}"
            by_part = {  # a part that is a length has its own name already
                name if name.startswith("loss/K=") else name.replace("loss", key, 1): mean
                for name, mean in parts.items()
            }
            numbers = {f"train/{name}": row[name] for name in ("lr", *step.terms)}
            logger.log_metrics({key: row["loss"]} | by_part | numbers, step=row["step"])
        rows = [row | parts for row, parts in zip(rows, means, strict=True)]
        on_rank_zero(self.before_writing)
        if dist.get_global_rank() == 0:
            with self.path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            with logging_redirect_tqdm():
                log.info(_line(rows, len(rows) / max(seconds, 1e-9)))
                if self.below_zero and min(row["loss"] for row in rows) < 0:
                    log.info(self.below_zero)
                    self.below_zero = ""
                for row in rows:
                    spike = self._spikes.look(row["step"], row["num_tokens"], row["loss"])
                    if spike is not None:
                        log.warning(spike)


class SpikeWatch:
    """Compares each loss with the last ones at the same token length. Ours.

    A spike is a loss above their mean by more than six of their standard deviations. It is no
    error: the run goes on, and a person may want to look. Spikes are not taken into the window,
    where one would hide the next; three in a row are no spikes but a new level, from which a new
    window begins.
    """

    WINDOW, LEAST, DEVIATIONS, LEVEL = 50, 20, 6.0, 3

    def __init__(self) -> None:
        self._losses: dict[int | str, deque[float]] = defaultdict(lambda: deque(maxlen=self.WINDOW))
        self._spikes: Counter[int | str] = Counter()

    def look(self, step: int, num_tokens: int | str, loss: float) -> str | None:
        """One line if this loss is a spike."""
        before = self._losses[num_tokens]
        if len(before) >= self.LEAST:
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            if loss > mean + self.DEVIATIONS * deviation:
                line = (
                    f"loss spike at step {step}, K = {num_tokens}: {loss:.4f}, where the last "
                    f"{len(before)} losses are {mean:.4f} +- {deviation:.4f}"
                )
                self._spikes[num_tokens] += 1
                if self._spikes[num_tokens] == self.LEVEL:
                    line += f"; {self.LEVEL} in a row, so later ones are compared with what follows"
                    before.clear()
                    self._spikes[num_tokens] = 0
                return line
        self._spikes[num_tokens] = 0
        before.append(loss)
        return None


def _step_of(line: str) -> float:
    """Step of a JSON line; a torn last line counts as to be dropped."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf


def _line(rows: list[dict[str, Any]], steps_per_second: float) -> str:
    """`step 400 | loss at K=8: 0.11  16: 0.16 | 9.8 steps/s`."""
    by_length: dict[int, list[float]] = {}
    for row in rows:
        by_length.setdefault(row["num_tokens"], []).append(row["loss"])
    means = "  ".join(f"{k}: {sum(v) / len(v):.4f}" for k, v in sorted(by_length.items()))
    return f"step {rows[-1]['step'] + 1} | loss at K={means} | {steps_per_second:.2f} steps/s"


class _Bar(tqdm):
    """A bar that falls silent when nobody reads it any more (`2>&1 | head`): a run goes on."""

    def display(self, *args: Any, **options: Any) -> None:
        try:
            super().display(*args, **options)
        except BrokenPipeError:
            self.disable = True

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            super().close()


def _bar(state: State) -> tqdm:
    """A bar in steps (or, with a duration in epochs, the steps of all epochs).

    A file gets a line every half minute instead of one per step.
    """
    limit = state.max_duration
    total = limit.value if limit is not None else None
    if limit is not None and limit.unit is TimeUnit.EPOCH:
        per_epoch = state.dataloader_len
        total = limit.value * per_epoch.value if per_epoch is not None else None
    return _Bar(
        total=total,
        initial=state.timestamp.batch.value,
        desc="train",
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )
