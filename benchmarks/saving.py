"""Time that a training loses to its resume states: written while it waits, and beside it.

    python -m benchmarks.saving --size s --interval 20

Two ranks under DDP over gloo on CPU, each with half of the state. A round is `--interval` training
steps (forward, backward, AdamW, moving average); the rounds alternate between no state, a state
that is waited for, and one that is written beside the steps. What the main threads are held up is
timed by itself, on the slower rank: on shared cores rounds differ by more than a state costs. Its
own processor time of that is the copy, nearly all of it; the rest are waits, for the other rank, a
free core, or the disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from composer.core import State
from composer.devices import DeviceCPU
from composer.loggers import Logger

from benchmarks.harness import alternating_medians, command_line, on_ranks, print_table
from benchmarks.scaling import STRATEGIES, Step
from lgm_scale.checkpoint.checkpointer import Checkpointer
from lgm_scale.errors import exit_on_user_error
from lgm_scale.families.lgm.config import DIT_SIZES
from lgm_scale.parallel.shards import local_shards
from lgm_scale.storage.stores import Storage
from lgm_scale.training.ema import EMA
from lgm_scale.training.stopping import StopRequest

TIMEOUT_SECONDS = 300


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = command_line("saving", __doc__, repeats=3)
    parser.add_argument("--size", choices=list(DIT_SIZES), default="s")
    parser.add_argument("--interval", type=int, default=20, help="steps from state to state")
    parser.add_argument("--batch-size", type=int, default=4, help="per rank")
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where states go (default: a temporary folder)")
    return parser.parse_args()


class Training:
    """Rounds of steps of one rank, and how long its main thread was held up in each."""

    def __init__(self, args: argparse.Namespace, folder: str, stop: StopRequest) -> None:
        self.step, self.stop, self.interval = Step(STRATEGIES["ddp"], args), stop, args.interval
        self.state = State(
            model=self.step.model,
            rank_zero_seed=0,
            run_name="saving",
            device=DeviceCPU(),
            optimizers=self.step.optimizer,
            max_duration="1ep",
        )
        self.logger = Logger(self.state)
        self.ema = EMA(0.999)
        shards = local_shards(self.step.model, self.step.optimizer)
        self.ema.start(shards)
        self.checkpointer = Checkpointer(Storage(folder), "benchmark", "ddp", keep=1)
        self.checkpointer.bind(self.step.model, shards, self.ema)
        self.checkpointer.begin(self.state)
        stop.tell = self.checkpointer.parts_done
        self.held_up: dict[str, list[tuple[float, float]]] = {}
        """Seconds of each round, and processor time of the main thread, by the round's name."""
        self.one_step()  # makes the moments
        self.checkpointer.save(self.state)  # finds its memory
        self.checkpointer.finish()

    def one_step(self) -> None:
        """A training step, as the saver sees it."""
        self.step()
        self.state.timestamp = self.state.timestamp.to_next_batch()
        self.ema.batch_end(self.state, self.logger)
        self.stop.batch_end(self.state, self.logger)

    def round(self, saves: bool, waits: bool, name: str) -> None:
        """A state, if any, and as many steps as lie between two."""
        clock, checkpointer = Clock(), self.checkpointer
        if saves:
            clock(lambda: checkpointer.save(self.state))
        if waits:
            clock(checkpointer.finish)
        for _ in range(self.interval):
            self.one_step()
            clock(lambda: checkpointer.proceed(self.stop.least))
        clock(checkpointer.finish)  # as the next save would
        self.held_up.setdefault(name, []).append((clock.seconds, clock.working))


class Clock:
    """Seconds that the calls through it took, together, and this thread's processor time."""

    def __init__(self) -> None:
        self.seconds = self.working = 0.0

    def __call__(self, action: Callable[[], object]) -> None:
        """Call it."""
        begun, worked = time.perf_counter(), time.thread_time()
        action()
        self.seconds += time.perf_counter() - begun
        self.working += time.thread_time() - worked


ROUNDS = {"none": (False, False), "waited for": (True, True), "beside the steps": (True, False)}


def _measure(args: argparse.Namespace, folder: str) -> list[tuple]:
    with StopRequest(TIMEOUT_SECONDS) as stop:
        training = Training(args, folder, stop)
        rounds = {name: partial(training.round, *how, name=name) for name, how in ROUNDS.items()}
        seconds = alternating_medians(rounds, args.repeats, warmup=0)
    rows = []
    for name in rounds:
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, training.held_up[name])
        slower = [max(both) for both in zip(*of_ranks, strict=True)]
        shares = [
            100 * statistics.median(part) / seconds["none"] for part in zip(*slower, strict=True)
        ]
        rows.append((name, seconds[name] / seconds["none"], *shares))
    return rows


def main() -> int:
    """Measure on two ranks."""
    args = parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = on_ranks(2, _measure, args, folder)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    print(
        f"\nsize {args.size}, two ranks over gloo on CPU, {args.batch_size} samples of "
        f"{args.num_tokens} tokens per rank, float32, a state of {size / 2**20:.0f} MiB every "
        f"{args.interval} steps, median of {args.repeats} rounds\n"
    )
    held_up = {"main thread held up, %": ".2f", "its own work of that, %": ".2f"}
    print_table({"states": "", "round, none = 1": ".3f", **held_up}, rows)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
