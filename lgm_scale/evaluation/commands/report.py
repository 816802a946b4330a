"""Pictures, tables and page of a finished sweep, from what it stored; or of several, compared.

    python -m lgm_scale.evaluation.commands.report OUT
    python -m lgm_scale.evaluation.commands.report OUT_A OUT_B ... --to FOLDER

Reads OUT/results.json and OUT/rows, writes results.md, results.csv, tradeoff.png, samples.png (and
one per K), reconstructions.png, merge_tree.png and index.html. No network is run. Several sweeps
are compared in one table only if they were measured alike; else what differs is named.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lgm_scale.errors import ConfigError, exit_on_user_error
from lgm_scale.evaluation.commands.arguments import command_parser
from lgm_scale.evaluation.engine.rows import read_results
from lgm_scale.start import heavy_imports


def main() -> int:
    """Command line."""
    parser = command_parser(
        "report", "Draw the report of a finished sweep again, or compare several."
    )
    parser.add_argument("outs", nargs="+", type=Path, metavar="OUT", help="`out` of a sweep")
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="for the comparison of several sweeps"
    )
    args = parser.parse_args(sys.argv[1:])
    if (len(args.outs) == 1) != (args.to is None):
        raise ConfigError("--to: goes with two or more sweeps, and they need it")
    for out in args.outs:
        read_results(out)
    # Late: what is wrong with a command line is told before.
    with heavy_imports():
        from lgm_scale.evaluation.report.writing import write_comparison, write_report

    if args.to is None:
        print(f"report: {write_report(args.outs[0])}")
    else:
        print(f"comparison: {write_comparison(args.outs, args.to)}")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
