"""Train a tokenizer or a generator.

    composer lgm_scale/train.py CONFIG.yaml [key=value ...] [--dry-run]
    composer -n 8 lgm_scale/train.py yamls/dit_xl.yaml train.global_batch_size=512

The same command again resumes an interrupted run at its last resume state, and says so when the
run is finished. SIGTERM and SIGUSR2 save at the next step and stop. Exit status: 0 done, 75 stopped
on such a signal, 2 for anything the user must mend, others for what is no user's fault.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from lgm_scale.config import TrainingRun
from lgm_scale.config_rules import load_training_run
from lgm_scale.errors import exit_on_user_error
from lgm_scale.run_folder import RunFolder

log = logging.getLogger("lgm_scale")

STOPPED_STATUS = 75
"""Asked to stop, state saved: the same command again goes on. (EX_TEMPFAIL of sysexits.h.)"""


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="composer lgm_scale/train.py",
        description="Train a tokenizer or a generator; the same command again resumes the run.",
        epilog="Keys and defaults are in lgm_scale/config.py; yamls/ holds ready configurations.",
    )
    parser.add_argument("config", help="YAML file, for example yamls/quickstart/tokenizer.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="validate, print configuration, sizes, work and memory, and stop: no data, no GPU",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="RANKS",
        help="with --dry-run: the number of ranks to plan for (default: those launched)",
    )
    args = parser.parse_intermixed_args(argv)
    if args.world_size is not None and not args.dry_run:
        parser.error("--world-size goes with --dry-run; the launcher's -n sets the ranks of a run")
    return args


def main() -> int:
    """Parse, validate, build, fit."""
    args = parse_args(sys.argv[1:])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if args.dry_run:
        world_size = args.world_size or launched
        config = load_training_run(args.config, args.overrides, world_size, has_gpu=None)
        from lgm_scale.plan import describe

        if rank == 0:
            print(describe(config, world_size))
        return 0
    import torch

    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s rank {rank} %(message)s", datefmt="%H:%M:%S"
    )
    log.setLevel(logging.INFO)
    config = load_training_run(args.config, args.overrides, launched, torch.cuda.is_available())
    folder = RunFolder(Path(config.out), config)
    if folder.finished():
        if rank == 0:
            print(f"run {config.run_name} is finished: {folder.bundle}")
        return 0
    return train(config, folder)


def train(config: TrainingRun, folder: RunFolder) -> int:
    """Run (or resume) to the end and write the bundle, or stop when asked; the exit status."""
    from composer.utils import dist, get_device, reproducibility

    from lgm_scale.build import build_dataset, build_model, build_trainer, export_bundle
    from lgm_scale.checkpoint.resume import Resume
    from lgm_scale.checkpoint.run import enter_run, leave_result
    from lgm_scale.parallel.agreement import on_rank_zero
    from lgm_scale.training.ema import EMA
    from lgm_scale.training.stopping import StopRequest

    dist.initialize_dist(get_device(None), config.parallel.timeout_seconds)
    stop = StopRequest(config.parallel.timeout_seconds)
    stop.listen()
    run = enter_run(folder)
    if run.finished:
        if dist.get_global_rank() == 0:
            print(f"run {config.run_name} is finished: {folder.bundle}")
        return 0
    reproducibility.seed_all(config.seed)  # equal initial weights on every rank
    dataset = build_dataset(config)
    model = build_model(config, dataset)
    ema = EMA(config.ema.decay, config.ema.interval)
    resume = Resume(run.storage, run.run_id, config.parallel.strategy, config.checkpoint.keep)
    trainer = build_trainer(config, model, dataset, ema, resume, stop)
    resume.begin(trainer.state, trainer.logger)
    state = trainer.state
    assert state.max_duration is not None
    if state.timestamp < state.max_duration:
        trainer.fit()
    if stop.agreed:
        if dist.get_global_rank() == 0:
            print(
                f"run {config.run_name}: stopped after step {state.timestamp.batch.value}, state "
                "saved; the same command again goes on",
                flush=True,
            )
        return STOPPED_STATUS
    average = ema.full_weights()
    steps = state.timestamp.batch.value

    def finish() -> str:
        resume.attempts.check()
        path = export_bundle(config, model, dataset, average, steps)
        leave_result(run.storage, folder, steps)
        return str(path)

    bundle = on_rank_zero(finish)
    if dist.get_global_rank() == 0:
        print(f"run {config.run_name}: {steps} steps done, bundle in {bundle}")
    trainer.close()
    return 0


if __name__ == "__main__":  # upload workers are spawned and import this file again
    exit_on_user_error(main)
