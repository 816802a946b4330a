"""Samplers compared at what they cost: plain, coarse guidance, growing length.

    python -m benchmarks.samplers [--seeds 0 1 2] [--doc docs/samplers.md]

Takes the quickstart's tokenizer and latents, trains its generator once per seed where that is not
done (under runs/samplers), samples with every sampler, and measures the sweep's distance to the
validation images. Writes mean and standard deviation over the seeds into the document's table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lgm_scale.errors import DataError, exit_on_user_error
from lgm_scale.evaluation.engine.statistics import statistics_of
from lgm_scale.evaluation.features.pixel_pca import PixelPCA
from lgm_scale.evaluation.images import StoredImages
from lgm_scale.evaluation.metrics.scores import frechet_distance
from lgm_scale.evaluation.sweep.samples import sample_images
from lgm_scale.families.lgm.pipeline import LGMPipeline
from lgm_scale.sampling.config import SamplerConfig

IMAGES = "runs/quickstart/data/images/val"
GENERATOR = "yamls/quickstart/dit.yaml"
NUM_IMAGES, NUM_COMPONENTS, BATCH = 272, 48, 34
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

GUIDED = {"num_steps": 25, "cfg_scale": 1.5, "timestep_shift": 0.3}
EARLY, LATE = ((0.0, 8), (0.1, 64)), ((0.0, 8), (0.3, 64))
GRADUAL = ((0.0, 8), (0.1, 16), (0.25, 32), (0.5, 64))


@dataclass(frozen=True)
class Candidate:
    """A sampler under the name it has in the table."""

    name: str
    num_tokens: int
    config: SamplerConfig


def candidates() -> list[Candidate]:
    """What is compared, at 25 grid points."""
    unguided = {**GUIDED, "cfg_scale": 1.0}
    rows = [
        Candidate("K = 32, plain guidance", 32, SamplerConfig(**GUIDED)),
        Candidate("K = 64, no guidance", 64, SamplerConfig(**unguided)),
        Candidate("K = 64, plain guidance", 64, SamplerConfig(**GUIDED)),
    ]
    rows += [
        Candidate(
            f"K = 64, unconditional branch at {k}", 64, SamplerConfig(**GUIDED, uncond_num_tokens=k)
        )
        for k in (32, 16, 8)
    ]
    rows += [
        Candidate(name, 64, SamplerConfig(**GUIDED, length_schedule=schedule))
        for name, schedule in (
            ("K = 8 up to t = 0.1, then 64", EARLY),
            ("K = 8 up to t = 0.3, then 64", LATE),
            ("K = 8, 16, 32, 64 from t = 0, 0.1, 0.25, 0.5", GRADUAL),
        )
    ]
    both = SamplerConfig(**GUIDED, uncond_num_tokens=8, length_schedule=EARLY)
    return [*rows, Candidate("both: unconditional at 8, and 8 up to t = 0.1", 64, both)]


def trained_bundle(seed: int) -> Path:
    """Bundle of the quickstart's generator at this seed; trained now if it is not there."""
    out = Path(f"runs/samplers/dit-seed{seed}")
    command = ["composer", "lgm_scale/train.py", GENERATOR, f"seed={seed}", f"out={out}"]
    result = subprocess.run([*command, f"run_name=samplers-dit-seed{seed}"], check=False)
    if result.returncode != 0:
        raise DataError(
            f"the generator of seed {seed} was not trained; run `make quickstart` first"
        )
    return out / "bundle"


def measure(seed: int, rows: list[Candidate]) -> np.ndarray:
    """Distance and GFLOPs per image of every candidate: [candidates, 2]."""
    pipe = LGMPipeline.from_bundle(trained_bundle(seed), "cpu", torch.float32)
    pipe.protocol()  # refuses a bundle that does not say how it saw noise
    stored = StoredImages(IMAGES, pipe.image_size)
    images, _ = stored.read(range(len(stored)))
    space = PixelPCA.fit(images.numpy(), NUM_COMPONENTS)
    reference = statistics_of(space(images)["pixel_pca"])
    results = []
    for row in tqdm(rows, desc=f"seed {seed}", unit="sampler"):
        parts = [
            space(sample_images(pipe, indices, row.num_tokens, row.config, seed)[0])["pixel_pca"]
            for indices in torch.arange(NUM_IMAGES).split(BATCH)
        ]
        distance = frechet_distance(statistics_of(np.concatenate(parts)), reference)
        flops = pipe.image_flops(row.config, row.num_tokens)
        results.append((distance, flops / 1e9))
    return np.array(results)


def table(rows: list[Candidate], results: np.ndarray) -> str:
    """Markdown. Shapes: results [seeds, candidates, 2]."""
    lines = [
        f"{len(results)} generators (seeds of training and sampling differ), {NUM_IMAGES} images "
        "each; distance: mean ± standard deviation.",
        "",
        "| sampler | distance | GFLOPs per image |",
        "| --- | --- | --- |",
    ]
    means, deviations = results.mean(0), results.std(0, ddof=1)
    lines += [
        f"| {row.name} | {mean[0]:.1f} ± {deviation[0]:.1f} | {mean[1]:.2f} |"
        for row, mean, deviation in zip(rows, means, deviations, strict=True)
    ]
    return "\n".join(lines)


def main() -> int:
    """Train what is missing, sample, write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--doc", default="docs/samplers.md", help="document with the table")
    args = parser.parse_args(sys.argv[1:])
    if len(args.seeds) < 2:
        parser.error("--seeds: two or more, for a standard deviation")
    rows = candidates()
    text = table(rows, np.stack([measure(seed, rows) for seed in args.seeds]))
    print(text)
    path = Path(args.doc)
    if path.is_file():
        head, rest = path.read_text().split(BEGIN)
        path.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
