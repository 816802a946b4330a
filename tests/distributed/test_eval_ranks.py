"""The evaluator over several processes: ranks, kills, and a second program on the same sweep."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_processes import run_calls, start_calls, until, wait_for
from safetensors.numpy import load_file
from small_elit import make_elit_bundle
from small_pipeline import run_command
from small_sweep import make_sweep_inputs, numbers_of, sweep_config, sweep_file

from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.commands import sweep
from lgm_scale.evaluation.engine.chunks import ChunkResult, ChunkStore, Job
from lgm_scale.evaluation.engine.parts import Part, make_missing, missing_tasks
from lgm_scale.evaluation.sweep.measure import measure
from lgm_scale.evaluation.sweep.rules import load_sweep

pytestmark = [pytest.mark.slow, pytest.mark.system]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_sweep_inputs(tmp_path_factory.mktemp("inputs"))


PIXELS: dict[str, Any] = {
    "cells": [{"num_tokens": [4, 9]}], "num_images": 61, "chunk_size": 2, "batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory) -> Path:
    """The sweep in this one process."""
    out = tmp_path_factory.mktemp("alone") / "report"
    measure(sweep_config(made, out, **PIXELS))
    return out


def same_results(out: Path, other: Path) -> None:
    assert numbers_of(out) == numbers_of(other)
    for path in sorted((other / "chunks").glob("*/*.safetensors")):
        here = load_file(out / "chunks" / path.parent.name / path.name)
        there = load_file(path)
        assert here.keys() == there.keys()
        assert all(np.array_equal(here[name], there[name]) for name in there), path


def run(path: Path, ranks: int) -> None:
    done = run_command("eval/sweep.py", path, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]


def test_three_ranks_give_the_same_bits(made, alone, tmp_path):
    out = tmp_path / "report"
    run(sweep_file(made, out, **PIXELS | {"batch_size": 7}), 3)
    same_results(out, alone)
    assert (out / "index.html").is_file()


def test_two_ranks_give_the_same_bits_on_a_grid(made, tmp_path):
    """Two budgets of an ELIT, one of them with autoguidance."""
    auto = {"num_tokens": 16, "uncond_num_tokens": 4, "guidance": "autoguidance"}
    changes: dict[str, Any] = {
        "bundle": str(make_elit_bundle(tmp_path / "elit")),
        "cells": [{"num_tokens": 4}, auto],
    }
    measure(sweep_config(made, tmp_path / "one", batch_size=3, **changes))
    run(sweep_file(made, tmp_path / "two", batch_size=2, **changes), 2)
    same_results(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two" / "index.html").is_file()


def test_two_ranks_give_the_same_bits_with_inception(made, tmp_path, inception_file):
    """Eleven images in six chunks, two for each rank to idle over."""
    statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "reference.npz", **statistics)
    changes = {
        "cells": [{"num_tokens": 9}], "chunk_size": 4, "images": None, "num_components": 0,
        "metrics": ["is"], "inception": str(inception_file),
        "reference": str(tmp_path / "reference.npz"),
    }  # fmt: skip
    measure(sweep_config(made, tmp_path / "one", batch_size=4, **changes))
    run(sweep_file(made, tmp_path / "two", batch_size=1, **changes), 2)
    same_results(tmp_path / "two", tmp_path / "one")
    (metrics,) = numbers_of(tmp_path / "two").values()
    assert metrics["is"] > 1


def chunk_files(out: Path) -> dict[Path, tuple[int, int]]:
    """Every chunk of samples, by what tells whether it was written again."""
    found = {}
    for path in (out / "chunks").glob("samples*/*.safetensors"):
        state = path.stat()
        found[path] = (state.st_ino, state.st_mtime_ns)
    return found


def _sweep_on_a_rank(path: Path, out: Path, enough: int) -> None:
    """The sweep, which stands still once there are `enough` chunks, until it is killed."""
    from lgm_scale.evaluation.sweep import samples as generate

    real = generate.sample_images

    def sample(*args, **options):
        if len(chunk_files(out)) >= enough:
            threading.Event().wait()
        return real(*args, **options)

    generate.sample_images = sample
    sys.argv = ["sweep.py", str(path)]
    exit_on_user_error(sweep.main)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_sweep_goes_on_with_another_number_of_ranks(
    made, alone, tmp_path, seed, monkeypatch
):
    """Killed at a random moment between the first chunk of samples and the last one."""
    out = tmp_path / "report"
    path = sweep_file(made, out, **PIXELS)
    total, wanted = 2 * 31, random.Random(seed).randrange(1, 50)
    log = tmp_path / "log"
    ranks = start_calls(2, _sweep_on_a_rank, path, out, total - 8, log=log)
    until(lambda: len(chunk_files(out)) >= wanted, ranks, log)
    for rank in ranks:
        rank.kill()
    wait_for(ranks)
    kept = chunk_files(out)
    assert wanted <= len(kept) < total
    made_now: Counter[tuple[int, int]] = Counter()
    from lgm_scale.evaluation.sweep import samples as generate

    real = generate.sample_images

    def spy(pipe, indices, num_tokens, *rest):
        made_now.update((num_tokens, index) for index in indices.tolist())
        return real(pipe, indices, num_tokens, *rest)

    monkeypatch.setattr(generate, "sample_images", spy)
    measure(sweep_config(made, out, **PIXELS))
    now = chunk_files(out)
    assert len(now) == total
    assert {file: now[file] for file in kept} == kept, "a finished chunk was made again"
    images = Counter()
    for file in set(now) - set(kept):
        start, stop = (int(part) for part in file.stem.split("-"))
        num_tokens = int(file.parent.name.split("-k")[1][:4])
        images.update((num_tokens, index) for index in range(start, stop))
    assert made_now == images
    assert set(images.values()) == {1}
    same_results(out, alone)


def _be_a_program_of_its_own() -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def _sweep(path: Path) -> None:
    _be_a_program_of_its_own()
    measure(load_sweep(str(path), []))


def test_two_programs_on_one_sweep_count_nothing_twice(made, alone, tmp_path):
    out = tmp_path / "report"
    path = sweep_file(made, out, **PIXELS)
    run_calls(2, _sweep, path, log=tmp_path / "log")
    same_results(out, alone)


def _work(folder: Path, log: Path) -> None:
    _be_a_program_of_its_own()

    def work(start: int, stop: int) -> ChunkResult:
        with log.open("a") as file:
            file.write(f"{start}\n")
        time.sleep(0.01)
        return ChunkResult({"index": np.arange(start, stop)})

    job = Job("numbers", {"kind": "test"}, 60, 2, work)
    store = ChunkStore(folder)
    missing = missing_tasks([job], store, Part())
    log.with_name(f"ready-{os.getpid()}").touch()
    while len(list(log.parent.glob("ready-*"))) < 2:  # both deal themselves all chunks
        time.sleep(0.001)
    make_missing([job], store, missing, lambda task: None)


def test_two_programs_share_the_work_and_make_each_chunk_once(tmp_path):
    log = tmp_path / "made"
    run_calls(2, _work, tmp_path / "store", log, log=tmp_path / "log")
    assert sorted(map(int, log.read_text().split())) == list(range(0, 60, 2))
    job = Job("numbers", {"kind": "test"}, 60, 2, lambda *_: ChunkResult({}))
    assert ChunkStore(tmp_path / "store").gather(job, ["index"])["index"].tolist() == list(
        range(60)
    )
