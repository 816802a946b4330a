"""Where an evaluation spends its time and memory.

    python -m benchmarks.evaluation [--inception FILE] [--bundle BUNDLE] [--num-images 50000]
        [--threads 1]

Three tables: the statistics of a cell, from synthetic features of Inception's size, in a process of
its own, with its peak memory; features through the evaluator against the bare network (alternating,
same process); and, for a bundle, the share of every stage of a sweep of a few images.
Without --inception random weights are used: speed does not depend on them.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import numpy as np
import torch
import yaml

from benchmarks.harness import command_line, print_rates, print_table
from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.engine.chunks import ChunkResult, Job
from lgm_scale.evaluation.engine.parts import Part
from lgm_scale.evaluation.engine.stages import Engine
from lgm_scale.evaluation.engine.statistics import FeatureStatistics
from lgm_scale.evaluation.features.inception import InceptionFeatures
from lgm_scale.evaluation.metrics.scores import frechet_distance

DIM, POOL = 2048, "inception_pool"
Result = TypeVar("Result")


def random_inception(path: Path) -> Path:
    """A file of random Inception weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    network = module.FeatureExtractorInceptionV3
    with (
        patch.object(module, "load_state_dict_from_url", lambda *_, **__: {}),
        patch.object(network, "load_state_dict", lambda *_, **__: None),
    ):
        torch.save(network("inception-v3-compat", ["2048"]).state_dict(), path)
    return path


def features_against_bare_network(weights: Path, device: torch.device, repeats: int) -> None:
    """Images per second of the evaluator's features and of the network alone."""
    space = InceptionFeatures(weights, device)
    count = 8 if device.type == "cpu" else 200
    images = torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8, device=device)
    sizes = 4 if device.type == "cpu" else count

    @torch.inference_mode()
    def bare() -> None:
        for batch in images.split(sizes):
            space.net(batch)

    candidates = {"bare network": bare, "evaluator": lambda: space(images)}
    print_rates("Features", "images", count, candidates, repeats, device)


def timed(laps: dict[str, tuple[float, float]], name: str, work: Callable[[], Result]) -> Result:
    """Do work and note its seconds on the wall and of the processor.

    On a machine that others use, only the latter compare.
    """
    wall, processor = time.perf_counter(), time.process_time()
    found = work()
    laps[name] = time.perf_counter() - wall, time.process_time() - processor
    return found


def peak_megabytes() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def statistics(num_images: int) -> tuple[dict[str, tuple[float, float]], float, float]:
    """Sums and final reduction of one cell: seconds of each, and megabytes before and after."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def work(start: int, stop: int) -> ChunkResult:
        rng = np.random.default_rng(start)
        return ChunkResult({POOL: rng.standard_normal((stop - start, DIM), np.float32)})

    job, names = Job("synthetic", {"benchmark": num_images}, num_images, 250, work), (POOL,)
    laps: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(Path(folder), device, quiet=True)
        engine.make_chunks([job], Part(), "", may_compute=True)
        base = peak_megabytes()
        sums = f"sums of {num_images} x {DIM}, dealt over ranks"
        timed(laps, sums, lambda: engine.make_sums([(job, names)]))
        merge = "final: put sums together"
        moments = timed(laps, merge, lambda: engine.statistics(job, names))[POOL]
    covariance = moments.covariance * 1.1 + 1e-3 * np.eye(DIM)
    reference = FeatureStatistics(moments.mean + 0.01, covariance, None)
    distance = "final: distance, both routes"
    timed(laps, distance, lambda: frechet_distance(moments, reference))
    wall, processor = (a + b for a, b in zip(laps[merge], laps[distance], strict=True))
    return laps | {"final reduction": (wall, processor)}, base, peak_megabytes()


def statistics_in_a_process(num_images: int, threads: int) -> None:
    """The same in a fresh process, whose memory is its own."""
    os.environ |= {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        laps, base, peak = fresh.submit(statistics, num_images).result()
    heads = {f"statistics, {threads} thread(s)": "", "wall, s": ".2f", "processor, s": ".2f"}
    print_table(heads, [(name, *seconds) for name, seconds in laps.items()])
    print(f"peak memory {peak:.0f} MB; imports and making chunks {base:.0f} MB")


def shares(bundle: str, weights: Path) -> None:
    """Share of every stage in a small sweep of a bundle, and what the ranks waited for."""
    from lgm_scale.evaluation.sweep.measure import measure
    from lgm_scale.evaluation.sweep.rules import load_sweep

    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/unused.npz", mu=np.zeros(DIM), sigma=np.eye(DIM))
        values = {
            "bundle": bundle, "reference": f"{folder}/unused.npz", "out": f"{folder}/out",
            "metrics": ["is"],
            "inception": str(weights), "num_images": 32, "chunk_size": 16, "batch_size": 16,
            "cells": [{"num_tokens": 64, "cfg_scale": 1.5}],
        }  # fmt: skip
        path = Path(folder) / "sweep.yaml"
        path.write_text(yaml.safe_dump(values))
        start = time.perf_counter()
        results = measure(load_sweep(str(path), []))
        wall = time.perf_counter() - start
    assert results is not None
    stages = dict(results["rows"][0]["run"]["seconds"])
    stages["loading, files, scores, waiting"] = wall - sum(stages.values())
    rows = [(name, value, value / wall) for name, value in stages.items()]
    print_table({"stage of 32 samples at K = 64": "", "wall, s": ".2f", "share": ".1%"}, rows)


def main() -> int:
    """Command line."""
    parser = command_line("evaluation", __doc__, repeats=5)
    parser.add_argument("--inception", help="weights; default: random ones")
    parser.add_argument("--bundle", help="generator bundle, for the shares of a sweep")
    parser.add_argument("--num-images", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    # First, while this process is small: a new one inherits the peak of what started it.
    statistics_in_a_process(args.num_images, args.threads)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(args.inception or random_inception(Path(folder) / "inception.pth"))
        features_against_bare_network(weights, device, args.repeats)
        if args.bundle:
            shares(args.bundle, weights)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
