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

STEPS = 80
KILLS = int(os.environ.get("LGM_KILLS", "5"))
"""By hand: LGM_KILLS=20 pytest tests/distributed/test_kill.py."""
SURVIVOR_SECONDS = 60


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
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
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
    job = (config(small_pipeline, out), STRATEGIES["fsdp2"])
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
    assert losses(out) == losses(reference("fsdp2"))
    attempts = sorted((out / "state" / "attempts").iterdir())
    assert json.loads(attempts[-1].read_text())["resumed_step"] == int(newest[2:10])
