"""Submit a job to Slurm. It requeues itself until it is done, and goes on where it was.

    python launchers/slurm.py --nodes 8
    python launchers/slurm.py --nodes 2 --config yamls/dit_b.yaml train.max_duration=80ep
    python launchers/slurm.py --job eval --config yamls/eval_sweep.yaml --array 16
    python launchers/slurm.py --nodes 8 --dry-run

One task of Slurm per GPU. What runs is a copy of the code as it is now. A job is requeued when it
is preempted, when its time is over, when a node or a rank fails; not when it is done, when its
configuration is wrong (status 2), or when it fails three times in a row at the same step.
`python launchers/status.py RUN` says how it is. Exit status: 0 submitted, 2 for anything to mend.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lgm_scale  # noqa: F401  # says so where Python is a wrong one
from launchers.cluster import SBATCH_OPTIONS, Cluster, load_cluster
from launchers.jobs import KINDS, describe_job
from launchers.launch import Launch, world_size
from launchers.submission import check_save_interval, describe, refuse_live, submit, with_join
from lgm_scale.errors import exit_on_user_error


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python launchers/slurm.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Defaults of a cluster are in yamls/cluster/*.yaml; docs/slurm.md says more.",
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="override a key of the configuration")
    add("--nodes", type=int, default=1, help="default 1")
    add("--gpus-per-node", type=int, metavar="N", help="ranks per node; default: the cluster's")
    add("--job", choices=KINDS, default="train", help="what to run; default train")
    add("--config", metavar="YAML", help="default: yamls/dit_xl.yaml, yamls/tokenizer_b.yaml")
    add("--cluster", default="default", metavar="NAME", help="of yamls/cluster/, or a YAML file")
    add("--array", type=int, metavar="N", help="split a sweep into N jobs, and one that joins")
    add("--after", action="append", default=[], metavar="JOBID", help="start when it is done")
    for name in SBATCH_OPTIONS:
        add(f"--{name}", help=f"sbatch's --{name}")
    add("--time", help="limit of one stretch, such as 12:00:00; the job goes on after it")
    add("--container", metavar="IMAGE", help="run ranks in it (Slurm's pyxis plugin)")
    add("--seconds-per-step", type=float, metavar="S", help="to compare --time with checkpoints")
    add("--take-over", action="store_true", help="end a live job of the same run first")
    add("--allow-change", action="append", default=[], metavar="KEY", help="see lgm_scale/train.py")
    add(
        "--files-elsewhere",
        action="store_true",
        help="look for no data and weights: this machine does not see what the nodes see",
    )
    add("--dry-run", action="store_true", help="check, print script and commands, submit nothing")
    args = parser.parse_intermixed_args(argv)
    if args.allow_change and args.job not in ("train", "tokenizer"):
        parser.error(f"--allow-change: is for trainings, not for {args.job}")
    for job_id in args.after:
        if not re.fullmatch(r"\d+(_\d+)?", job_id):
            parser.error(f"--after: {job_id!r} is no id of a job, such as 1234 or 1234_5")
    if args.nodes < 1:
        parser.error(f"--nodes: {args.nodes} must be 1 or more")
    return args


def main() -> int:
    """Check, then print or submit."""
    args = parse_args(sys.argv[1:])
    changeable = ("gpus_per_node", "time", "container", *SBATCH_OPTIONS)
    cluster = load_cluster(args.cluster, {name: getattr(args, name) for name in changeable})
    launches = plan(args, cluster)
    for launch in launches:
        check_save_interval(launch, args.seconds_per_step)
    if args.dry_run:
        print("\n".join(text for launch in launches for text in describe(launch)))
        return 0
    submit([refuse_live(launch, args.take_over) for launch in launches])
    print(f"python launchers/status.py {launches[0].job.out}")
    return 0


def plan(args: Any, cluster: Cluster) -> list[Launch]:
    """The job; for an array, its elements and the job that joins them. Raises: ConfigError."""
    job = describe_job(
        *(args.job, args.config, args.overrides, world_size(cluster, args.nodes)),
        parts=args.array,
        has_gpu=None if cluster.gpus_per_node else False,
        to_come=None if args.files_elsewhere else (lambda path: bool(args.after)),
        allow_change=args.allow_change,
    )
    return with_join(Launch(job, cluster, args.nodes, tuple(args.after)))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word, like any tool
    exit_on_user_error(main)
