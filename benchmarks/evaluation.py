"""Where an evaluation spends its time and memory.

    python -m benchmarks.evaluation [--inception FILE] [--bundle BUNDLE] [--num-images 50000]
        [--threads 1]

Three tables: features through the evaluator against the bare network (alternating, same process);
the statistics of a cell, from synthetic features of Inception's size, in a process of its own,
with its peak memory; and, for a bundle, the share of every stage of a sweep of a few images.
Without --inception random weights are used: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import yaml

from benchmarks.timing import alternating_medians, print_table
from lgm_scale.errors import exit_on_user_error
from lgm_scale.evaluation.engine.chunks import ChunkResult, Job
from lgm_scale.evaluation.engine.parts import Part
from lgm_scale.evaluation.engine.stages import Engine
from lgm_scale.evaluation.engine.statistics import FeatureStatistics
from lgm_scale.evaluation.features.inception import InceptionFeatures
from lgm_scale.evaluation.metrics.scores import frechet_distance

DIM = 2048


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


def features_against_bare_network(weights: Path, device: torch.device) -> None:
    """Images per second of the evaluator's features and of the network alone."""
    space = InceptionFeatures(weights, device)
    count = 8 if device.type == "cpu" else 200
    images = torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8, device=device)
    sizes = 4 if device.type == "cpu" else count

    @torch.inference_mode()
    def bare() -> None:
        for batch in images.split(sizes):
            space.net(batch)

    seconds = alternating_medians({"evaluator": lambda: space(images), "bare": bare}, device, 5, 1)
    rows = [
        [name, f"{count / value:.2f}", f"{seconds['bare'] / value:.2f}"]
        for name, value in seconds.items()
    ]
    print_table(["features", "images/s", "of the bare network"], rows)


def peak_megabytes() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def statistics(num_images: int, folder: Path) -> None:
    """Sums and the final reduction of one cell; prints one JSON line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def work(start: int, stop: int) -> ChunkResult:
        rng = np.random.default_rng(start)
        return ChunkResult({"inception_pool": rng.standard_normal((stop - start, DIM), np.float32)})

    job = Job("synthetic", {"benchmark": num_images}, num_images, 250, work)
    engine = Engine(folder, device, quiet=True)
    engine.make_chunks([job], Part(), "", may_compute=True)
    base, clock = peak_megabytes(), Clock()
    engine.make_sums([(job, ("inception_pool",))])
    laps = {"sums": clock.lap()}
    statistics = engine.statistics(job, ("inception_pool",))["inception_pool"]
    laps["merge"] = clock.lap()
    reference = FeatureStatistics(
        statistics.mean + 0.01, statistics.covariance * 1.1 + 1e-3 * np.eye(DIM), None
    )
    clock.lap()
    frechet_distance(statistics, reference)
    laps["distance"] = clock.lap()
    print(json.dumps({"laps": laps, "base": base, "peak": peak_megabytes()}))


class Clock:
    """Seconds of the wall and of the processor; on a shared machine only the latter compare."""

    def __init__(self) -> None:
        self.since = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        """Both since the last lap."""
        now = time.perf_counter(), time.process_time()
        found = now[0] - self.since[0], now[1] - self.since[1]
        self.since = now
        return found


def statistics_in_a_process(num_images: int, threads: int) -> None:
    """The same in a fresh process, whose memory is its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.evaluation", "--child", folder]
        command += ["--num-images", str(num_images)]
        limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | limits
        )
    found = json.loads(done.stdout.splitlines()[-1])
    laps = found["laps"]
    final = [sum(pair) for pair in zip(laps["merge"], laps["distance"], strict=True)]
    rows = [
        [name, f"{wall:.2f} s", f"{cpu:.2f} s"]
        for name, (wall, cpu) in {
            f"sums of {num_images} x {DIM}, dealt over ranks": laps["sums"],
            "final: put sums together": laps["merge"],
            "final: distance, both routes": laps["distance"],
            "final reduction": final,
        }.items()
    ]
    print_table([f"statistics, {threads} thread(s)", "wall", "processor"], rows)
    print(f"peak memory {found['peak']:.0f} MB; imports and making chunks {found['base']:.0f} MB")


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
    rows = [[name, f"{value:.2f} s", f"{value / wall:.1%}"] for name, value in stages.items()]
    print_table(["stage of 32 samples at K = 64", "wall", "share"], rows)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("--inception", help="weights; default: random ones")
    parser.add_argument("--bundle", help="generator bundle, for the shares of a sweep")
    parser.add_argument("--num-images", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args(sys.argv[1:])
    if args.child:
        statistics(args.num_images, Path(args.child))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(args.inception) if args.inception else random_inception(
            Path(folder) / "inception.pth"
        )  # fmt: skip
        features_against_bare_network(weights, device)
        statistics_in_a_process(args.num_images, args.threads)
        if args.bundle:
            shares(args.bundle, weights)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
