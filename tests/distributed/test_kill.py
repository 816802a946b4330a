"""kill -9 of one rank or of all, at random moments, changes nothing in the end."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rank_processes import run_ranks, start_ranks, states, until, wait_for, waited_for
from small_pipeline import SmallPipeline, metrics
from test_strategies import STRATEGIES

from lgm_scale.checkpoint.checkpointer import Checkpointer
from lgm_scale.data.epochs import EpochDataset
from lgm_scale.storage.stores import Storage
from lgm_scale.training.callbacks import StepKeys
from lgm_scale.training.stopping import StopRequest

KILLS = int(os.environ.get("LGM_KILLS", "3"))
"""By hand: LGM_KILLS=20 pytest tests/distributed/test_kill.py."""
STEPS, ASKED_STEP = 16, 5
SURVIVOR_SECONDS = 240  # on a machine with other work
PATIENCE = 600


def config(pipeline: SmallPipeline, out: Path, steps: int = STEPS) -> Path:
    return pipeline.generator_config(
        out,
        run_name="kill",
        train={"max_duration": f"{steps}ba", "global_batch_size": 8, "precision": "fp32"},
        checkpoint={"interval": "3ba", "keep": 2},
    )


def at_step(step: int, act: Callable[[], object]) -> None:
    """Let `act` be called before a step of the training command in this process."""
    start = StepKeys.batch_start

    def batch_start(self, state, logger):
        start(self, state, logger)
        if state.batch["step"] == step:
            act()

    StepKeys.batch_start = batch_start  # type: ignore[method-assign]


def stay_at(step: int) -> None:
    """No test may miss its moment: a rank is there until it is killed."""
    at_step(step, lambda: threading.Event().wait())


def be_still_at_step_10(ranks: tuple[int, ...]) -> None:
    """As if a node were cut off: alive, and not answering."""
    if int(os.environ["RANK"]) in ranks:
        at_step(10, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def be_asked(asked: int) -> None:
    """A rank that is to be signalled goes no further until it is, with a state before that."""
    Checkpointer.save = waited_for(Checkpointer.save)  # type: ignore[method-assign]
    told, on_signal = threading.Event(), StopRequest._on_signal

    def note_signal(self, number, frame):
        on_signal(self, number, frame)
        told.set()

    StopRequest._on_signal = note_signal  # type: ignore[method-assign]
    if int(os.environ["RANK"]) == asked:
        at_step(ASKED_STEP, lambda: told.wait(PATIENCE))


def is_still(process) -> bool:
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in metrics(out)]


@pytest.fixture(scope="module")
def folder(small_pipeline):
    path = small_pipeline.root / "kill"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="module")
def reference(small_pipeline, folder):
    """The undisturbed run under a strategy."""

    @functools.cache
    def run(strategy: str, steps: int = STEPS) -> Path:
        out = folder / f"{strategy}-{steps}"
        job = (config(small_pipeline, out, steps), STRATEGIES[strategy])
        run_ranks(2, [job], folder / f"{out.name}-log")
        return out

    return run


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.thorough)])
def test_kill_9_at_random_moments(small_pipeline, tmp_path, reference, strategy):
    out, log, steps = tmp_path / "run", tmp_path / "log", KILLS * 16
    job = (config(small_pipeline, out, steps), STRATEGIES[strategy])
    moments = random.Random(strategy)
    for kill in range(KILLS):
        before = states(out)
        last = steps * (kill + 1) // (KILLS + 1)
        ranks = start_ranks(2, [job], log, functools.partial(stay_at, last))
        until(lambda before=before: states(out)[-1:] != before[-1:], ranks, log)
        time.sleep(moments.uniform(0, 0.4))
        if kill % 2 == 0:
            victim = moments.randrange(2)
            ranks[victim].kill()
            statuses = wait_for(ranks, SURVIVOR_SECONDS)  # the survivor must not hang
            assert statuses[victim] == -signal.SIGKILL
            assert statuses[1 - victim] not in (0, None)
        else:
            for process in ranks:
                process.kill()
            wait_for(ranks, SURVIVOR_SECONDS)
    run_ranks(2, [job], log)
    undisturbed = reference(strategy, steps)
    assert losses(out) == losses(undisturbed)
    weights = [
        (run / "bundle" / "generator.safetensors").read_bytes() for run in (out, undisturbed)
    ]
    assert weights[0] == weights[1]
    attempts = sorted((out / "state" / "attempts").iterdir())
    resumed = [json.loads(path.read_text())["resumed_step"] for path in attempts]
    assert len(resumed) == KILLS + 1
    assert resumed == sorted(resumed)
    assert resumed[-1] > 0


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_rank_saves_and_stops_all(small_pipeline, tmp_path, reference, asked):
    out, log = tmp_path / "run", tmp_path / "log"
    job = (config(small_pipeline, out), STRATEGIES["fsdp"])
    ranks = start_ranks(2, [job], log, functools.partial(be_asked, asked))
    until(lambda: states(out), ranks, log)
    os.kill(ranks[asked].pid, (signal.SIGTERM, signal.SIGUSR2)[asked])
    assert wait_for(ranks) == [75, 75]
    newest = states(out)[-1]
    told = (log.parent / f"{log.name}-0.txt").read_text()
    assert int(newest[2:10]) <= ASKED_STEP + 2  # it stops after the next step
    assert f"stopped after step {int(newest[2:10])}" in told
    run_ranks(2, [job], log)
    assert losses(out) == losses(reference("fsdp"))
    attempts = sorted((out / "state" / "attempts").iterdir())
    assert json.loads(attempts[-1].read_text())["resumed_step"] == int(newest[2:10])


def die_between_epochs() -> None:
    """Let rank 1 die where rank 0 then waits for it in shared memory, not in a collective."""
    get_work = EpochDataset._get_work

    def dying(self, epoch, sample_in_epoch):
        if os.environ["RANK"] == "1" and epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return get_work(self, epoch, sample_in_epoch)

    EpochDataset._get_work = dying  # type: ignore[method-assign]


def test_a_death_between_epochs_ends_the_other_rank(small_pipeline, tmp_path):
    job, log = (config(small_pipeline, tmp_path / "run"), []), tmp_path / "log"
    statuses = wait_for(start_ranks(2, [job], log, die_between_epochs), 240)
    assert statuses == [1, -signal.SIGKILL]
    told = (tmp_path / "log-0.txt").read_text()
    assert "the process of rank 1 is gone, and this one still waits for it" in told
    assert "_get_work" in told  # where it waited


def test_a_silent_rank_ends_the_run_within_the_timeout(small_pipeline, tmp_path):
    job = (config(small_pipeline, tmp_path / "run"), ["parallel.timeout_seconds=30"])
    silent = functools.partial(be_still_at_step_10, (1,))
    ranks = start_ranks(2, [job], tmp_path / "log", silent)
    until(lambda: is_still(ranks[1]), ranks[1:], tmp_path / "log")
    (status,) = wait_for(ranks[:1])
    ranks[1].kill()
    assert status == 1
    assert "Timed out waiting 30000ms" in (tmp_path / "log-0.txt").read_text()  # 300 s by default
    wait_for(ranks[1:])


def test_ranks_that_come_back_cannot_touch_what_another_attempt_did(
    small_pipeline, tmp_path, reference
):
    out = tmp_path / "run"
    job = (config(small_pipeline, out), STRATEGIES["ddp"])
    still = functools.partial(be_still_at_step_10, (0, 1))
    old = start_ranks(2, [job], tmp_path / "old-log", still)
    until(lambda: all(map(is_still, old)), old, tmp_path / "old-log")
    assert states(out)
    run_ranks(2, [job], tmp_path / "new-log")
    # Not what a rank was writing aside when it was stopped: that moves when it goes on.
    storage = Storage(out / "state")
    after = {name: storage.read(name) for name in storage.names()}
    bundle = (out / "bundle" / "generator.safetensors").read_bytes()
    for process in old:
        os.kill(process.pid, signal.SIGCONT)
    assert wait_for(old) == [2, 2]
    assert "attempt 2 has taken over" in (tmp_path / "old-log-0.txt").read_text()
    assert all(storage.read(name) == content for name, content in after.items())
    assert (out / "bundle" / "generator.safetensors").read_bytes() == bundle
    assert bundle == (reference("ddp") / "bundle" / "generator.safetensors").read_bytes()
