"""What clustering costs a training step: one merge tree for any K, against a clustering per K.

    python -m benchmarks.merging [--repetitions 20] [--model-flops-per-second 200e12]

Both sides get the same similarities and end with labels. scikit-learn's AgglomerativeClustering
(average linkage, precomputed distances) is what the authors' release runs at every step. The
repetitions alternate between the contestants, so a slower moment of the machine hits both, and
what counts is the thread's own processor time, so other programs do not.

The share of a training step is computed, not measured: the step's operations (`lgm_scale.flops`,
forward and backward three times the forward) at a rate given on the command line. On a GPU the
tree is made on the host while the encoder runs (`linkage.start_host_copy`), so as long as it takes
less time than the encoder's forward pass, its share is what hides behind it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.cluster import AgglomerativeClustering

from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.merging.tree import MergeTree, cosine_similarity, in_block_pairs

SIZES = (256, 1024)
NUM_BLOCKS = 4
LENGTHS = {256: (32, 48, 64, 96, 128, 196), 1024: (128, 192, 256, 384, 512, 784)}
BATCH_PER_GPU = 32  # of the ViT-B tokenizer, for the share of a step


def alternate(contestants: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median processor seconds of each, measured in turns after one unmeasured turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repetitions + 1):
        for name, run in contestants.items():
            start = time.thread_time()
            run()
            if turn > 0:
                seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def release_labels(similarity: torch.Tensor, num_tokens: int) -> np.ndarray:
    """One K, as the release does it: [N] labels."""
    distances = 1.0 - similarity.double().numpy()
    distances[~in_block_pairs(len(similarity), NUM_BLOCKS).numpy()] = 101.0
    clustering = AgglomerativeClustering(num_tokens, metric="precomputed", linkage="average")
    return clustering.fit(distances).labels_


def measure(size: int, repetitions: int) -> dict[str, float]:
    """Median seconds per contestant at N base tokens."""
    embeddings = torch.randn(size, 768, generator=torch.Generator().manual_seed(0))
    similarity = cosine_similarity(embeddings)
    lengths = LENGTHS[size]
    middle = lengths[len(lengths) // 2]

    def all_cuts() -> None:
        tree = MergeTree.from_similarity(similarity, NUM_BLOCKS)
        for k in lengths:
            tree.assignment(k)

    return alternate(
        {
            "merge tree alone": lambda: MergeTree.from_similarity(similarity, NUM_BLOCKS),
            "merge tree and one cut": lambda: MergeTree.from_similarity(
                similarity, NUM_BLOCKS
            ).assignment(middle),
            f"merge tree and {len(lengths)} cuts": all_cuts,
            "scikit-learn, one K": lambda: release_labels(similarity, middle),
            f"scikit-learn, {len(lengths)} K": lambda: [
                release_labels(similarity, k) for k in lengths
            ],
        },
        repetitions,
    )


def step_seconds(size: int, flops_per_second: float) -> float:
    """A training step of the ViT-B tokenizer per GPU, computed: 3 x forward operations / rate."""
    side = 16 * round(size**0.5)
    with torch.device("meta"):
        tokenizer = Tokenizer("b", side, 16, size, 32)
    return 3 * BATCH_PER_GPU * tokenizer.flops(256) / flops_per_second


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merging", description="Cost of clustering in a training step."
    )
    parser.add_argument("--repetitions", type=int, default=20, help="turns per contestant")
    parser.add_argument(
        "--model-flops-per-second",
        type=float,
        default=200e12,
        metavar="RATE",
        help="that a GPU reaches in training, for the computed share of a step (default 200e12)",
    )
    return parser.parse_args(argv)


def main() -> int:
    """Measure every size, print one table."""
    args = parse_args(sys.argv[1:])
    torch.set_num_threads(1)
    print(
        f"Median of {args.repetitions} alternating repetitions, processor time of one thread. "
        f"Share: of a ViT-B step of {BATCH_PER_GPU} images, computed at "
        f"{args.model_flops_per_second:.3g} FLOP/s.\n"
    )
    print("| N | clustering | ms | against one K of scikit-learn | share of a step |")
    print("| --- | --- | --- | --- | --- |")
    for size in SIZES:
        seconds = measure(size, args.repetitions)
        step = step_seconds(size, args.model_flops_per_second)
        for name, value in seconds.items():
            ratio = value / seconds["scikit-learn, one K"]
            print(f"| {size} | {name} | {1e3 * value:.2f} | {ratio:.2f} x | {value / step:.2%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
