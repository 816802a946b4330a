"""kill -9 of one rank or of all, at random moments, changes nothing in the end."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from rank_processes import run_ranks, start_ranks, states, wait_for
from small_pipeline import SmallPipeline, metrics
from test_strategies import STRATEGIES

from lgm_scale.data.epochs import EpochDataset

STEPS = 80
KILLS = int(os.environ.get("LGM_KILLS", "3"))
"""By hand: LGM_KILLS=20 pytest tests/distributed/test_kill.py."""
SURVIVOR_SECONDS = 120  # on a machine with other work


def config(pipeline: SmallPipeline, out: Path) -> Path:
    return pipeline.generator_config(
        out,
        run_name="kill",
        train={
            "max_duration": f"{max(STEPS, KILLS * 16)}ba",
            "global_batch_size": 8,
            "precision": "fp32",
        },
        checkpoint={"interval": "3ba", "keep": 2},
    )


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in metrics(out)]


@pytest.fixture(scope="module")
def folder(small_pipeline):
    path = small_pipeline.root / "kill"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def reference(small_pipeline, folder):
    """The undisturbed run under a strategy."""

    @functools.cache
    def run(strategy: str) -> Path:
        out = folder / f"{strategy}-reference"
        run_ranks(
            2, [(config(small_pipeline, out), STRATEGIES[strategy])], folder / f"{strategy}-log"
        )
        return out

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    ["ddp", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("fsdp", "zero2"))],
)
def test_kill_9_at_random_moments(small_pipeline, folder, reference, strategy):
    out, log = folder / strategy, folder / f"{strategy}-killed-log"
    job = (config(small_pipeline, out), STRATEGIES[strategy])
    moments = random.Random(strategy)
    for kill in range(KILLS):
        before = states(out)
        ranks = start_ranks(2, [job], log)
        deadline = time.monotonic() + 240
        while states(out)[-1:] == before[-1:]:
            assert time.monotonic() < deadline
            assert all(process.is_alive() for process in ranks), log
            time.sleep(0.002)
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
        assert not (out / "bundle").exists(), "the run ended before it was killed"
    run_ranks(2, [job], log)
    undisturbed = reference(strategy)
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
def test_a_signal_to_one_rank_saves_and_stops_all(small_pipeline, folder, reference, asked):
    out, log = folder / f"asked-{asked}", folder / f"asked-{asked}-log"
    job = (config(small_pipeline, out), STRATEGIES["fsdp"])
    ranks = start_ranks(2, [job], log)
    deadline = time.monotonic() + 240
    while not states(out):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(ranks[asked].pid, (signal.SIGTERM, signal.SIGUSR2)[asked])
    assert wait_for(ranks) == [75, 75]
    newest = states(out)[-1]
    told = (log.parent / f"{log.name}-0.txt").read_text()
    assert f"stopped after step {int(newest[2:10])}" in told
    run_ranks(2, [job], log)
    assert losses(out) == losses(reference("fsdp"))
    attempts = sorted((out / "state" / "attempts").iterdir())
    assert json.loads(attempts[-1].read_text())["resumed_step"] == int(newest[2:10])


def wait_for_state(out: Path, ranks) -> None:
    deadline = time.monotonic() + 240
    while not states(out):
        assert all(process.is_alive() for process in ranks)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def die_between_epochs() -> None:
    """Let rank 1 die where rank 0 then waits for it in shared memory, not in a collective."""
    get_work = EpochDataset._get_work

    def dying(self, epoch, sample_in_epoch):
        if os.environ["RANK"] == "1" and epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return get_work(self, epoch, sample_in_epoch)

    EpochDataset._get_work = dying  # type: ignore[method-assign]


def test_a_death_between_epochs_ends_the_other_rank(small_pipeline, folder):
    job = (config(small_pipeline, folder / "between"), [])
    log = folder / "between-log"
    statuses = wait_for(start_ranks(2, [job], log, die_between_epochs), 240)
    assert statuses == [1, -signal.SIGKILL]
    told = (folder / "between-log-0.txt").read_text()
    assert "the process of rank 1 is gone, and this one still waits for it" in told
    assert "_get_work" in told  # where it waited


def test_a_silent_rank_ends_the_run_within_the_timeout(small_pipeline, folder):
    out, timeout = folder / "silent", 15
    job = (config(small_pipeline, out), [f"parallel.timeout_seconds={timeout}"])
    ranks = start_ranks(2, [job], folder / "silent-log")
    wait_for_state(out, ranks)
    os.kill(ranks[1].pid, signal.SIGSTOP)  # as if its node were cut off: alive, and not answering
    stopped = time.monotonic()
    ranks[0].join(timeout + SURVIVOR_SECONDS)
    waited = time.monotonic() - stopped
    ranks[1].kill()
    assert ranks[0].exitcode not in (None, 0)
    assert waited < timeout + SURVIVOR_SECONDS
    wait_for(ranks)


def test_ranks_that_come_back_cannot_touch_what_another_attempt_did(
    small_pipeline, folder, reference
):
    out = folder / "back"
    job = (config(small_pipeline, out), STRATEGIES["ddp"])
    old = start_ranks(2, [job], folder / "back-old-log")
    wait_for_state(out, old)
    for process in old:
        os.kill(process.pid, signal.SIGSTOP)
    run_ranks(2, [job], folder / "back-new-log")
    after = {path: path.read_bytes() for path in (out / "state").rglob("*") if path.is_file()}
    bundle = (out / "bundle" / "generator.safetensors").read_bytes()
    for process in old:
        os.kill(process.pid, signal.SIGCONT)
    assert wait_for(old) == [2, 2]
    assert "attempt 2 has taken over" in (folder / "back-old-log-0.txt").read_text()
    assert all(path.read_bytes() == content for path, content in after.items())
    assert (out / "bundle" / "generator.safetensors").read_bytes() == bundle
    assert bundle == (reference("ddp") / "bundle" / "generator.safetensors").read_bytes()
