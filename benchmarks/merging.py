"""What clustering costs a training step: one merge tree for any K, against a clustering per K.

    python -m benchmarks.merging [--repetitions 20] [--model-flops-per-second 200e12]

Both sides get the same similarities and end with labels. scikit-learn's AgglomerativeClustering
(average linkage, precomputed distances) is what the authors' release runs at every step. What
counts is the thread's own processor time, so other programs do not.

The share of a training step is computed, not measured: the step's operations (the tokenizer's
`flops`; forward and backward are three times the forward) at a rate given on the command line. On a
GPU the tree is made on the host while the encoder runs (`linkage.start_host_copy`), so as long as
it takes less time than the encoder's forward pass, its share is what hides behind it.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from sklearn.cluster import AgglomerativeClustering

from benchmarks.harness import alternating_medians, command_line, print_table
from lgm_scale.families.tokenizer.network import Tokenizer
from lgm_scale.merging.tree import MergeTree, cosine_similarity, in_block_pairs

NUM_BLOCKS = 4
LENGTHS = {256: (32, 48, 64, 96, 128, 196), 1024: (128, 192, 256, 384, 512, 784)}
BATCH_PER_GPU = 32  # of the ViT-B tokenizer, for the share of a step


def release_labels(similarity: torch.Tensor, num_tokens: int) -> np.ndarray:
    """One K, as the release does it: [N] labels."""
    distances = 1.0 - similarity.double().numpy()
    distances[~in_block_pairs(len(similarity), NUM_BLOCKS).numpy()] = 101.0
    clustering = AgglomerativeClustering(num_tokens, metric="precomputed", linkage="average")
    return clustering.fit(distances).labels_


def measure(size: int, repeats: int) -> dict[str, float]:
    """Median seconds per contestant at N base tokens."""
    embeddings = torch.randn(size, 768, generator=torch.Generator().manual_seed(0))
    similarity = cosine_similarity(embeddings)
    lengths = LENGTHS[size]
    middle = lengths[len(lengths) // 2]

    def cuts(*wanted: int) -> None:
        tree = MergeTree.from_similarity(similarity, NUM_BLOCKS)
        for k in wanted:
            tree.assignment(k)

    contestants = {
        "merge tree alone": cuts,
        "merge tree and one cut": lambda: cuts(middle),
        f"merge tree and {len(lengths)} cuts": lambda: cuts(*lengths),
        "scikit-learn, one K": lambda: release_labels(similarity, middle),
        f"scikit-learn, {len(lengths)} K": lambda: [release_labels(similarity, k) for k in lengths],
    }
    return alternating_medians(contestants, repeats, warmup=1, clock=time.thread_time)


def step_seconds(size: int, flops_per_second: float) -> float:
    """A training step of the ViT-B tokenizer per GPU, computed: 3 x forward operations / rate."""
    side = 16 * round(size**0.5)
    with torch.device("meta"):
        tokenizer = Tokenizer("b", side, 16, size, 32)
    return 3 * BATCH_PER_GPU * tokenizer.flops(256) / flops_per_second


def main() -> int:
    """Measure every size, print one table."""
    parser = command_line("merging", __doc__, repeats=20)
    parser.add_argument(
        "--model-flops-per-second",
        type=float,
        default=200e12,
        metavar="RATE",
        help="that a GPU reaches in training, for the computed share of a step (default 200e12)",
    )
    args = parser.parse_args()
    rate = args.model_flops_per_second
    torch.set_num_threads(1)
    print(
        f"Median of {args.repeats} alternating repetitions, processor time of one thread. Share: "
        f"of a ViT-B step of {BATCH_PER_GPU} images, computed at {rate:.3g} FLOP/s.\n"
    )
    rows = []
    for size in LENGTHS:
        seconds, step = measure(size, args.repeats), step_seconds(size, rate)
        one = seconds["scikit-learn, one K"]
        rows += [(size, name, 1e3 * t, t / one, t / step) for name, t in seconds.items()]
    heads = {"N": "", "clustering": "", "ms": ".2f", "against one K of scikit-learn": ".2f"}
    print_table({**heads, "share of a step": ".2%"}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
