"""Encode images to latents, both flips, float16: a tokenizer's sequence or an autoencoder's grid.

    composer data_tools/encode_latents.py --tokenizer BUNDLE --images MDS --out MDS
    composer data_tools/encode_latents.py --encoder sd-vae --vae FOLDER --images MDS --out MDS

The images are cut into runs of the size of a shard; every rank encodes some of them, and rank 0
joins the records. Which images a shard holds, and its bytes, depend on neither ranks nor
interruptions; the manifest says so for each shard, and that every image is in exactly one.

A tokenizer's latents have their full length. Beside the shards the result holds its merge tree and
mean and standard deviation, in float64, over every latent and both flips: per channel, and per
channel of the contrast at every merge of the tree (what a sampler of growing length draws from).
Of the autoencoder of Stable Diffusion mean and standard deviation of every latent are stored, for
training to draw from, and nothing beside them: their scale is a constant.
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

from data_tools.latent_encoders import (
    AutoencoderEncoder,
    LatentEncoder,
    Notes,
    TokenizerEncoder,
)
from data_tools.parts import DEFAULT_SHARD_SIZE, PartRecord, PartsFolder, check_shard_options
from lgm_scale.data.config import SourceConfig, broken_source
from lgm_scale.data.images import ImageDataset
from lgm_scale.data.manifest import Manifest
from lgm_scale.errors import ConfigError, DataError, exit_on_user_error
from lgm_scale.pixels import to_unit_range
from lgm_scale.storage.transfer import shown

DEFAULT_IMAGE_SIZE = 256


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="composer data_tools/encode_latents.py",
        description="Encode an MDS folder of images with a tokenizer bundle (for LGM) or the "
        "autoencoder of Stable Diffusion (for ELIT and SiT). The same command again, with any "
        "number of ranks, goes on after the shards that are finished.",
    )
    add = parser.add_argument
    add("--encoder", choices=("lgm", "sd-vae"), default="lgm", help="with what (default: lgm)")
    add("--tokenizer", metavar="BUNDLE", help="tokenizer bundle, for --encoder lgm")
    add("--vae", metavar="FOLDER", help="autoencoder in the layout of diffusers, for --encoder "
        "sd-vae: a local copy of stabilityai/sd-vae-ft-mse or -ema")  # fmt: skip
    add("--image-size", type=int, metavar="PIXELS", help="side of the centre crop, for --encoder "
        f"sd-vae (default: {DEFAULT_IMAGE_SIZE}); a tokenizer has its own")  # fmt: skip
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
    problems = list(_broken_encoder(args))
    if args.batch_size < 1:
        problems.append(f"--batch-size: {args.batch_size} must be 1 or more")
    if args.workers < 0:
        problems.append(f"--workers: {args.workers} must be 0 or more")
    if problems:
        raise ConfigError(problems)
    check_shard_options(args.shard_size, args.compression)
    return args


def _broken_encoder(args: argparse.Namespace) -> Iterator[str]:
    """Options that the encoder lacks or has no use for."""
    tokenizer = args.encoder == "lgm"
    if tokenizer and args.tokenizer is None:
        yield "--tokenizer: missing; --encoder lgm (the default) encodes with a tokenizer bundle"
    if not tokenizer and args.vae is None:
        yield "--vae: missing; --encoder sd-vae needs the folder of its autoencoder"
    if tokenizer and args.vae is not None:
        yield "--vae: has no effect with --encoder lgm; drop it, or set --encoder sd-vae"
    if tokenizer and args.image_size is not None:
        yield "--image-size: has no effect with --encoder lgm; the tokenizer has its own, drop it"
    if not tokenizer and args.tokenizer is not None:
        yield "--tokenizer: has no effect with --encoder sd-vae; drop it, or set --encoder lgm"


def make_encoder(args: argparse.Namespace, device: torch.device | str) -> LatentEncoder:
    """What the options name."""
    if args.encoder == "lgm":
        return TokenizerEncoder(args.tokenizer, device)
    size = DEFAULT_IMAGE_SIZE if args.image_size is None else args.image_size
    return AutoencoderEncoder(args.vae, size, device)


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
    """Encodes parts of an image set."""

    def __init__(
        self, encoder: LatentEncoder, images: ImageDataset, args: argparse.Namespace
    ) -> None:
        self.encoder, self.images, self.args = encoder, images, args

    def write(self, work: PartsFolder, parts: Sequence[Part], total: int, before: int) -> None:
        """Make parts. `total` and `before` are of all ranks, for the progress bar."""
        loader = DataLoader(
            Samples(self.images),
            batch_sampler=batch_indices(parts, self.args.batch_size),
            num_workers=self.args.workers,
            pin_memory=self.encoder.device.type == "cuda",
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
        notes, labels = self.encoder.notes(), []

        def samples() -> Iterator[dict[str, Any]]:
            for batch in batches:
                stored = self.encode(batch, notes)
                for index, label in enumerate(batch["labels"].tolist()):
                    labels.append(label)
                    sample = {name: values[index] for name, values in stored.items()}
                    yield {**sample, "label": label}
                progress(len(batch["labels"]))

        def record() -> PartRecord:
            return PartRecord(labels, notes.facts())

        work.write(number, self.encoder.columns, samples(), record, self.args.compression)

    @torch.inference_mode()
    def encode(self, batch: dict[str, Tensor], notes: Notes) -> dict[str, Any]:
        """The columns of a batch as they are stored: float16 arrays [B, ...].

        Raises: DataError if one is not finite.
        """
        images = to_unit_range(batch["images"].to(self.encoder.device))
        columns = self.encoder.encode(images)
        stored = {name: values.to(torch.float16) for name, values in columns.items()}
        for values in stored.values():
            if not torch.isfinite(values).all():
                raise DataError(
                    f"latents of images {int(batch['sample_ids'][0])} to "
                    f"{int(batch['sample_ids'][-1])} are not finite in float16"
                )
        notes.add(stored)  # what is stored, so that training sees exactly these statistics
        return {name: values.cpu().numpy() for name, values in stored.items()}


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
    encoder = make_encoder(args, torch_device)
    size = encoder.image_size
    images = ImageDataset((source,), image_size=size, train=False, seed=0, batch_size=1)
    described = {
        **encoder.described,
        "images": describe_source(images.manifest),
        "crop": f"ADM centre crop to {size}",
        "precision": "float32 encoder, float16 stored",
    }
    options = {key: getattr(args, key) for key in ("batch_size", "shard_size", "compression")}
    made_from = {"command": "encode_latents", **described, **options}
    parts = plan_parts(images.num_samples, encoder.sample_bytes, args.shard_size)
    work = PartsFolder(args.out, args.staging, encoder.kind, made_from, len(parts))
    total = f"{images.num_samples:,} images as {encoder.form}"
    if work.already_finished() is not None:
        if rank == 0:
            print(f"{shown(args.out)} is there already: {total} latents of {encoder.maker}")
        return 0
    work.open()
    finished = set().union(*dist.all_gather_object(work.finished()))
    waiting = [part for part in parts if part[0] not in finished]
    before = sum(stop - start for number, start, stop in parts if number in finished)
    Encoder(encoder, images, args).write(work, waiting[rank::ranks], images.num_samples, before)
    share_records(work)
    if rank == 0:
        records = work.records()
        check_coverage(parts, records, images.manifest)
        notes = encoder.notes()
        for record in records:
            notes.merge(record.facts)
        manifest = Manifest(
            kind=encoder.kind,
            num_samples=images.num_samples,
            classes=images.manifest.classes,
            class_counts=images.manifest.class_counts,
            image_size=size,
            extra={
                **described,
                "made_from": made_from,
                # Which images, by their place in the image set, each shard holds.
                "coverage": [[start, stop] for _, start, stop in parts],
            },
        )
        work.join(manifest, records, notes.files())
        print(f"{shown(args.out)}: {total} latents, both flips")
    dist.barrier()
    return 0


def _check_cache(source: SourceConfig) -> None:
    problems = [text.replace("data.cache", "--cache") for text in broken_source(source)]
    if problems:
        raise ConfigError(problems)


if __name__ == "__main__":
    exit_on_user_error(main)
