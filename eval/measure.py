"""The measurement at every K: samples and reconstructions against the validation images.

Every rank takes part in the work; rank 0 decides what is done already, and writes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from tqdm import tqdm

from eval.cells import Cells, write_json
from eval.chunks import join_ranks, over_chunks, own_chunks
from eval.features import FeatureExtractor, PixelPCA, images_hash
from eval.generate import flops_per_image, noise_scale_of, refuse_broken, sample_images, sampler_of
from eval.image_metrics import psnr
from eval.moments import frechet_distance, moments_of
from eval.reconstructor import Reconstructor, load_images
from eval.sweep_config import SweepConfig
from eval.training_loss import loss_per_length
from lgm_scale import __version__
from lgm_scale.bundle import TOKENIZER_NAME, GeneratorBundle, load_generator
from lgm_scale.config import to_dict
from lgm_scale.data.latents import TREE_NAME

__all__ = ["Sweep", "measure"]

MAX_SAMPLES_SHOWN = 20
MAX_RECONSTRUCTIONS_SHOWN = 8

Measured = tuple[dict[str, Any], dict[str, np.ndarray]]
"""Numbers and pictures of a cell."""


def measure(config: SweepConfig) -> None:
    """Do what is missing at each K and write results.json."""
    place = join_ranks()
    losses = loss_per_length(config.metrics_log) if config.metrics_log else {}
    bundle = load_generator(config.bundle, place)
    images, labels = load_images(config.images, bundle.tokenizer.image_size)
    fitted: list[Any] = [None]
    if dist.get_global_rank() == 0:
        fitted = [PixelPCA.fit(images, config.num_components)]
    dist.broadcast_object_list(fitted)  # so that all ranks project alike, to the bit
    sweep = Sweep(config, bundle, fitted[0], images, labels)
    rows = sweep.run()
    if dist.get_global_rank() == 0:
        sweep.write_results(rows, losses)


class Sweep:
    """One generator at many K.

    Args:
        config: The sweep.
        bundle: The generator, on its device.
        features: The space in which images are compared.
        images: Validation images, uint8 [M, 3, S, S].
        labels: Their classes, [M].
    """

    def __init__(
        self,
        config: SweepConfig,
        bundle: GeneratorBundle,
        features: FeatureExtractor,
        images: np.ndarray,
        labels: np.ndarray,
    ) -> None:
        self.config, self.bundle, self.features = config, bundle, features
        self.images, self.labels = images, labels
        self.images_hash = images_hash(images)
        self.sampler = sampler_of(config)
        self.noise_scale = noise_scale_of(bundle, config.bundle)
        self.cells = Cells(Path(config.out) / "cells")
        self.writes = dist.get_global_rank() == 0
        self.reference = moments_of(features(images))
        self.reconstruct = Reconstructor(bundle.tokenizer, bundle.tree, images, config.batch_size)

    def protocols(self, num_tokens: int) -> dict[str, dict[str, Any]]:
        """Everything that the two cells of a K depend on, by kind of cell."""
        config, files = self.config, self.bundle.info["files"]
        common = {
            "lgm_scale": __version__,
            "num_tokens": num_tokens,
            "pixels": "(x + 1) / 2, clipped to [0, 1], rounded to 8 bits",
            "features": self.features.describe(),
            "reference": {
                "num_images": len(self.images),
                "image_size": int(self.images.shape[-1]),
                "class_counts": np.bincount(
                    self.labels, minlength=len(self.bundle.classes)
                ).tolist(),
                "pixels_sha256": self.images_hash,
            },
        }
        sampling = {
            "solver": "euler",
            "num_steps": config.num_steps,
            "cfg_scale": config.cfg_scale,
            "cfg_interval": list(config.cfg_interval),
            "cfg_rescale": config.cfg_rescale,
            "timestep_shift": config.timestep_shift,
            "noise_scale": self.noise_scale.value,
            "seed": config.seed,
            "num_images": config.num_images,
            "labels": "image index mod number of classes",
        }
        tokenizer = {name: files[name] for name in (TOKENIZER_NAME, TREE_NAME)}
        return {
            "reconstructions": common | {"bundle_files": tokenizer},
            "samples": common | sampling | {"bundle_files": files},
        }

    def run(self) -> list[dict[str, Any]]:
        """One row per K, measured now or kept; the same on every rank."""
        plan = [(k, *item) for k in self.config.lengths for item in self.protocols(k).items()]
        kept: list[Any] = [
            {(k, kind): self.cells.find(_name(kind, k), protocol) for k, kind, protocol in plan}
        ]
        dist.broadcast_object_list(kept)
        numbers: dict[tuple[int, str], dict[str, Any] | None] = kept[0]
        missing = [kind for (_, kind), known in numbers.items() if known is None]
        total = sum(self._own_images(kind) for kind in missing)
        kinds: dict[str, Callable[[int, tqdm], Measured]] = {
            "reconstructions": self._reconstructions,
            "samples": self._samples,
        }
        quiet = not self.writes or total == 0
        with tqdm(total=total, desc="sweep", unit="img", disable=quiet) as bar:
            for k, kind, protocol in plan:
                found = numbers[k, kind]
                state = "kept"
                if found is None:
                    bar.set_description(f"K = {k}, {kind}")
                    found, pictures = kinds[kind](k, bar)
                    state = "done"
                    if self.writes:
                        self.cells.save(_name(kind, k), protocol, found, pictures)
                numbers[k, kind] = found
                if self.writes:
                    bar.write(f"K = {k:4d}   {kind:15s} {state}   {_headline(found)}")
        return [
            {"num_tokens": k} | {kind: numbers[k, kind] for kind in kinds}
            for k in self.config.lengths
        ]

    def _own_images(self, kind: str) -> int:
        count = len(self.images) if kind == "reconstructions" else self.config.num_images
        return sum(stop - start for start, stop in own_chunks(count, self.config.batch_size))

    def _reconstructions(self, num_tokens: int, bar: tqdm) -> Measured:
        start = time.perf_counter()
        images = self.reconstruct(num_tokens, bar.update)
        numbers = {
            "psnr_db": float(psnr(self.images, images).mean()),
            "distance": self._distance(self.features(images)),
            "num_images": len(images),
            "seconds": time.perf_counter() - start,
        }
        shown = self._one_per_class()
        labels = self.labels[shown]
        return numbers, {"originals": self.images[shown], "images": images[shown], "labels": labels}

    def _samples(self, num_tokens: int, bar: tqdm) -> Measured:
        num_shown = min(MAX_SAMPLES_SHOWN, len(self.bundle.classes), self.config.num_images)
        pictures: list[np.ndarray] = []

        def chunk(start: int, stop: int) -> dict[str, np.ndarray]:
            indices = torch.arange(start, stop)
            images, finite = sample_images(
                self.bundle, indices, num_tokens, self.sampler, self.noise_scale, self.config.seed
            )
            if start < num_shown:
                pictures.append(images[: num_shown - start])
            return {"features": self.features(images), "finite": finite}

        start = time.perf_counter()
        result = over_chunks(self.config.num_images, self.config.batch_size, chunk, bar.update)
        refuse_broken(result["finite"], f"samples at K = {num_tokens}")
        numbers = {
            "distance": self._distance(result["features"]),
            "gflops_per_image": flops_per_image(self.bundle, num_tokens, self.sampler) / 1e9,
            "num_forwards": self.sampler.num_forwards(),
            "num_images": self.config.num_images,
            "seconds": time.perf_counter() - start,
            "ranks": dist.get_world_size(),
            "device": self.bundle.net.pos_embed.device.type,
        }
        # Chunks are dealt to the ranks in turn: take the ranks' lists in turn, too.
        turns = itertools.zip_longest(*dist.all_gather_object(pictures))
        first = [images for turn in turns for images in turn if images is not None]
        return numbers, {"images": np.concatenate(first)}

    def _distance(self, features: np.ndarray) -> float:
        return frechet_distance(moments_of(features), self.reference)

    def _one_per_class(self) -> list[int]:
        """The first validation image of a few classes, spread over all that there are."""
        present = sorted(set(self.labels.tolist()))
        count = min(MAX_RECONSTRUCTIONS_SHOWN, len(present))
        spread = [present[i * len(present) // count] for i in range(count)]
        return [int((self.labels == label).argmax()) for label in spread]

    def write_results(self, rows: list[dict[str, Any]], losses: dict[int, dict[str, Any]]) -> None:
        """Gather results.json, and put the merge tree with the cells."""
        out = Path(self.config.out)
        self.bundle.tree.save(out / "cells" / TREE_NAME)
        results = {
            "format": "lgm_scale.sweep",
            "versions": {"lgm_scale": __version__, "torch": torch.__version__},
            "distance": {"key": self.features.key, "label": self.features.label},
            "config": to_dict(self.config),
            "classes": list(self.bundle.classes),
            "num_base_tokens": self.bundle.tree.num_base_tokens,
            "parameters": {
                "generator": sum(p.numel() for p in self.bundle.net.parameters()),
                "tokenizer": sum(p.numel() for p in self.bundle.tokenizer.parameters()),
            },
            "training_steps": self.bundle.info["training"].get("steps"),
            "rows": [
                row
                | {
                    "training_loss": losses.get(row["num_tokens"]),
                    "protocol": self.protocols(row["num_tokens"]),
                }
                for row in rows
            ],
        }
        write_json(out / "results.json", results)


def _name(kind: str, num_tokens: int) -> str:
    return f"{kind}_k{num_tokens:04d}"


def _headline(numbers: dict[str, Any]) -> str:
    parts = [f"distance {numbers['distance']:8.2f}"]
    if "psnr_db" in numbers:
        parts.append(f"PSNR {numbers['psnr_db']:.2f} dB")
    else:
        parts.append(f"{numbers['gflops_per_image']:.3g} GFLOPs per image")
    return "   ".join([*parts, f"{numbers['seconds']:.1f} s"])
