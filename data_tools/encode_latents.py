"""Encode images to latents: full length, both flips, float16, with statistics over all of them.

    composer data_tools/encode_latents.py --tokenizer BUNDLE --images MDS --out MDS

The images are cut into runs of the size of a shard; every rank encodes some of them, and rank 0
joins the records. Which images a shard holds, and its bytes, depend on neither ranks nor
interruptions; the manifest says so for each shard, and that every image is in exactly one. Beside
the shards the result holds the tokenizer's merge tree and mean and standard deviation, in float64,
over every latent and both flips: per channel, and per channel of the contrast at every merge of
the tree (what a sampler of growing length draws from).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from composer.utils import dist, get_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data_tools.parts import DEFAULT_SHARD_SIZE, PartRecord, PartsFolder, check_shard_options
from lgm_scale.bundle import load_tokenizer, tokenizer_id
from lgm_scale.data.config import SourceConfig, broken_source
from lgm_scale.data.images import ImageDataset
from lgm_scale.data.latents import STATS_NAME, TREE_NAME, LatentStats
from lgm_scale.data.manifest import Manifest
from lgm_scale.data.storage import shown
from lgm_scale.errors import ConfigError, DataError, exit_on_user_error
from lgm_scale.merging import MergeTree
from lgm_scale.models.tokenizer import Tokenizer
from lgm_scale.nesting import contrast_basis
from lgm_scale.training.tokenizer import to_unit_range


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="composer data_tools/encode_latents.py",
        description="Encode an MDS folder of images with a tokenizer bundle. The same command "
        "again, with any number of ranks, goes on after the shards that are finished.",
    )
    add = parser.add_argument
    add("--tokenizer", required=True, metavar="BUNDLE", help="tokenizer bundle")
    add("--images", required=True, metavar="MDS", help="from images_to_mds.py, local or s3://...")
    add("--cache", metavar="DIR", help="local folder for the shards of remote --images")
    add("--out", required=True, metavar="MDS", help="folder to write, local (on a file system "
        "that all ranks share) or s3://...")  # fmt: skip
    add("--staging", metavar="DIR", help="local folder for unfinished work, for remote --out")
    add("--batch-size", type=int, default=64, help="images per step and rank (default: 64)")
    shard_help = f"of a shard, about (default: {DEFAULT_SHARD_SIZE})"
    add("--shard-size", type=int, default=DEFAULT_SHARD_SIZE, metavar="BYTES", help=shard_help)
    add("--compression", metavar="ALGORITHM", help="of shards, such as zstd:3 (default: none)")
    workers = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    workers_help = f"processes per rank that decode images (default: {workers})"
    add("--workers", type=int, default=workers, help=workers_help)
    args = parser.parse_args(argv)
    problems = []
    if args.batch_size < 1:
        problems.append(f"--batch-size: {args.batch_size} must be 1 or more")
    if args.workers < 0:
        problems.append(f"--workers: {args.workers} must be 0 or more")
    if problems:
        raise ConfigError(problems)
    check_shard_options(args.shard_size, args.compression)
    return args


class Moments:
    """Count, sum and sum of squares per column, in float64. Shapes: add([M, C])."""

    def __init__(self, columns: int) -> None:
        self.state = torch.zeros(3, columns, dtype=torch.float64)  # count, sum, squares

    def add(self, values: Tensor) -> None:
        """Take in M vectors."""
        values = values.double()
        self.state[0] += len(values)
        self.state[1] += values.sum(0).cpu()
        self.state[2] += values.square().sum(0).cpu()

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean and (biased) standard deviation: [C] float32 each."""
        count, total, square = self.state
        mean = total / count
        return mean.float(), (square / count - mean.square()).clamp_min(0).sqrt().float()


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
        """Of everything that was taken in."""
        stats = LatentStats(*self.channels.mean_and_std())
        mean, std = (value.view(-1, len(stats.mean)) for value in self.contrasts.mean_and_std())
        return stats.with_contrasts(mean, std)

    def to_json(self) -> list[list[list[float]]]:
        """As numbers that JSON keeps exactly."""
        return [self.channels.state.tolist(), self.contrasts.state.tolist()]

    def merge(self, values: list[list[list[float]]]) -> None:
        """Take in what another one has seen."""
        for moments, state in zip((self.channels, self.contrasts), values, strict=True):
            moments.state += torch.tensor(state, dtype=torch.float64)


class Samples(Dataset):
    """Images by their number, for workers to decode."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.images[index]


Part = tuple[int, int, int]  # number, first sample, end


def plan_parts(num_samples: int, sample_bytes: int, shard_size: int) -> list[Part]:
    """Cut the samples into runs of the size of a shard, whatever the ranks."""
    step = max(1, shard_size // sample_bytes)
    starts = range(0, num_samples, step)
    return [(i, start, min(start + step, num_samples)) for i, start in enumerate(starts)]


def batch_indices(parts: Sequence[Part], size: int) -> list[list[int]]:
    """Batches of each part on its own, so that a part does not depend on what came before."""
    return [
        list(range(first, min(first + size, stop)))
        for _, start, stop in parts
        for first in range(start, stop, size)
    ]


class Encoder:
    """Encodes parts of an image set with a tokenizer."""

    def __init__(
        self, tokenizer: Tokenizer, images: ImageDataset, args: argparse.Namespace
    ) -> None:
        self.tokenizer, self.images, self.args = tokenizer, images, args
        self.tree = tokenizer.merge_tree()  # a length control without one is refused now
        self.device = next(tokenizer.parameters()).device
        shape = (tokenizer.num_base_tokens, tokenizer.latent_dim)
        column = f"ndarray:float16:{shape[0]},{shape[1]}"
        self.columns = {"latents": column, "latents_flipped": column, "label": "int"}
        self.sample_bytes = 2 * 2 * shape[0] * shape[1] + 8

    def moments(self) -> LatentMoments:
        """None taken in yet."""
        return LatentMoments(self.tree, self.tokenizer.latent_dim, self.device)

    def write(self, work: PartsFolder, parts: Sequence[Part], total: int, before: int) -> None:
        """Make parts. `total` and `before` are of all ranks, for the progress bar."""
        loader = DataLoader(
            Samples(self.images),
            batch_sampler=batch_indices(parts, self.args.batch_size),
            num_workers=self.args.workers,
            pin_memory=self.device.type == "cuda",
        )
        ranks = dist.get_world_size()
        bar = tqdm(
            total=total,
            initial=before,
            desc="encode",
            unit="image",
            disable=dist.get_global_rank() != 0,
        )
        batches = iter(loader)
        with bar:
            for number, start, stop in parts:
                mine = islice(batches, -(-(stop - start) // self.args.batch_size))
                self._write_part(work, number, mine, lambda n: bar.update(n * ranks))

    def _write_part(
        self, work: PartsFolder, number: int, batches: Iterator[dict[str, Tensor]], progress: Any
    ) -> None:
        moments, labels = self.moments(), []

        def samples() -> Iterator[dict[str, Any]]:
            for batch in batches:
                both = self.encode(batch, moments)
                for plain, flipped, label in zip(*both, batch["labels"].tolist(), strict=True):
                    labels.append(label)
                    yield {"latents": plain, "latents_flipped": flipped, "label": label}
                progress(len(batch["labels"]))

        def record() -> PartRecord:
            return PartRecord(labels, {"moments": moments.to_json()})

        work.write(number, self.columns, samples(), record, self.args.compression)

    @torch.inference_mode()
    def encode(self, batch: dict[str, Tensor], moments: LatentMoments) -> list[Any]:
        """Latents of both flips as they are stored: two arrays [B, N, D] float16.

        Raises: DataError if one is not finite.
        """
        images = to_unit_range(batch["images"].to(self.device))
        both = [self.tokenizer.encode(images), self.tokenizer.encode(images.flip(-1))]
        stored = [z.to(torch.float16) for z in both]
        for z in stored:  # of what is stored, so that training sees exactly these statistics
            if not torch.isfinite(z).all():
                raise DataError(
                    f"latents of images {int(batch['sample_ids'][0])} to "
                    f"{int(batch['sample_ids'][-1])} are not finite in float16"
                )
            moments.add(z)
        return [z.cpu().numpy() for z in stored]


def share_records(work: PartsFolder) -> None:
    """Let rank 0 have the records of all nodes; with a shared file system it has them already."""
    own = {name: text for name, text in work.record_texts().items()}
    everywhere: list[dict[str, str]] = list(dist.all_gather_object(own if work.remote else {}))
    if dist.get_global_rank() == 0:
        for texts in everywhere:
            work.add_record_texts(texts)


def check_coverage(parts: Sequence[Part], records: Sequence[PartRecord], source: Manifest) -> None:
    """Raise DataError unless every image was encoded exactly once."""
    counts = [0] * source.num_classes
    end = 0
    for (number, start, stop), record in zip(parts, records, strict=True):
        if start != end or len(record.labels) != stop - start:
            raise DataError(
                f"part {number} holds {len(record.labels)} latents of images {start} to {stop}: "
                "the unfinished result is damaged. Delete it and run again"
            )
        end = stop
        for label in record.labels:
            counts[label] += 1
    if end != source.num_samples or tuple(counts) != source.class_counts:
        raise DataError(
            f"{end:,} latents with other labels than the {source.num_samples:,} images: the "
            "images changed under way. Delete the unfinished result and run again"
        )


def describe_source(manifest: Manifest) -> dict[str, Any]:
    """What tells one image set from another."""
    digest = hashlib.sha256(json.dumps(asdict(manifest), sort_keys=True).encode())
    return {"num_samples": manifest.num_samples, "manifest_sha256": digest.hexdigest()}


def main() -> int:
    """Encode, join, describe."""
    args = parse_args(sys.argv[1:])
    device = get_device(None)
    dist.initialize_dist(device, timeout=3600.0)  # a slow rank may be this far behind at the end
    torch.backends.cudnn.allow_tf32 = False
    torch_device = torch.device("cuda", dist.get_local_rank()) if device.name == "gpu" else "cpu"
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    source = SourceConfig(path=args.images, cache=args.cache)
    _check_cache(source)
    tokenizer = load_tokenizer(args.tokenizer, torch_device)
    images = ImageDataset(
        (source,), image_size=tokenizer.image_size, train=False, seed=0, batch_size=1
    )
    encoder = Encoder(tokenizer, images, args)
    described = {
        "tokenizer_id": tokenizer_id(args.tokenizer),
        "num_base_tokens": tokenizer.num_base_tokens,
        "latent_dim": tokenizer.latent_dim,
        "images": describe_source(images.manifest),
        "crop": f"ADM centre crop to {tokenizer.image_size}",
        "precision": "float32 encoder, float16 stored",
    }
    options = {key: getattr(args, key) for key in ("batch_size", "shard_size", "compression")}
    made_from = {"command": "encode_latents", **described, **options}
    parts = plan_parts(images.num_samples, encoder.sample_bytes, args.shard_size)
    work = PartsFolder(args.out, args.staging, "latents", made_from, len(parts))
    total = f"{images.num_samples:,} images as {tokenizer.num_base_tokens} x {tokenizer.latent_dim}"
    if work.already_finished() is not None:
        if rank == 0:
            print(f"{shown(args.out)} is there already: {total} latents of this tokenizer")
        return 0
    work.open()
    finished = set().union(*dist.all_gather_object(work.finished()))
    waiting = [part for part in parts if part[0] not in finished]
    before = sum(stop - start for number, start, stop in parts if number in finished)
    encoder.write(work, waiting[rank::ranks], images.num_samples, before)
    share_records(work)
    if rank == 0:
        records = work.records()
        check_coverage(parts, records, images.manifest)
        moments = encoder.moments()
        for record in records:
            moments.merge(record.facts["moments"])
        manifest = Manifest(
            kind="latents",
            num_samples=images.num_samples,
            classes=images.manifest.classes,
            class_counts=images.manifest.class_counts,
            image_size=tokenizer.image_size,
            extra={
                **described,
                "made_from": made_from,
                # Which images, by their place in the image set, each shard holds.
                "coverage": [[start, stop] for _, start, stop in parts],
            },
        )
        work.join(
            manifest, records, {STATS_NAME: moments.stats().save, TREE_NAME: encoder.tree.save}
        )
        print(f"{shown(args.out)}: {total} latents, both flips")
    dist.barrier()
    return 0


def _check_cache(source: SourceConfig) -> None:
    problems = [text.replace("data.cache", "--cache") for text in broken_source(source)]
    if problems:
        raise ConfigError(problems)


if __name__ == "__main__":
    exit_on_user_error(main)
