"""Train, measure and compare: every run of an experiment at every seed, into its page.

    python -m experiments NAME_OR_YAML [--seeds 0 1 2] [--jobs 2] [key=value ...]
    python -m experiments elastic

An experiment is a file of yamls/experiments (keys: `experiments.config.Experiment`). Finished runs
and measurements are kept, so the command continues where it stopped. The tables go between the
markers of the experiment's page, the plot beside it. Extra key=value go to every run.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from experiments.config import load_experiment
from experiments.page import draw, render, write_between_markers
from experiments.runs import plan_runs, prepare, train_and_measure
from lgm_scale.errors import ConfigError, exit_on_user_error


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Train and measure all runs of an experiment, and rewrite its page.",
    )
    parser.add_argument(
        "experiment", help="name in yamls/experiments (elastic, ...), or a YAML file"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the experiment's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--out", help="folder of the runs (default: the experiment's)")
    parser.add_argument("--page", help="Markdown file to fill in (default: the experiment's)")
    args = parser.parse_intermixed_args(argv)
    if args.jobs < 1:
        raise ConfigError(f"--jobs: {args.jobs} must be 1 or more")
    return args


def main() -> int:
    """Prepare, train, measure, write."""
    args = parse_args(sys.argv[1:])
    experiment = load_experiment(args.experiment)
    given = {"out": args.out, "page": args.page, "seeds": args.seeds}
    changed = {key: value for key, value in given.items() if value is not None}
    experiment = dataclasses.replace(experiment, **changed)
    name = Path(args.experiment).stem.replace("_", "-")
    planned, budget = plan_runs(name, experiment, experiment.seeds, args.overrides)
    prepare(experiment)
    results = train_and_measure(experiment, planned, args.jobs)
    text, page = render(experiment, results, budget), Path(experiment.page)
    write_between_markers(page, text, experiment.section)
    if experiment.panels:
        name = f"{page.stem}_{experiment.section}".rstrip("_")
        draw(experiment, results, page.with_name(f"{name}.png"))
    print(text)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
