"""What a cluster is like: `yamls/cluster/NAME.yaml`, and what the command line changes of it.

Free of torch, like every file here: a launcher answers at once.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lgm_scale.config.loading import load_config, read_yaml
from lgm_scale.config.schema import STRICT
from lgm_scale.errors import ConfigError

SBATCH_OPTIONS = ("partition", "account", "qos", "constraint", "exclude", "comment")
"""Handed to `sbatch` as they are, where they are set."""

CLUSTERS = Path(__file__).resolve().parents[1] / "yamls" / "cluster"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Defaults of every job on one cluster. Options of `sbatch` have its names."""

    __pydantic_config__ = STRICT
    gpus_per_node: int
    """How many a node has. 0: a cluster of CPUs, with one rank per node."""
    cpus_per_gpu: int = 8
    """CPU cores of each rank (of a rank without a GPU, too): data workers and the trainer."""
    time: str = "24:00:00"
    """Limit of one stretch of a job (minutes, HH:MM:SS or D-HH:MM:SS); it requeues itself."""
    grace_seconds: int = 120
    """Warning before a stretch ends, in which ranks save. Preemption grants what the partition's
    GraceTime says."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    comment: str | None = None
    container: str | None = None
    """Image that ranks run in, through Slurm's pyxis plugin."""
    container_mounts: str | None = None
    """Pyxis' option of this name."""
    container_python: str = "python"
    """Interpreter inside the container; outside of containers, the one that submits."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the ranks start, such as `module load cuda`."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of every rank: NCCL's settings live here."""
    temporary: str = "/tmp"
    """Node-local folder; every job has a folder of its own in it, deleted when it ends."""


def load_cluster(name: str, changes: dict[str, Any] | None = None) -> Cluster:
    """Read a cluster: one of `yamls/cluster/`, or a YAML file.

    `changes` are values of the command line; None keeps the cluster's own.

    Raises: ConfigError with every problem.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CLUSTERS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.yaml")))
        raise ConfigError(f"--cluster: there is no {path}; known: {known}, or give a YAML file")
    cluster = load_config(read_yaml(path), Cluster, str(path))
    given = {key: value for key, value in (changes or {}).items() if value is not None}
    gpus, problems = given.get("gpus_per_node"), []
    if gpus is not None and not 0 <= gpus <= cluster.gpus_per_node:
        problems.append(
            f"--gpus-per-node: {gpus} asked for, nodes of {path} have {cluster.gpus_per_node}; ask "
            "for fewer, or mend gpus_per_node there"
        )
    cluster = dataclasses.replace(cluster, **given)
    problems += _problems(cluster)
    if problems:
        raise ConfigError(problems, str(path))
    return cluster


def _problems(cluster: Cluster) -> list[str]:
    problems = []
    if cluster.gpus_per_node < 0:
        problems.append(f"gpus_per_node: {cluster.gpus_per_node} must be 0 or more")
    if cluster.cpus_per_gpu < 1:
        problems.append(f"cpus_per_gpu: {cluster.cpus_per_gpu} must be 1 or more")
    if cluster.grace_seconds < 10:
        problems.append(
            f"grace_seconds: {cluster.grace_seconds} leaves no time to save; 10 or more"
        )
    try:
        limit = minutes(cluster.time) * 60
    except ValueError:
        problems.append(
            f"--time: {cluster.time!r} is no time limit; write minutes, HH:MM:SS or D-HH:MM:SS"
        )
    else:
        if limit <= cluster.grace_seconds:
            problems.append(
                f"--time: {cluster.time} is not longer than the {cluster.grace_seconds} s of grace "
                "at its end (grace_seconds); the job would be told to stop as it starts"
            )
    return problems


def minutes(time: str) -> int:
    """Minutes of one of Slurm's time limits, rounded up. Raises: ValueError if it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise ValueError(time)
    days, *rest = match.groups()
    first, second, third = (int(value) if value is not None else None for value in rest)
    assert first is not None
    if days is not None:  # D-HH[:MM[:SS]]
        seconds = ((int(days) * 24 + first) * 60 + (second or 0)) * 60 + (third or 0)
    elif third is not None:  # HH:MM:SS
        seconds = (first * 60 + (second or 0)) * 60 + third
    else:  # MM[:SS]
        seconds = first * 60 + (second or 0)
    if seconds == 0:
        raise ValueError(time)
    return -(-seconds // 60)
