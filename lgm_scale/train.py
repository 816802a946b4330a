"""Train a model of any family: the configuration's `task` says which.

    composer lgm_scale/train.py CONFIG.yaml [key=value ...] [--dry-run]
    composer -n 8 lgm_scale/train.py yamls/dit_xl.yaml train.global_batch_size=512

The same command again resumes an interrupted run at its last resume state, and says so when the
run is finished. SIGTERM and SIGUSR2 save at the next step and stop. Exit status: 0 done, 75 stopped
on such a signal, 2 for anything the user must mend, others for what is no user's fault.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from pathlib import Path

from lgm_scale.checkpoint.run_folder import RunFolder
from lgm_scale.config.rules import load_training_run, uncompiled_reason
from lgm_scale.config.schema import TrainingRun
from lgm_scale.errors import exit_on_user_error
from lgm_scale.families.base import add_import_option, family_of
from lgm_scale.initial_weights import init_problems, is_absent
from lgm_scale.parallel.first_failure import first_failure_on_top
from lgm_scale.planning.options import PlanOptions, add_plan_options, plan_options
from lgm_scale.start import heavy_imports

log = logging.getLogger("lgm_scale")

STOPPED_STATUS = 75
"""Asked to stop, state saved: the same command again goes on. (EX_TEMPFAIL of sysexits.h.)"""


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="composer lgm_scale/train.py",
        description="Train a tokenizer or a generator; the same command again resumes the run.",
        epilog="Keys and defaults: lgm_scale/config/schema.py; yamls/ holds ready configurations.",
    )
    parser.add_argument("config", help="YAML file, for example yamls/quickstart/tokenizer.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="validate, print configuration, sizes, work, memory, and the files and data that are "
        "missing here, and stop: needs neither them nor a GPU",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="RANKS",
        help="with --dry-run: the number of ranks to plan for (default: those launched)",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="go on with a run though this key has a new value (optimizer.lr, objective.*, ...); "
        "its history records it. train.max_duration may grow without this",
    )
    add_plan_options(parser)
    add_import_option(parser)
    args = parser.parse_intermixed_args(argv)
    if args.world_size is not None and args.world_size < 1:
        parser.error(f"--world-size: {args.world_size} must be 1 or more")
    if args.world_size is not None and not args.dry_run:
        parser.error("--world-size goes with --dry-run; the launcher's -n sets the ranks of a run")
    args.plan = plan_options(args, parser)
    return args


def main() -> int:
    """Parse, validate, build, fit."""
    args = parse_args(sys.argv[1:])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))

    def folder_of(config: TrainingRun) -> RunFolder:
        return RunFolder(Path(config.out), config, args.allow_change)

    if args.dry_run:
        world_size = args.world_size or launched
        config = load_training_run(
            *(args.config, args.overrides, world_size, None),
            more=lambda config: init_problems(config, is_absent),
        )
        return dry_run(folder_of(config), world_size, args.plan) if rank == 0 else 0

    # At once, before torch; what can be told of GPUs comes after it.
    load_training_run(
        *(args.config, args.overrides, launched, None),
        more=lambda config: folder_of(config).start_problems() if rank == 0 else (),
    )
    import torch

    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s rank {rank} %(message)s", datefmt="%H:%M:%S"
    )
    log.setLevel(logging.INFO)
    config = load_training_run(args.config, args.overrides, launched, torch.cuda.is_available())
    folder = folder_of(config)
    if folder.finished():
        if rank == 0:
            print(f"run {config.run_name} is finished: {folder.bundle}")
        return 0
    with first_failure_on_top(folder.path / "failures"):
        return train(config, folder)


def dry_run(folder: RunFolder, world_size: int, options: PlanOptions) -> int:
    """Print what the run would take; the exit status."""
    config = folder.config
    with heavy_imports():  # a tokenizer's networks are timm's, which is imported to build them
        from lgm_scale.planning.plan import describe

        plan = describe(config, world_size, options)
    print(f"{plan}\n\n{preflight(folder)}", flush=True)
    if options.simulate or options.advise:
        from lgm_scale.planning.report import print_simulation

        return print_simulation(config, world_size, options)
    return 0


def preflight(folder: RunFolder) -> str:
    """What a start on this machine would miss, for the end of a dry run, which needs none of it."""
    problems = folder.start_problems()
    if not problems:
        return "files and data   all here: this run can start"
    return "\n".join(
        ["files and data   a start here would be refused:", *(f"  - {line}" for line in problems)]
    )


def train(config: TrainingRun, folder: RunFolder) -> int:
    """Run (or resume) to the end and write the bundle, or stop when asked; the exit status."""
    with heavy_imports():
        from composer.utils import dist, get_device, reproducibility

        from lgm_scale.build import (
            build_dataset,
            build_trainer,
            export_bundle,
            take_initial_weights,
        )
        from lgm_scale.checkpoint.checkpointer import Checkpointer
        from lgm_scale.checkpoint.run import apply_changes, begun_compiled, enter_run, leave_result
        from lgm_scale.parallel.collectives import on_rank_zero
        from lgm_scale.parallel.compilation import settle_compile
        from lgm_scale.parallel.peers import PeerWatch
        from lgm_scale.training.ema import EMA
        from lgm_scale.training.stopping import StopRequest

    dist.initialize_dist(get_device(None), config.parallel.timeout_seconds)
    with StopRequest(config.parallel.timeout_seconds) as stop, PeerWatch():
        begun = on_rank_zero(lambda: begun_compiled(folder))
        recorded, config = settle_compile(config, begun, uncompiled_reason(config))
        folder = RunFolder(folder.path, recorded, folder.allowed)
        run = enter_run(folder)
        if run.finished:
            return _say(f"run {config.run_name} is finished: {folder.bundle}")
        reproducibility.seed_all(config.seed)  # equal initial weights on every rank
        dataset = build_dataset(config)
        model = family_of(config).training_model(config, dataset)
        ema = EMA(config.ema.decay, config.ema.interval)
        checkpointer = Checkpointer(
            run.storage, run.run_id, config.parallel.strategy, config.checkpoint.keep
        )
        if not checkpointer.candidates:
            take_initial_weights(config, model, dataset, folder)
        trainer = build_trainer(config, model, dataset, ema, checkpointer, stop)
        checkpointer.begin(trainer.state)
        apply_changes(run, folder, trainer.state)
        if trainer.state.timestamp < config.train.max_duration:
            with checkpointer.finishing():
                trainer.fit()
        steps = trainer.state.timestamp.batch.value
        if stop.agreed:
            _say(
                f"run {config.run_name}: stopped after step {steps}, state saved; the same "
                "command again goes on"
            )
            return STOPPED_STATUS
        average = ema.full_weights(everywhere=False)

        def finish() -> str:
            checkpointer.attempts.check()
            bundle = export_bundle(config, model, dataset, average, steps)
            leave_result(run.storage, folder, steps)
            return str(bundle)

        bundle = on_rank_zero(finish)
        trainer.close()
    return _say(f"run {config.run_name}: {steps} steps done, bundle in {bundle}")


def _say(line: str) -> int:
    """Once, not once per rank. Returns: success."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(BrokenPipeError):  # `| head`: what is done is done
            print(line, flush=True)
    return 0


if __name__ == "__main__":  # upload workers are spawned and import this file again
    exit_on_user_error(main)
