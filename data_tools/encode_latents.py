"""Encode images to latents: full length, both flips, float16, with statistics over all of them.

    composer data_tools/encode_latents.py --tokenizer BUNDLE --images MDS --out MDS

Every rank encodes a contiguous part of the images, in order, and rank 0 joins the parts. The
result is complete or absent. Beside the shards it holds the tokenizer's merge tree and mean and
standard deviation, in float64, over every latent and both flips: per channel, and per channel of
the contrast at every merge of the tree (what a sampler of growing length draws from).
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist, get_device
from streaming import MDSWriter
from streaming.base.util import merge_index
from torch import Tensor
from tqdm import tqdm

from lgm_scale.bundle import load_tokenizer, tokenizer_id
from lgm_scale.data.images import ImageDataset
from lgm_scale.data.latents import STATS_NAME, TREE_NAME, LatentStats
from lgm_scale.data.manifest import Manifest, read_manifest, write_manifest
from lgm_scale.errors import DataError, exit_on_user_error
from lgm_scale.merging import MergeTree
from lgm_scale.models.tokenizer import Tokenizer
from lgm_scale.nesting import contrast_basis
from lgm_scale.training.tokenizer import to_unit_range


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="composer data_tools/encode_latents.py",
        description="Encode an MDS folder of images with a tokenizer bundle.",
    )
    parser.add_argument("--tokenizer", required=True, metavar="BUNDLE", help="tokenizer bundle")
    parser.add_argument("--images", required=True, metavar="MDS", help="from images_to_mds.py")
    parser.add_argument("--out", required=True, metavar="MDS", help="folder to write")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step and rank")
    parser.add_argument(
        "--shard-size", type=int, default=64 << 20, metavar="BYTES", help="default 64 MiB"
    )
    return parser.parse_args(argv)


class Moments:
    """Count, sum and sum of squares per column, in float64. Shapes: add([M, C])."""

    def __init__(self, columns: int) -> None:
        self.count = torch.zeros(1, dtype=torch.float64)
        self.total = torch.zeros(columns, dtype=torch.float64)
        self.square = torch.zeros(columns, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take in M vectors."""
        values = values.double()
        self.count += len(values)
        self.total += values.sum(0).cpu()
        self.square += values.square().sum(0).cpu()

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean and (biased) standard deviation over all ranks: [C] float32 each."""
        state = torch.cat((self.count, self.total, self.square))
        state = torch.stack(list(dist.all_gather(state))).cpu().sum(0)
        count, (mean, square) = state[0], (state[1:] / state[0]).chunk(2)
        assert count > 0
        return mean.float(), (square - mean.square()).clamp_min(0).sqrt().float()


class LatentMoments:
    """Moments of the stored latents, and of their contrasts at every merge of the tree."""

    def __init__(self, tree: MergeTree, latent_dim: int, device: torch.device) -> None:
        self.basis = contrast_basis(tree).to(device)  # [N, R]
        self.channels = Moments(latent_dim)
        self.contrasts = Moments(self.basis.shape[1] * latent_dim)

    def add(self, z: Tensor) -> None:
        """Take in a batch. Shapes: z [B, N, D] float16, as stored."""
        self.channels.add(z.flatten(0, 1))
        self.contrasts.add((self.basis.T @ z.double()).flatten(1))

    def stats(self) -> LatentStats:
        """Over all ranks."""
        stats = LatentStats(*self.channels.mean_and_std())
        mean, std = (value.view(-1, len(stats.mean)) for value in self.contrasts.mean_and_std())
        return stats.with_contrasts(mean, std)


def batches(dataset: ImageDataset, start: int, stop: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Samples start..stop in order, stacked."""
    for first in range(start, stop, size):
        items = [dataset[index] for index in range(first, min(first + size, stop))]
        yield {key: torch.stack([item[key] for item in items]) for key in items[0]}


@torch.inference_mode()
def encode(
    tokenizer: Tokenizer, dataset: ImageDataset, part: tuple[int, int], folder: Path, args: Any
) -> LatentMoments:
    """Write this rank's part as MDS shards and return its moments."""
    shape = f"ndarray:float16:{tokenizer.num_base_tokens},{tokenizer.latent_dim}"
    columns = {"latents": shape, "latents_flipped": shape, "label": "int"}
    device = next(tokenizer.parameters()).device
    moments = LatentMoments(tokenizer.merge_tree(), tokenizer.latent_dim, device)
    bar = tqdm(
        total=part[1] - part[0],
        desc="encode",
        unit="img",
        disable=dist.get_global_rank() != 0,
    )
    with MDSWriter(out=str(folder), columns=columns, size_limit=args.shard_size) as writer, bar:
        for batch in batches(dataset, *part, args.batch_size):
            images = to_unit_range(batch["images"].to(device))
            both = [tokenizer.encode(images), tokenizer.encode(images.flip(-1))]
            stored = [z.to(torch.float16) for z in both]
            for z in stored:  # of what is stored, so that training sees exactly these statistics
                if not torch.isfinite(z).all():
                    raise DataError(
                        f"latents of images near {batch['sample_ids'][0]} are not finite"
                    )
                moments.add(z)
            for plain, flipped, label in zip(
                *(z.cpu() for z in stored), batch["labels"], strict=True
            ):
                writer.write(
                    {
                        "latents": plain.numpy(),
                        "latents_flipped": flipped.numpy(),
                        "label": int(label),
                    }
                )
            bar.update(len(images))
    return moments


def check_out(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` already holds this very result. Raises: DataError if it holds another."""
    if not out.exists():
        return False
    there = read_manifest(out, "latents").extra
    differing = sorted(key for key, value in wanted.items() if there.get(key) != value)
    if differing:
        raise DataError(
            f"{out} holds other latents ({', '.join(differing)} differ); delete it, or choose "
            "another --out"
        )
    return True


def main() -> int:
    """Encode, join, describe."""
    args = parse_args(sys.argv[1:])
    if args.batch_size < 1:
        raise DataError(f"--batch-size: {args.batch_size} must be 1 or more")
    device = get_device(None)
    dist.initialize_dist(device, timeout=3600.0)  # a slow rank may be this far behind at the end
    torch_device = torch.device("cuda", dist.get_local_rank()) if device.name == "gpu" else "cpu"
    source = read_manifest(args.images, "images")
    tokenizer = load_tokenizer(args.tokenizer, torch_device)
    tree = tokenizer.merge_tree()  # a length control without one is refused before the work
    extra = {
        "tokenizer_id": tokenizer_id(args.tokenizer),
        "num_base_tokens": tokenizer.num_base_tokens,
        "latent_dim": tokenizer.latent_dim,
        "images": {"num_samples": source.num_samples, **_fingerprint(source)},
        "crop": f"ADM centre crop to {tokenizer.image_size}",
        "precision": "float32 encoder, float16 stored",
    }
    out = Path(args.out)
    if check_out(out, extra):
        if dist.get_global_rank() == 0:
            print(f"{out} is there already: {source.num_samples:,} latents of this tokenizer")
        return 0
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    aside = out.with_name(out.name + ".partial")
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    dataset = ImageDataset(
        args.images, image_size=tokenizer.image_size, train=False, seed=0, batch_size=1
    )
    bounds = np.linspace(0, source.num_samples, ranks + 1).astype(int).tolist()
    part = (bounds[rank], bounds[rank + 1])
    moments = encode(tokenizer, dataset, part, aside / f"{rank:05d}", args)
    stats = moments.stats()
    if rank == 0:
        _join_parts(aside)
        stats.save(aside / STATS_NAME)
        tree.save(aside / TREE_NAME)
        manifest = Manifest(
            kind="latents",
            num_samples=source.num_samples,
            classes=source.classes,
            class_counts=source.class_counts,
            image_size=tokenizer.image_size,
            extra=extra,
        )
        write_manifest(aside, manifest)
        read_manifest(aside, "latents")  # the shards hold what the manifest counts
        aside.rename(out)
        print(
            f"{out}: {source.num_samples:,} images as {tokenizer.num_base_tokens} x "
            f"{tokenizer.latent_dim} latents, both flips"
        )
    dist.barrier()
    return 0


def _join_parts(folder: Path) -> None:
    """Write one index over the ranks' shards, without the library's warnings about its own work."""
    logging.disable(logging.WARNING)
    try:
        merge_index(str(folder), keep_local=True)
    finally:
        logging.disable(logging.NOTSET)


def _fingerprint(source: Manifest) -> dict[str, Any]:
    """What tells one image set from another: whatever its own manifest remembers."""
    return {"made_from": json.loads(json.dumps(source.extra))}


if __name__ == "__main__":
    exit_on_user_error(main)
