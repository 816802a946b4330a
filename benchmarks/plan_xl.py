"""The committed prediction for XL: memory, time and utilisation at K = 32, 64, 128 and 256.

    python -m benchmarks.plan_xl            # prints the table of docs/planning.md; about a minute

Nothing is measured: training steps are simulated (`lgm_scale.planning`), and times are predicted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace

from lgm_scale.config.rules import load_training_run
from lgm_scale.errors import exit_on_user_error
from lgm_scale.planning.advice import GIB, Search
from lgm_scale.planning.hardware import GPUS
from lgm_scale.planning.options import PlanOptions
from lgm_scale.planning.plan import networks

RANKS, SAMPLES = 8, 256
LENGTHS = (32, 64, 128, 256)


def table(lengths: Iterable[int] = LENGTHS) -> str:
    """The table in Markdown."""
    rows = [
        "| K | GPU | micro-batch | peak GiB | uncompiled: images/s, of 989 | compiled: images/s, "
        "of 989 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for k in lengths:
        changes = [f"lengths.choices=[{k}]", f"train.global_batch_size={SAMPLES * RANKS}"]
        run = load_training_run("yamls/dit_xl.yaml", changes, RANKS, has_gpu=None)
        search = Search(run, networks(run), RANKS, PlanOptions())
        for name in ("h100", "h200"):
            search.use(GPUS[name])
            choice = search.largest(run)
            cells = []
            for compiled in (False, True):
                own = replace(run, train=replace(run.train, compile=compiled))
                timed = search.timed(replace(choice, config=own))
                assert timed.time is not None
                cells.append(f"{timed.speed:,.0f}, {timed.time.utilisation:.0%}")
            rows.append(
                f"| {k} | {name.upper()} | {choice.shape.num_samples} | "
                f"{choice.step.peak / GIB:.1f} | {cells[0]} | {cells[1]} |"
            )
    return "\n".join(rows)


def main() -> int:
    """Print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_xl", description=__doc__)
    parser.add_argument("lengths", nargs="*", type=int, metavar="K", help="default: all four")
    args = parser.parse_args()
    if args.lengths and min(args.lengths) < 1:
        parser.error(f"K: {min(args.lengths)} must be 1 or more")
    print(table(args.lengths or LENGTHS))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
