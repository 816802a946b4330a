"""Training under a real Slurm: whatever happens to the nodes, the numbers are the same."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from desk import CONFIG, PATIENCE, STEPS, Desk, Job
from rank_processes import states
from small_pipeline import metrics

pytestmark = [pytest.mark.servers, pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1800)]


@contextmanager
def edited(file: Path, text: str) -> Iterator[None]:
    """A file of the checkout holds this text meanwhile."""
    before = file.read_text()
    file.write_text(text)
    try:
        yield
    finally:
        file.write_text(before)


def test_interrupted_and_resumed(desk: Desk, undisturbed: list[float]):
    """One run on two nodes, stopped in three ways, at other steps each time."""
    desk.hold("stopped", 5, 15, 25)
    job = desk.train("runs/stopped")
    # The job runs a copy of the code: what happens to the checkout now is none of its business.
    with edited(desk.folder / "lgm_scale" / "train.py", "raise SystemExit('edited')\n"):
        stop_in_three_ways(desk, job)
        assert job.wait() == "COMPLETED", job.log()
    assert len(undisturbed) == STEPS
    assert job.losses() == undisturbed
    # The other rank is told at once, and may be killed by Slurm before it could note its own end.
    killed, resumed = job.starts()[2].first_failure(), job.starts()[3]
    assert killed is not None
    assert resumed.time - killed.time < 280  # seconds on a busy machine; a timeout would be 300
    status = desk.status(job.out)
    for words in ("restarts   3", f"step       {STEPS} of {STEPS}", "finished"):
        assert words in status, status
    for words in ("SIGUSR2, state saved", "SIGTERM, state saved", "ended first: signal 9"):
        assert words in status, status


def stop_in_three_ways(desk: Desk, job: Job) -> None:
    """Asked, taken its nodes by a more urgent job, and killed on one of them."""
    cluster = desk.cluster
    job.reach(5)
    cluster.run("scancel", "--signal=TERM", job.id)
    job.restarted(1)
    job.reach(15)  # Slurm asks by the signal that the job wants: SIGUSR2
    urgent = ["--partition=high", f"--nodes={cluster.num_nodes}", "--exclusive"]
    cluster.run("sbatch", *urgent, "--output=/dev/null", "--wrap=sleep 1")
    job.restarted(2)
    desk.release("stopped", 15)
    job.reach(25)
    os.kill(job.trainer_on(job.nodes()[1]), signal.SIGKILL)
    desk.release("stopped", 25)


def test_a_node_that_is_cut_off_is_replaced_and_cannot_write(desk: Desk, undisturbed: list[float]):
    """Two runs lose a node at once: one of two nodes, and the only one, which comes back later."""
    cluster = desk.cluster
    for name in ("pair", "lonely"):
        desk.hold(name, 5)
    pair = desk.train("runs/pair", exclude="n3")
    lonely = desk.train("runs/lonely", nodes=1, exclude="n1,n2")
    try:
        lonely.reach(5)
        stale = lonely.trainer_on("n3")
        os.kill(stale, signal.SIGSTOP)  # it must still be there when its successor runs
        cluster.link("n3", up=False)
        pair.reach(5)
        cluster.link("n2", up=False)
        desk.release("pair", 5)
        # Slurm gives the nodes up, long before rank 0 would fail by its own timeout (`test_kill`).
        pair.restarted(1)
        lonely.restarted(1)
        assert pair.nodes() == ["n1", "n4"]
        assert lonely.nodes() == ["n4"]
        second = lonely.out / "state" / "attempts" / "0002.json"
        lonely.until(second.exists, "be resumed")
        os.kill(stale, signal.SIGCONT)
        desk.release("lonely", 5)
        late = "this is attempt 1 of the run, and attempt 2 has taken over since"
        lonely.until(lambda: late in lonely.log(), "tell the stale trainer")
        assert pair.wait() == "COMPLETED", pair.log()
        assert lonely.wait() == "COMPLETED", lonely.log()
    finally:
        for node in ("n2", "n3"):
            cluster.link(node, up=True)
    assert pair.losses() == undisturbed
    assert lonely.losses() == pytest.approx(undisturbed, abs=1e-3)  # one rank: sums differ
    states = [path.name for path in (lonely.out / "state").glob("ba*")]
    assert all(name.endswith("-a0002") for name in states), states
    for job in (pair, lonely):
        assert "ended by Slurm: NODE_FAIL" in desk.status(job.out)
    cluster.wait_until_idle()


def test_other_launchers_with_explicit_node_ranks(desk: Desk, undisturbed: list[float]):
    """composer on two nodes, killed; then torchrun on two nodes goes on. No launcher of ours."""
    out = desk.folder / "runs" / "by-hand"
    words = shlex.join(
        ["lgm_scale/train.py", CONFIG, *desk.overrides(str(out), "run_name=by-hand")]
    )
    binaries = Path(sys.executable).parent
    common = "--master{0}addr n1 --master{0}port 29500"
    composer = f"composer -n 1 --world_size 2 --node_rank $SLURM_NODEID {common.format('_')}"
    torchrun = (
        f"torchrun --nnodes 2 --nproc-per-node 1 --node-rank $SLURM_NODEID {common.format('-')}"
    )

    place = ["srun", "--nodes=2", "--ntasks-per-node=1", "--nodelist=n1,n2", "--kill-on-bad-exit"]
    place += ["--job-name=by-hand"]

    def srun(launcher: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*place, "sh", "-c", f"exec {binaries}/{launcher} {words}"],
            cwd=desk.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | desk.cluster.environment | {"PYTHONPATH": str(desk.folder)},
        )  # fmt: skip

    desk.hold("by-hand", 25)
    first = srun(composer)
    deadline = time.monotonic() + PATIENCE
    while not desk.holds("by-hand", 25):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for pid in desk.processes("n2", b"run_name=by-hand"):  # the launcher and what it launched
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    first.communicate(timeout=PATIENCE)
    desk.release("by-hand", 25)
    assert first.returncode != 0
    desk.cluster.wait_until_idle()
    newest = int(states(out)[-1][2:10])  # step 20's may not have been sealed: then step 10's is
    second = srun(torchrun)
    text, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, text
    resumed = re.findall(r"resumed after step (\d+)", text)
    assert resumed == [str(newest)], text
    assert newest in (10, 20)
    assert [row["loss"] for row in metrics(out)] == undisturbed


def test_a_config_error_is_told_once_and_not_requeued(desk: Desk):
    job = desk.train("runs/wrong", "data.path=/nowhere", "--files-elsewhere")
    assert job.wait() == "FAILED", job.log()
    log = job.log()
    assert len(re.findall(r"^error: ", log, re.M)) == 1, log
    assert "/nowhere does not exist" in log
    assert "Traceback" not in log
    assert "the user must mend something; not started again" in log
    shown = desk.cluster.run("scontrol", "--oneliner", "show", "job", job.id)
    assert " Restarts=0 " in shown
    assert " ExitCode=2:0 " in shown


def test_three_failures_at_one_step_are_enough(desk: Desk):
    """The checkout has a bug that strikes at step 20, on one rank, and then at each start."""
    source = desk.folder / "lgm_scale" / "training" / "callbacks.py"
    code = source.read_text()
    head = "    def batch_start(self, state: State, logger: Logger) -> None:\n"
    assert code.count(head) >= 1
    body = "if state.timestamp.batch.value == 20 and dist.get_global_rank() == 1:"
    start = code.index(head)
    docstring_end = code.index('"""', code.index('"""', start) + 3) + 4
    bug = f"        {body}\n            raise ArithmeticError('the bug')\n"
    train = desk.folder / "lgm_scale" / "train.py"
    command, future = train.read_text(), "from __future__ import annotations\n"
    assert command.count(future) == 1
    resumed = "os.environ.get('RANK') == '1' and glob.glob('runs/bug/state/ba00000010-*')"
    again = f"import glob, os\nif {resumed}:\n    raise ArithmeticError('the bug')\n"
    with (
        edited(source, code[:docstring_end] + bug + code[docstring_end:]),
        edited(train, command.replace(future, future + again)),
    ):
        job = desk.train("runs/bug")
    assert job.wait() == "FAILED", job.log()
    log = job.log()
    assert log.count("=== start ") == 3, log
    assert "rank 1 on n2 failed first" in log
    assert "ArithmeticError: the bug" in log  # rank 1's, in the top-level log
    assert "3 failures in a row after step 20, giving up; not started again" in log
    assert "restarts   2" in desk.status(job.out)


STANDS_STILL = """
import signal, sys
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))
signal.pause()
"""
"""In place of a training of which nothing is looked at."""


def test_a_live_run_is_not_joined(desk: Desk):
    with edited(desk.folder / "lgm_scale" / "train.py", STANDS_STILL):
        job = desk.train("runs/live")
    again = ["--cluster", "virtual.yaml", "--config", "yamls/quickstart/dit.yaml"]
    again += ["--nodes", "2", "--gpus-per-node", "1"]
    again += desk.overrides("runs/live", "run_name=live")
    refused = desk.run("launchers/slurm.py", *again)
    assert refused.returncode == 2
    assert f"a live job has this name or writes runs/live: {job.id} (" in refused.stderr
    taken = desk.run("launchers/slurm.py", *again, "--take-over")
    assert taken.returncode == 0, taken.stderr
    job.wait("CANCELLED")
    successor = Job(desk, job.out, [taken.stdout.split("submitted ")[1].split(":")[0]])
    desk.cluster.run("scancel", successor.id)
    successor.wait("CANCELLED")


def test_slurm_says_what_it_dislikes(desk: Desk):
    common = ["--cluster", "virtual.yaml", "--config", "yamls/quickstart/dit.yaml"]
    common += desk.overrides("runs/refused", "run_name=refused")
    unknown = desk.run("launchers/slurm.py", *common, "--partition", "nowhere")
    assert unknown.returncode == 2
    assert "invalid partition specified: nowhere" in unknown.stderr
    assert "Traceback" not in unknown.stderr
