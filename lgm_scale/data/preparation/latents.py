"""Latents of a whole data set: encoded by many ranks, joined by rank 0, the same bytes always.

The work behind the command `encode`, whose options it reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from math import prod
from typing import Any

import torch
from composer.utils import dist, get_device
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.images import ImageDataset
from lgm_scale.data.manifest import Manifest
from lgm_scale.data.preparation.encoders import LatentEncoder, Notes
from lgm_scale.data.preparation.parts import PartRecord, PartsFolder
from lgm_scale.errors import DataError
from lgm_scale.pixels import to_unit_range
from lgm_scale.storage.files import digest
from lgm_scale.storage.transfer import shown
from lgm_scale.training.stopping import ignore_stop_signals

_LABEL_BYTES = 8
_FLOAT16_BYTES = 2

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


class LatentWriter:
    """Encodes the parts of an image set that fall to this rank."""

    def __init__(
        self, encoder: LatentEncoder, images: ImageDataset, args: argparse.Namespace
    ) -> None:
        self.encoder, self.images, self.args = encoder, images, args
        arrays = {
            name: f"ndarray:float16:{','.join(map(str, shape))}"
            for name, shape in encoder.columns.items()
        }
        self.columns = {**arrays, "label": "int"}

    def write(self, work: PartsFolder, parts: Sequence[Part], total: int, before: int) -> None:
        """Make parts.

        `total` and `before` count images of all ranks, for the progress bar.
        """
        loader = DataLoader(
            Subset(self.images, range(self.images.num_samples)),  # by number, not as a stream
            batch_sampler=batch_indices(parts, self.args.batch_size),
            num_workers=self.args.workers,
            pin_memory=self.encoder.device.type == "cuda",
            worker_init_fn=ignore_stop_signals,  # they end with this process
        )
        quiet, ranks = dist.get_global_rank() != 0, dist.get_world_size()
        batches = iter(loader)
        with tqdm(total=total, initial=before, desc="encode", unit="image", disable=quiet) as bar:
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

        work.write(number, self.columns, samples(), record, self.args.compression)

    @torch.inference_mode()
    def encode(self, batch: dict[str, Tensor], notes: Notes) -> dict[str, Any]:
        """Encode a batch to the columns that are stored: float16 arrays [B, *shape] by name.

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
    """Let rank 0 have the records of all nodes; with a shared file system it has them already.

    One record of each node at a time: with features one is megabytes, and there are thousands.
    """
    dist.barrier()  # the other ranks of a node write to the same folder
    own = work.record_names() if work.remote and dist.get_local_rank() == 0 else []
    for place in range(max(dist.all_gather_object(len(own)))):
        texts = work.record_texts(own[place : place + 1])
        for node in dist.all_gather_object(texts):
            if dist.get_global_rank() == 0:
                work.add_record_texts(node)


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


def _describe_source(manifest: Manifest) -> dict[str, Any]:
    """What tells one image set from another."""
    return {"num_samples": manifest.num_samples, "manifest_sha256": digest(asdict(manifest))}


def encode_images(args: argparse.Namespace, encoder_class: type[LatentEncoder]) -> int:
    """Do what the command `encode` asks for. Returns: the exit status."""
    device = get_device(None)
    dist.initialize_dist(device, timeout=3600.0)  # a slow rank may be this far behind at the end
    torch.backends.cudnn.allow_tf32 = False
    torch_device = torch.device("cuda", dist.get_local_rank()) if device.name == "gpu" else "cpu"
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    encoder = encoder_class.from_options(args, torch_device)
    size = encoder.image_size
    source = SourceConfig(path=args.images, cache=args.cache)
    images = ImageDataset((source,), image_size=size, train=False, seed=0, batch_size=1)
    described = {
        **encoder.identity,
        "images": _describe_source(images.manifest),
        "crop": f"ADM centre crop to {size}",
        "precision": "float32 encoder, float16 stored",
    }
    options = {key: getattr(args, key) for key in ("batch_size", "shard_size", "compression")}
    made_from = {"command": "encode_latents", **described, **options}
    shapes = tuple(encoder.columns.values())
    sample_bytes = _FLOAT16_BYTES * sum(map(prod, shapes)) + _LABEL_BYTES
    parts = plan_parts(images.num_samples, sample_bytes, args.shard_size)
    work = PartsFolder(args.out, args.staging, encoder.kind, made_from, len(parts))
    total = f"{images.num_samples:,} images as {' x '.join(map(str, shapes[0]))}"
    if work.already_finished() is not None:
        if rank == 0:
            print(f"{shown(args.out)} is there already: {total} latents of this encoder")
        return 0
    work.open()
    finished = set().union(*dist.all_gather_object(work.finished()))
    waiting = [part for part in parts if part[0] not in finished]
    before = sum(stop - start for number, start, stop in parts if number in finished)
    writer = LatentWriter(encoder, images, args)
    writer.write(work, waiting[rank::ranks], images.num_samples, before)
    share_records(work)
    if rank == 0:
        notes = encoder.notes()
        records = work.records(notes.merge)
        check_coverage(parts, records, images.manifest)
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
