"""A job on a cluster: its batch script, the command of each rank, its submission by Submitit."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from launchers.cluster import SBATCH_OPTIONS, Cluster, minutes
from launchers.jobs import Job
from launchers.records import LAUNCH_NAME
from launchers.task import RankTask, rank_environment
from lgm_scale.errors import LGMError
from lgm_scale.storage.files import folder_aside, replace_folder, write_json

_FOREVER = 1_000_000
"""Times that Submitit may requeue; `batch_end.judge` has the say."""


class SubmissionError(LGMError):
    """Slurm is missing, or did not take the job."""


def world_size(cluster: Cluster, nodes: int) -> int:
    """Ranks of a job: one per GPU; on a cluster without GPUs, one per node."""
    return nodes * max(cluster.gpus_per_node, 1)


CHECKOUT = Path(__file__).resolve().parents[1]
_PACKAGES = ("lgm_scale", "data_tools", "eval", "launchers")
_LEFT_OUT = ("__pycache__", ".pyc")


class FrozenCode:
    """A copy of the code that a job runs, named by the hash of its contents.

    Editing the checkout changes no job that is requeued.

    Args:
        folder: Where copies live; equal contents share one.
        config: The job's YAML file, copied too.
    """

    def __init__(self, folder: Path, config: Path | None) -> None:
        self._files = {
            str(path.relative_to(CHECKOUT)): path
            for package in _PACKAGES
            for path in sorted((CHECKOUT / package).rglob("*"))
            if path.is_file() and not any(part in str(path) for part in _LEFT_OUT)
        }
        if config is not None:
            self._files[f"config/{config.name}"] = config
        digest = hashlib.sha256()
        for name, path in self._files.items():
            contents = path.read_bytes()
            digest.update(f"{name}\0{len(contents)}\0".encode() + contents)
        self.path = folder.absolute() / f"code-{digest.hexdigest()[:12]}"
        self.config = self.path / "config" / config.name if config is not None else None

    def write(self) -> None:
        """Make the copy, unless it is there. It is complete or absent."""
        if self.path.is_dir():
            return
        aside = folder_aside(self.path)
        for name, path in self._files.items():
            target = aside / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        replace_folder(self.path, aside)


class _Executor(submitit.SlurmExecutor):
    """Submitit's executor, which also writes scripts where no Slurm is installed."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        """The batch script of these parameters, exactly as it is submitted."""
        return self._make_submission_file_text(self._submitit_command_str, "dry-run")


@dataclass(frozen=True)
class Launch:
    """Everything needed to submit one job.

    Args:
        nodes: Number of nodes; a job that does not spread over ranks takes one.
        after: Ids of jobs that must end well before.
        after_any: Ids of jobs that must have ended, well or not.
    """

    job: Job
    cluster: Cluster
    nodes: int
    after: tuple[str, ...] = ()
    after_any: tuple[str, ...] = ()

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node."""
        return max(self.cluster.gpus_per_node, 1) if self.job.ranks else 1

    @property
    def num_nodes(self) -> int:
        """Nodes of the job."""
        return self.nodes if self.job.ranks else 1

    @property
    def num_ranks(self) -> int:
        """Ranks of the job (of each of its parts)."""
        return self.num_nodes * self.ranks_per_node

    @property
    def folder(self) -> Path:
        """Where the launches of this run are, and the code."""
        return self.job.folder.absolute()

    @property
    def metrics(self) -> str | None:
        """The run's metrics.jsonl; None for a job without steps."""
        return str(Path(self.job.out).absolute() / "metrics.jsonl") if self.job.run else None

    def code(self) -> FrozenCode:
        """The code it runs."""
        return FrozenCode(self.folder, self.job.config)

    def command(self, code: FrozenCode, part: str | None = None) -> tuple[str, ...]:
        """Program and arguments of every rank."""
        config = (str(code.config),) if code.config is not None else ()
        arguments = (*config, *self.job.arguments, *([part] if part else []))
        return (self._python, str(code.path / self.job.script), *arguments)

    def tasks(self, code: FrozenCode) -> list[RankTask]:
        """What Submitit keeps: one task, or one for each part of an array."""
        env = self.cluster.env | {"PYTHONPATH": str(code.path)}
        return [
            RankTask(
                command=self.command(code, part),
                directory=str(Path.cwd()),
                env=env,
                temporary=self.cluster.temporary,
                grace_seconds=self.cluster.grace_seconds,
                metrics=self.metrics,
                saves_on_request=self.job.run is not None,
            )
            for part in (self.job.parts or (None,))
        ]

    def script(self) -> str:
        """The batch script."""
        return self._executor(self.code(), self._next_folder()).script()

    def environment(self) -> list[str]:
        """What the cluster adds to the environment of every rank, as `KEY=value`."""
        return [f"{key}={value}" for key, value in self.cluster.env.items()]

    def rank_lines(self) -> list[str]:
        """The command of each rank, with the environment that tells it which one it is."""
        code = self.code()
        lines = []
        for part in self.job.parts or (None,):
            command = shlex.join(self.command(code, part))
            for rank in range(self.num_ranks):
                environment = rank_environment(
                    rank=rank,
                    world_size=self.num_ranks,
                    local_rank=rank % self.ranks_per_node,
                    local_world_size=self.ranks_per_node,
                    address="<first node>",
                    port=0,
                )
                keys = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR")
                words = " ".join(f"{key}={environment[key]}" for key in keys)
                lines.append(f"{words} {command}")
        return lines

    def submit(self) -> list[str]:
        """Freeze the code and submit; ids of the job, or of an array's elements.

        Raises: SubmissionError with Slurm's own words.
        """
        code, folder = self.code(), self._next_folder()
        folder.mkdir(parents=True)  # now: a job may start before its submission returns
        code.write()
        try:
            executor = self._executor(code, folder)
            if self.job.parts:
                with executor.batch():
                    jobs = [executor.submit(task) for task in self.tasks(code)]
            else:
                jobs = [executor.submit(task) for task in self.tasks(code)]
        except FileNotFoundError as error:
            raise SubmissionError(
                f"Slurm's {error.filename} is not installed here; submit from a login node, or "
                "look at the job with --dry-run"
            ) from error
        except FailedJobError as error:
            raise SubmissionError(f"Slurm refused the job: {error}") from error
        ids = [job.job_id for job in jobs]
        self._describe(ids, code, folder)
        return ids

    def _next_folder(self) -> Path:
        """A folder of its own for each submission: the logs of all ranks, and records."""
        now, used = time.strftime("%Y%m%d-%H%M%S"), {path.name for path in self.folder.glob("*")}
        return self.folder / next(
            name for name in (f"{now}-{number}" for number in range(100)) if name not in used
        )

    def _describe(self, ids: list[str], code: FrozenCode, folder: Path) -> None:
        """For `status.py`, which reads files alone if need be."""
        values = {
            "job_ids": ids,
            "kind": self.job.kind,
            "name": self.job.name,
            "out": str(Path(self.job.out).absolute())
            if "://" not in self.job.out
            else self.job.out,
            "command": list(self.command(code)),
            "nodes": self.num_nodes,
            "ranks": self.num_ranks,
            "submitted": time.time(),
            "cluster": {k: v for k, v in asdict(self.cluster).items() if k != "env"},  # no secrets
            "max_duration": self.job.run.train.max_duration if self.job.run else None,
            "global_batch_size": self.job.run.train.global_batch_size if self.job.run else None,
            "num_samples": self.job.run.data.num_samples if self.job.run else None,
            "state_folder": self._state_folder(),
        }
        write_json(folder / LAUNCH_NAME, values)

    def _state_folder(self) -> str | None:
        run = self.job.run
        if run is None:
            return None
        folder = run.checkpoint.folder or f"{run.out}/state"
        return folder if "://" in folder else str(Path(folder).absolute())

    @property
    def _python(self) -> str:
        return self.cluster.container_python if self.cluster.container else sys.executable

    def _executor(self, code: FrozenCode, folder: Path) -> _Executor:
        executor = _Executor(folder, max_num_timeout=_FOREVER, python=shlex.quote(self._python))
        executor.update_parameters(**self._parameters(code, folder))
        return executor

    def _parameters(self, code: FrozenCode, folder: Path) -> dict[str, Any]:
        cluster = self.cluster
        set_options = {key: getattr(cluster, key) for key in SBATCH_OPTIONS}
        parameters: dict[str, Any] = {k: v for k, v in set_options.items() if v is not None}
        more: dict[str, Any] = {"requeue": True, "chdir": str(code.path)}
        conditions = [f"afterok:{job_id}" for job_id in self.after]
        conditions += [f"afterany:{job_id}" for job_id in self.after_any]
        if conditions:
            parameters["dependency"] = ",".join(conditions)
            more["kill-on-invalid-dep"] = "yes"
        if cluster.gpus_per_node and self.job.ranks:
            parameters["gpus_per_node"] = cluster.gpus_per_node
        container = []
        if cluster.container is not None:
            container.append(f"--container-image={cluster.container}")
            if cluster.container_mounts is not None:
                container.append(f"--container-mounts={cluster.container_mounts}")
        # The end of the batch script runs outside of containers, with the host's own Python.
        python = "python3" if cluster.container else shlex.quote(sys.executable)
        end = [f"exec {python} -m launchers.batch_end {shlex.quote(str(folder))} $?"]
        end += [shlex.quote(self.metrics)] if self.metrics else []
        return {
            **parameters,
            "job_name": self.job.name,
            "time": minutes(cluster.time),
            "nodes": self.num_nodes,
            "ntasks_per_node": self.ranks_per_node,
            "cpus_per_task": cluster.cpus_per_gpu,
            "signal_delay_s": cluster.grace_seconds,
            "stderr_to_stdout": True,  # one log per rank, in the order of events
            "setup": [f"export PYTHONPATH={shlex.quote(str(code.path))}", *cluster.setup],
            # A rank that ends badly takes the others down; a start adds to logs.
            "srun_args": ["--kill-on-bad-exit=1", "--open-mode=append", *container],
            "teardown": [" ".join(end)],
            "additional_parameters": more,
        }
