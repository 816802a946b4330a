"""Submit a whole pipeline: jobs that start when those they need are done.

    python launchers/pipeline.py yamls/pipeline/imagenet256.yaml --dry-run
    python launchers/pipeline.py yamls/pipeline/imagenet256.yaml
    python launchers/pipeline.py yamls/pipeline/imagenet256.yaml --from generator

The graph is in the YAML file. Every job goes on where it was and ends at once when its work is
done, so the same command again, after whatever went wrong, makes what is missing. Exit status: 0
submitted, 2 for anything to mend.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lgm_scale  # noqa: F401  # says so where Python is a wrong one

# isort: split
from launchers.cluster import load_cluster
from launchers.jobs import describe_job, output_of
from launchers.launch import Launch, world_size
from launchers.submission import describe, refuse_live, submit, with_join
from lgm_scale.config.loading import load_config, read_yaml
from lgm_scale.config.schema import STRICT
from lgm_scale.errors import ConfigError, exit_on_user_error


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One job of a pipeline. `needs` names the stages that come before it."""

    __pydantic_config__ = STRICT
    job: Literal["convert", "tokenizer", "encode", "train", "reference", "eval"]
    """What it runs."""
    needs: tuple[str, ...] = ()
    """Stages that must be done before it."""
    config: str | None = None
    """YAML file, for jobs that have one."""
    overrides: tuple[str, ...] = ()
    """`key=value` of the configuration, or options of a tool."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int | None = None
    """In place of the cluster's, as are `time` and `partition`."""
    array: int | None = None
    """Split a sweep into so many jobs, and one that joins them."""
    time: str | None = None
    partition: str | None = None


@dataclass(frozen=True, kw_only=True)
class _File:
    __pydantic_config__ = STRICT
    stages: dict[str, dict[str, Any]]
    cluster: str = "default"
    """Name of a file of `yamls/cluster/`, or the path of a YAML file."""


def main() -> int:
    """Check everything, then print or submit."""
    parser = argparse.ArgumentParser(
        prog="python launchers/pipeline.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pipeline", help="YAML file, such as yamls/pipeline/imagenet256.yaml")
    parser.add_argument("--cluster", metavar="NAME", help="in place of the pipeline's own")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="leave out what is before it")
    parser.add_argument("--take-over", action="store_true", help="end live jobs of these runs")
    parser.add_argument("--files-elsewhere", action="store_true", help="look for no data and "
                        "weights: this machine does not see what the nodes see")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check, print graph and scripts")
    args = parser.parse_args()
    stages, cluster = load_pipeline(args.pipeline)
    chosen = from_stage(stages, ordered(stages, args.pipeline), args.first)
    launches = plan(stages, chosen, args.cluster or cluster, not args.files_elsewhere)
    print("\n".join(graph(stages, launches)), flush=True)
    if args.dry_run:
        for stage in launches.values():
            print("\n".join(text for launch in stage for text in describe(launch)))
        return 0
    submit_all(stages, launches, args.take_over)
    return 0


def load_pipeline(path: str) -> tuple[dict[str, Stage], str]:
    """Read stages by name, and the cluster where they run.

    Raises: ConfigError with the problems of every stage.
    """
    file = load_config(read_yaml(path), _File, path)
    stages, problems = {}, []
    for name, values in file.stages.items():
        try:
            stages[name] = load_config(values, Stage)
        except ConfigError as error:
            problems += [f"stages.{name}.{problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems, path)
    return stages, file.cluster


def ordered(stages: dict[str, Stage], source: str) -> list[str]:
    """Names, each after what it needs. Raises: ConfigError for unknown needs and circles."""
    problems = [
        f"stages.{name}.needs: {need!r} is no stage; stages: {', '.join(stages)}"
        for name, stage in stages.items()
        for need in stage.needs
        if need not in stages
    ]
    if not stages:
        problems.append("stages: empty; name at least one")
    problems += [
        f"stages.{name}.nodes: {stage.nodes} must be 1 or more"
        for name, stage in stages.items()
        if stage.nodes < 1
    ]
    if problems:
        raise ConfigError(problems, source)
    order: list[str] = []
    while len(order) < len(stages):
        ready = [name for name in stages if name not in order]
        ready = [name for name in ready if set(stages[name].needs) <= set(order)]
        if not ready:
            circle = ", ".join(name for name in stages if name not in order)
            raise ConfigError(f"stages: {circle} need each other in a circle", source)
        order += ready
    return order


def from_stage(stages: dict[str, Stage], order: Sequence[str], first: str | None) -> list[str]:
    """The stage called `first` and all that need it. Raises: ConfigError if there is none."""
    if first is None:
        return list(order)
    if first not in stages:
        raise ConfigError(f"--from: {first!r} is no stage; stages: {', '.join(order)}")
    chosen = {first}
    for name in order:
        if chosen & set(stages[name].needs):
            chosen.add(name)
    return [name for name in order if name in chosen]


def plan(
    stages: dict[str, Stage], chosen: Sequence[str], cluster: str, look: bool = True
) -> dict[str, list[Launch]]:
    """The launches of every chosen stage, whose order is that of `ordered`.

    Args:
        stages: All stages.
        chosen: Names of those to submit.
        cluster: Where they run.
        look: Look for what no earlier stage makes: data, bundles, files of others.

    Raises: ConfigError with every stage's problems.
    """
    problems: list[str] = []
    launches: dict[str, list[Launch]] = {}
    made: list[Path] = []

    def to_come(path: str) -> bool:
        return any(Path(path).is_relative_to(out) for out in made)

    for name in chosen:
        stage = stages[name]
        try:
            changes = {key: getattr(stage, key) for key in ("gpus_per_node", "time", "partition")}
            place = load_cluster(cluster, changes)
            job = describe_job(
                *(stage.job, stage.config, list(stage.overrides)),
                world_size(place, stage.nodes),
                parts=stage.array,
                has_gpu=None if place.gpus_per_node else False,
                to_come=to_come if look else None,
            )
            launches[name] = with_join(Launch(job, place, stage.nodes))
        except ConfigError as error:
            problems += [f"stages.{name}: {problem}" for problem in error.problems]
        made += output_of(stage.job, stage.config, list(stage.overrides))
    if problems:
        raise ConfigError(problems)
    return launches


def graph(stages: dict[str, Stage], launches: dict[str, list[Launch]]) -> list[str]:
    """One line per stage: what it needs, how large it is, what it makes."""
    width = max(len(name) for name in launches)
    lines = []
    for name, (launch, *_) in launches.items():
        needs = ", ".join(need for need in stages[name].needs if need in launches)
        array = f"{len(launch.job.parts)} jobs of " if launch.job.parts else ""
        size = f"{array}{launch.num_nodes} x {launch.ranks_per_node}"
        done = " (there already)" if _done(launch) else ""
        after = f"  after {needs}" if needs else ""
        lines.append(f"{name:{width}s}  {size:16s}  makes {launch.job.out}{done}{after}")
    return lines


def _done(launch: Launch) -> bool:
    out = Path(launch.job.out)
    if out.is_file():  # a reference
        return True
    names = ("index.json", "manifest.json", "bundle/bundle.json")
    return any((out / name).is_file() for name in names)


def submit_all(
    stages: dict[str, Stage], launches: dict[str, list[Launch]], take_over: bool
) -> None:
    """Submit in order; nothing, if one of the jobs is live. Raises: SubmissionError."""
    checked = {
        name: [refuse_live(launch, take_over) for launch in stage]
        for name, stage in launches.items()
    }
    ids: dict[str, list[str]] = {}
    for name, stage in checked.items():
        after = tuple(job_id for need in stages[name].needs for job_id in ids.get(need, []))
        ids[name] = submit([replace(launch, after=after) for launch in stage])


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word, like any tool
    exit_on_user_error(main)
