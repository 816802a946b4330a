"""How tests submit jobs and look at them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from small_pipeline import ROOT, SmallPipeline, metrics
from virtual_cluster import VirtualCluster

from launchers.records import Start, Starts

STEPS, INTERVAL = 60, 10
PATIENCE = 1200  # seconds, on a machine with other work
CONFIG = "yamls/quickstart/dit.yaml"
HELD = "held"


@dataclass
class Desk:
    """Where a person sits: a checkout of the project, and Slurm's commands."""

    cluster: VirtualCluster
    folder: Path
    pipeline: SmallPipeline

    def run(self, script: str, *args: str | Path) -> subprocess.CompletedProcess:
        """One of the project's commands, in the checkout."""
        environment = os.environ | self.cluster.environment | {"PYTHONPATH": str(self.folder)}
        return subprocess.run(
            [sys.executable, script, *map(str, args)],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip

    def train(self, out: str, *overrides: str, nodes: int = 2, exclude: str = "") -> Job:
        """Submit the quickstart's generator, shrunk, with one rank on each node."""
        options = ["--nodes", str(nodes), "--gpus-per-node", "1", "--config", CONFIG]
        options += ["--exclude", exclude] if exclude else []
        name = f"run_name={Path(out).name}"
        return self.submit(out, *options, *self.overrides(out, name, *overrides))

    def overrides(self, out: str, *more: str) -> list[str]:
        """What shrinks the quickstart's generator."""
        small = self.pipeline
        return [
            *(f"out={out}", f"tokenizer={small.tokenizer}", f"data.path={small.latents}"),
            *("data.num_samples=68", "model.latent_dim=8", "model.num_base_tokens=16"),
            *("lengths.choices=[8,4,16]", "train.global_batch_size=8"),
            *(f"train.max_duration={STEPS}ba", f"checkpoint.interval={INTERVAL}ba"),
            *("logging.interval=5", "logging.progress_bar=false", *more),
        ]

    def submit(self, out: str, *args: str) -> Job:
        """Submit a job that makes `out`."""
        result = self.run("launchers/slurm.py", "--cluster", "virtual.yaml", *args)
        assert result.returncode == 0, result.stderr + result.stdout
        ids = re.findall(r"submitted (\d+):", result.stdout)
        return Job(self, self.folder / out, ids)

    def processes(self, node: str, word: bytes) -> list[int]:
        """Ids of processes on a node with this word in their command line."""
        found = []
        for pid in self.cluster.processes_on(node):
            with contextlib.suppress(OSError):  # it has just ended
                if word in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def hold(self, name: str, *steps: int) -> None:
        """Let a run wait before these steps until it is released, or asked to stop.

        No test may miss its moment: 60 steps take a second on a machine that is idle.
        """
        for step in steps:
            (self.folder / HELD / f"{name}-{step}").touch()

    def holds(self, name: str, step: int) -> bool:
        """Whether a run has come to where it waits."""
        return (self.folder / HELD / f"{name}-{step}.reached").exists()

    def release(self, name: str, step: int) -> None:
        (self.folder / HELD / f"{name}-{step}").unlink()

    def clear(self) -> None:
        """Leave nothing of a test to the next one, or to its own second try."""
        self.cluster.clear()
        for pid in [
            pid for node in self.cluster.nodes for pid in self.processes(node, b"submitit")
        ]:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)
        for name in ("runs", HELD):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / HELD).mkdir()

    def status(self, out: Path) -> str:
        """What `launchers/status.py` says of a run."""
        result = self.run("launchers/status.py", out)
        assert result.returncode == 0, result.stderr
        return result.stdout


@dataclass
class Job:
    """A submitted job; of an array, with the job that joins it."""

    desk: Desk
    out: Path
    ids: list[str]

    @property
    def id(self) -> str:
        return self.ids[0]

    def state(self, job_id: str | None = None) -> str:
        """Slurm's word for its state."""
        shown = self.desk.cluster.run("scontrol", "--oneliner", "show", "job", job_id or self.id)
        return re.findall(r" JobState=(\w+)", shown)[0]

    def starts(self) -> list[Start]:
        """What its launches have noted of every start; nothing of it passes."""
        return Starts(self.folder / self.id).read()

    def nodes(self) -> list[str]:
        """Where it was started last, rank 0's node first."""
        return self.starts()[-1].nodes

    def wait(self, *states: str) -> str:
        """Wait for one of the states that a job stays in; by default, for any of them."""
        final = states or ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        self.until(lambda: self.state() in final, f"be {' or '.join(final)}")
        return self.state()

    def until(self, condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        """Wait, and on failure say how the job is.

        Asking Slurm takes a process: at a fixed twentieth of a second that was an eighth of a core.
        """
        deadline, pause = time.monotonic() + seconds, 0.05
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"job {self.id} did not {what}:\n{self.log()[-6000:]}")
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)

    def reach(self, step: int) -> None:
        """Wait until it is held before that step."""

        def reached() -> bool:
            if self.desk.holds(self.out.name, step):
                return True
            assert self.state() in ("PENDING", "RUNNING", "COMPLETING"), self.log()[-6000:]
            return self.desk.holds(self.out.name, step)

        self.until(reached, f"reach step {step}")

    def restarted(self, count: int) -> None:
        """Wait until it has been started for the time number `count` after the first."""
        self.until(lambda: len(self.starts()) > count, f"start again ({count})")

    @property
    def launches(self) -> Path:
        """Folder of the launches of this run, whose code they share."""
        inside = self.out / "slurm"
        return inside if inside.is_dir() else self.out.with_name(self.out.name + ".slurm")

    @property
    def folder(self) -> Path:
        """Of the last launch."""
        return max(path.parent for path in self.launches.glob("*/launch.json"))

    def log(self, rank: int = 0, job_id: str | None = None) -> str:
        """A rank's log; rank 0's is the job's."""
        found = list(self.launches.glob(f"*/{job_id or self.id}_{rank}_log.out"))
        return found[0].read_text() if found else "(no log)"

    def trainer_on(self, node: str) -> int:
        """Process id of this run's trainer on a node.

        Its data workers are forks and have its command line; their parent is among the found.
        """
        found = self.desk.processes(node, f"out={self.out.relative_to(self.desk.folder)}".encode())
        first = [pid for pid in found if _parent(pid) not in found]
        assert first, f"no trainer of {self.out} on {node}"
        return first[0]

    def losses(self) -> list[float]:
        """Of every step, in order."""
        rows = metrics(self.out)
        assert [row["step"] for row in rows] == list(range(len(rows)))
        return [row["loss"] for row in rows]


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return 0


def _insert(file: Path, before: str, text: str) -> None:
    code = file.read_text()
    assert code.count(before) == 1
    file.write_text(code.replace(before, text + before))


def copy_checkout(target: Path) -> None:
    """The project's code and configurations, as a person has them."""
    skip = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("lgm_scale", "data_tools", "eval", "launchers", "yamls"):
        shutil.copytree(ROOT / name, target / name, ignore=skip)
    held = target / HELD
    _insert(  # training waits where `Desk.hold` says, and says that it does
        target / "lgm_scale" / "training" / "stopping.py",
        "    def batch_end(self",
        f"""    def batch_start(self, state: State, logger: Logger) -> None:
        import time, pathlib
        held = pathlib.Path({str(held)!r}, f"{{state.run_name}}-{{state.timestamp.batch.value}}")
        while held.exists() and not self._asked:
            held.with_suffix(".reached").touch()
            time.sleep(0.05)

""",
    )
    _insert(  # the second part of a sweep waits before its second batch
        target / "lgm_scale" / "evaluation" / "sweep" / "samples.py",
        "    count = len(indices)\n",
        f"""    import sys, time, pathlib
    global _calls
    _calls = globals().get("_calls", 0) + 1
    held = pathlib.Path({str(held)!r}, "part")
    while _calls > 1 and "part=1/2" in sys.argv and held.exists():
        time.sleep(0.05)
""",
    )
    values = {
        **{"gpus_per_node": 2, "cpus_per_gpu": 1, "time": "30", "grace_seconds": 30},
        "temporary": "/dev/shm",  # every node's own here
    }
    (target / "virtual.yaml").write_text(yaml.safe_dump(values))
