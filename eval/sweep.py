"""Measure one generator at many token counts, and write a report.

    composer eval/sweep.py CONFIG.yaml [key=value ...] [--dry-run]
    composer -n 8 eval/sweep.py CONFIG.yaml num_images=50000

For every K: sample images, compare them with the validation images, count the work. A finished K
is kept with its whole protocol: the same command again redoes only what differs. Image i is the
same image at any number of ranks. Exit status: 0 done, 2 for anything the user must mend.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from eval.sweep_config import SweepConfig, load_sweep
from lgm_scale.config import to_dict
from lgm_scale.errors import exit_on_user_error


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="composer eval/sweep.py",
        description="Sample at every token count, compare with validation images, write a report. "
        "The same command again keeps what is done.",
        epilog="Keys and defaults are in eval/sweep_config.py. `python -m eval.report OUT` draws "
        "the report again.",
    )
    parser.add_argument("config", help="YAML file, for example yamls/quickstart/sweep.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="validate, print configuration and work per K, and stop: no images are made",
    )
    return parser.parse_intermixed_args(argv)


def main() -> int:
    """Validate, measure, report."""
    args = parse_args(sys.argv[1:])
    config = load_sweep(args.config, args.overrides)
    rank = int(os.environ.get("RANK", "0"))
    if args.dry_run:
        if rank == 0:
            print(describe(config))
        return 0
    from composer.utils import dist

    from eval.measure import measure
    from eval.report import write_report

    measure(config)
    if rank == 0:
        print(f"report: {write_report(Path(config.out))}")
    dist.barrier()
    return 0


def describe(config: SweepConfig) -> str:
    """Resolved configuration, and the work at each K."""
    import yaml

    from eval.generate import flops_per_image, noise_scale_of, sampler_of
    from lgm_scale.bundle import load_generator

    bundle, sampler = load_generator(config.bundle), sampler_of(config)
    noise_scale_of(bundle, config.bundle)
    lines = ["   K   forwards per image   GFLOPs per image   TFLOPs in all"]
    for k in config.lengths:
        flops = flops_per_image(bundle, k, sampler)
        total = config.num_images * flops / 1e12
        lines.append(f"{k:4d}   {sampler.num_forwards():18d}   {flops / 1e9:16.4g}   {total:13.4g}")
    return yaml.safe_dump(to_dict(config), sort_keys=False) + "\n" + "\n".join(lines)


if __name__ == "__main__":
    exit_on_user_error(main)
