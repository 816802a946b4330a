"""What all benchmarks share: arguments, fair timing, tables.

The machine may be one that others use, too: candidates alternate, and medians are compared.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Candidates = Mapping[str, Callable[[], object]]


def command_line(name: str, doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """Parser of `python -m benchmarks.<name>`, with the number of timed rounds."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    told = f"rounds (default: {repeats})"
    parser.add_argument("--repeats", "--repetitions", type=int, default=repeats, help=told)
    return parser


def parse_device(
    parser: argparse.ArgumentParser, gpu_batch: int, cpu_batch: int
) -> argparse.Namespace:
    """Arguments with device, dtype and batch size, whose defaults are those of the device."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(best))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: by device")
    told = f"default: {gpu_batch} on a GPU, {cpu_batch} on a CPU"
    parser.add_argument("--batch-size", type=int, help=told)
    args = parser.parse_args()
    on_gpu = args.device.type == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.batch_size = args.batch_size or (gpu_batch if on_gpu else cpu_batch)
    return args


def alternating_medians(
    candidates: Candidates,
    repeats: int,
    *,
    device: torch.device | None = None,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each candidate.

    Rounds of one run each, so that whatever slows the machine for a while slows all of them;
    the order turns from round to round.

    A GPU is waited for before each reading of the clock; `warmup` rounds do not count. With
    `time.process_time` as clock, seconds are those of a core: others' work counts less.
    """
    on_gpu = device is not None and device.type == "cuda"

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        return clock()

    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for repeat in range(repeats + warmup):
        names = names[1:] + names[:1]
        for name in names:
            start = now()
            candidates[name]()
            seconds = now() - start
            if repeat >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` returns on rank 0 of so many ranks over gloo, of one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (world_size, port, out, function, args), nprocs=world_size)  # type: ignore[arg-type]
    return out.get()


def _rank(
    rank: int, world_size: int, port: int, out: Any, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    found = function(*args)
    if rank == 0:
        out.put(found)
    dist.barrier()
    dist.destroy_process_group()


def print_rates(
    title: str,
    what: str,
    count: int,
    candidates: Candidates,
    repeats: int,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Time candidates that each make `count` things; a table of things per second."""
    seconds = alternating_medians(candidates, repeats, device=device, warmup=1, clock=clock)
    first = next(iter(seconds.values()))
    rows = [(name, count / value, first / value) for name, value in seconds.items()]
    print(f"\n{title}")
    print_table({"": "", f"{what}/s": ",.2f", "of the first": ".2f"}, rows)


def print_table(columns: Mapping[str, str], rows: Iterable[Sequence[Any]]) -> None:
    """A Markdown table with aligned columns: their heads, each with the format of its values."""
    table = [
        [format(value, form) for value, form in zip(row, columns.values(), strict=True)]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(columns, *table, strict=True)]
    for row in [list(columns), ["-" * width for width in widths], *table]:
        cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("| " + " | ".join(cells) + " |", flush=True)
