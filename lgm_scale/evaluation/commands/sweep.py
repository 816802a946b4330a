"""Measure one generator at many token counts and sampler settings, and write a report.

    python -m lgm_scale.evaluation.commands.sweep CONFIG.yaml [key=value ...] [--dry-run]
    composer -n 8 -m lgm_scale.evaluation.commands.sweep CONFIG.yaml bundle=runs/dit_xl/bundle

For every cell: sample images, extract features, compare with a reference, count the work. What is
done is kept: the same command again makes what is missing, after any interruption and with any
number of ranks, and gives the same numbers. Independent jobs share a sweep like this, in any order:

    ... sweep CONFIG.yaml part=0/16 ... part=15/16    make every 16th chunk, and stop
    ... sweep CONFIG.yaml --reduce                    numbers and report; makes no image

Exit status: 0 done, 2 for anything the user must mend.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lgm_scale.config.loading import to_dict
from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.evaluation.commands.arguments import command_parser
from lgm_scale.evaluation.sweep.config import SweepConfig, expand
from lgm_scale.evaluation.sweep.rules import load_sweep
from lgm_scale.families.base import add_import_option
from lgm_scale.start import heavy_imports


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = command_parser(
        "sweep",
        "Sample at every token count and setting, compare with a reference, write a report. The "
        "same command again keeps what is done.",
    )
    parser.epilog = (
        "Keys and defaults are in lgm_scale/evaluation/sweep/config.py. The command `preflight` "
        "beside this one lists the files that metrics need, `report` draws the report again."
    )
    parser.add_argument("config", help="YAML file, for example yamls/eval_sweep.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="override a key; part=i/n makes only every n-th chunk, for several jobs",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="validate, print configuration and work per cell, and stop: no images are made",
    )
    parser.add_argument(
        "--reduce",
        action="store_true",
        help="numbers and report from finished chunks; refuse to make one that is missing",
    )
    add_import_option(parser)
    return parser.parse_intermixed_args(argv)


def main() -> int:
    """Validate, measure, report."""
    args = parse_args(sys.argv[1:])
    config = load_sweep(args.config, args.overrides)
    if args.reduce and config.part is not None:
        raise ConfigError(f"part: {config.part} and --reduce exclude each other; drop one", None)
    rank = int(os.environ.get("RANK", "0"))
    if args.dry_run:
        if rank == 0:
            print(describe(config))
        return 0
    with heavy_imports():
        from composer.utils import dist

        from lgm_scale.evaluation.report.writing import write_report
        from lgm_scale.evaluation.sweep.measure import measure

    finished = measure(config, args.reduce) is not None
    if finished and rank == 0:
        print(f"report: {write_report(Path(config.out))}")
    dist.barrier()
    return 0


def describe(config: SweepConfig) -> str:
    """The resolved configuration as YAML, and a table of the operations of each cell."""
    import torch
    import yaml

    from lgm_scale.evaluation.sweep.samples import work_of
    from lgm_scale.pipeline import load_pipeline

    pipe = load_pipeline(config.bundle, "cpu", torch.float32)
    pipe.protocol()
    lines = [f"{'cell':44s} rows per image   TFLOPs per image   PFLOPs in all"]
    total, rows = 0.0, {}
    for cell in expand(config):
        pipe.check(cell.sampler, cell.num_tokens)
        work = work_of(pipe, cell)
        petaflops = config.num_images * work["tflops_per_image"] / 1e3
        total, rows = total + petaflops, rows | work["tflops_per_row"]
        lines.append(
            f"{cell.label:44s} {work['rows']:14d}   {work['tflops_per_image']:16.4g}   "
            f"{petaflops:13.4g}"
        )
    lines.append(f"{'sum':44s} {'':14s}   {'':16s}   {total:13.4g}")
    one_row = (f"{rows[k]:.4g} at K = {k}" for k in sorted(rows, key=int))
    lines.append(
        f"TFLOPs of one row: {', '.join(one_row)}; of decoding: {pipe.decoder_flops() / 1e12:.4g}"
    )
    return yaml.safe_dump(to_dict(config), sort_keys=False) + "\n" + "\n".join(lines)


if __name__ == "__main__":
    exit_on_user_error(main)
