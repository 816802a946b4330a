"""Epochs of samples, from one source or several, and the loader that batches them.

The order of samples is a function of (seed, epoch) alone: neither ranks nor workers nor a resume
change which samples a global batch has. An epoch is complete, or there is an error: the guard is
in `streaming_internals`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataLoader

from lgm_scale.data.config import SourceConfig, as_sources
from lgm_scale.data.manifest import (
    INDEX_NAME,
    Manifest,
    check_columns,
    check_shards,
    read_manifest,
)
from lgm_scale.data.mixture import View, draw_passes, samples_per_source, view_sources
from lgm_scale.data.shards import fill_cache, local_folder
from lgm_scale.data.streaming_internals import (
    GuardedDataset,
    ShardStream,
    num_ranks,
    on_local_leaders,
    own_prefix,
    process_group,
)
from lgm_scale.errors import DataError
from lgm_scale.randomness import Purpose
from lgm_scale.storage.transfer import Patience


@dataclass(frozen=True)
class StreamOptions:
    """How an epoch is read; the defaults suit a local folder.

    Args:
        patience: How long to try to get a file from object storage.
        predownload: Samples that a worker fetches ahead; None for the library's choice.
        cache_limit: Bytes of all caches together, or a string such as "100gb"; None for no limit.
    """

    patience: Patience = field(default_factory=Patience)
    predownload: int | None = None
    cache_limit: int | str | None = None


class EpochDataset(GuardedDataset):
    """Sources of one kind as epochs.

    Args:
        data: One MDS folder, or sources with their classes and shares.
        kind: "images", "latents" or "spatial_latents".
        shuffle: Read in another order every epoch; otherwise in the order of the sources.
        seed: Decides the order and the flips.
        batch_size: Samples per device and batch.

    Raises: DataError, on every rank, if a source is not complete or not of that kind.
    """

    manifest: Manifest
    """What all sources hold together."""
    views: list[View]
    """Each source as this run sees it."""
    samples_taken: list[int]
    """Samples that an epoch takes from each source."""

    def __init__(
        self,
        data: str | os.PathLike[str] | Sequence[SourceConfig],
        kind: str,
        *,
        shuffle: bool,
        seed: int,
        batch_size: int,
        options: StreamOptions | None = None,
    ) -> None:
        options = options or StreamOptions()
        self.sources = as_sources(data)
        self.seed = seed
        with process_group():
            on_local_leaders(lambda: _look_after_files(self.sources, options.patience))
            folders = [local_folder(source) for source in self.sources]
            self.manifests = [read_manifest(folder, kind) for folder in folders]
            self.views, self.manifest = view_sources(self.sources, folders, self.manifests)
            with own_prefix():
                super().__init__(
                    streams=[ShardStream(source, options.patience) for source in self.sources],
                    patience=options.patience,
                    batch_size=batch_size,
                    shuffle=shuffle,
                    shuffle_seed=seed,
                    num_canonical_nodes=1,  # fixed: the order must not depend on the machines
                    predownload=options.predownload,
                    cache_limit=options.cache_limit,
                )
        for shard in self.shards:
            columns = getattr(shard, "column_names", ())
            check_columns(columns, kind, " and ".join(s.path for s in self.sources))
        self.samples_taken = samples_per_source(self.sources, self.views)
        self.epoch_size = sum(self.samples_taken)
        self.length = math.ceil(self.epoch_size / num_ranks())

    def draw_flip(self, sample_id: int) -> bool:
        """Whether a sample is seen mirrored in this epoch: a function of (seed, epoch, id)."""
        key = [self.seed, int(Purpose.FLIP), self.epoch, int(sample_id)]
        return bool(np.random.default_rng(key).integers(2))

    @property
    def finish_batch(self) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
        """What is left to do with a batch, or a part of one, on its device; None: nothing."""
        return None

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch."""
        return int(self.epoch_size)

    def resample_streams(
        self, epoch: int, stream_id: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Choose the samples of an epoch, which the library then shuffles and deals out.

        Returns: [runs] int64, how many samples in a row lie in one shard; [samples] int64, the ids.
        """
        chosen = range(self.num_streams) if stream_id is None else [stream_id]
        ids = []
        for source in chosen:
            view, offset = self.views[source], self.sample_offset_per_stream[source]
            kept = np.arange(view.num_kept) if view.kept is None else view.kept
            key = (self.shuffle_seed, epoch, source)
            ids += draw_passes(kept + offset, self.samples_taken[source], key)
        runs = []
        for one_pass in ids:
            shards = np.searchsorted(self.sample_offset_per_shard, one_pass, side="right")
            _, lengths = np.unique(shards, return_counts=True)
            runs.append(lengths)
        return np.concatenate(runs).astype(np.int64), np.concatenate(ids).astype(np.int64)

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """One sample as stored, but for its label, which is the run's.

        Raises: DataError for a label outside of the classes.
        """
        sample: dict[str, Any] = super().get_item(sample_id, retry)
        source = self.stream_per_shard[self.spanner[sample_id][0]] if self.num_streams > 1 else 0
        labels, own = self.views[source].labels, int(sample["label"])
        if not 0 <= own < len(labels):
            raise DataError(
                f"sample {sample_id} of {self.sources[source].path} has label {own}, outside of "
                f"its {len(labels)} classes: the folder is damaged. Make it anew"
            )
        sample["label"] = int(labels[own])
        return sample

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where in the data a run is, for its resume state.

        Between two epochs Composer asks with 0 samples. The library would then name the epoch
        that is over, and a resumed run would go through that one a second time.
        """
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0 and state["epoch"] <= self.completed:
            state["epoch"] = self.completed + 1
        return state


class CheckedLoader(StreamingDataLoader):
    """Whole batches of an `EpochDataset`, equally many on every rank, or an error.

    An epoch has floor(samples / global batch) batches, whatever the number of ranks; the rest,
    less than one global batch, is dropped.

    Args:
        batch_size: Samples per device and batch; the data set's own.
        **options: Options of `torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: EpochDataset, *, batch_size: int, **options: Any) -> None:
        super().__init__(dataset, batch_size=batch_size, drop_last=True, **options)
        self.epochs = dataset
        self.waited = 0.0
        """Seconds that whoever asked for batches has waited for them, since the start."""

    @property
    def _global_batch(self) -> int:
        assert self.batch_size is not None
        return self.batch_size * num_ranks()

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.epochs.epoch_samples // self._global_batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches of an epoch, or of what a resumed run has left of it.

        Raises: DataError if batches are missing, with what a worker said.
        """
        count, planned, epoch = 0, -1, -1
        try:
            for batch in self._timed(super().__iter__()):
                if planned < 0:
                    epoch, planned = self._plan()
                if count < planned:
                    count += 1
                    if count == planned:  # Composer takes so many and asks for no more
                        self.epochs.completed = epoch
                    yield batch
        except DataError as error:
            raise DataError(_without_traceback(error)) from None
        self.num_samples_yielded = count * (self.batch_size or 0)  # not what was dropped
        if planned < 0:
            epoch, planned = self._plan()
        if count != planned:
            raise DataError(
                f"epoch ended after {count:,} of {planned:,} batches of this rank, and no worker "
                "says why. Run again, from the last resume state"
            )
        self.epochs.completed = epoch

    def _timed(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same batches; counts how long each was waited for."""
        asked = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def _plan(self) -> tuple[int, int]:
        """The epoch, and its batches from where it was begun, or resumed, to its end."""
        state = self.epochs.state_dict(0, from_beginning=False)
        left = max(self.epochs.epoch_samples - state["sample_in_epoch"], 0)
        return state["epoch"], left // self._global_batch


def _without_traceback(error: DataError) -> str:
    """What a worker said. DataLoader hands it on as the text of a traceback."""
    return str(error).rpartition(f"{DataError.__module__}.{DataError.__qualname__}: ")[2].strip()


def _look_after_files(sources: Sequence[SourceConfig], patience: Patience) -> None:
    """Fill caches, and see that folders which are no cache are complete."""
    for source in sources:
        fill_cache(source, patience)
        if source.cache is None:
            folder = local_folder(source)
            if (folder / INDEX_NAME).is_file():  # otherwise the manifest's own check says more
                check_shards(folder)
