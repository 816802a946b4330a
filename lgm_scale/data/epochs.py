"""An epoch of samples that is complete, or an error: the guard around the streaming library.

Left to itself, mosaicml-streaming 0.13 ends an epoch as if it were complete in the process that
could not fetch a shard, and lets the others wait for ever (`docs/streaming.md`). Here every
process counts what it gives against what it was to give, waits no longer than it was told to, and
knows the shard and the cause when it fails. The order of samples is a function of (seed, epoch)
alone: neither ranks nor workers nor a resume change which samples a global batch has.
"""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.constant import TICK
from streaming.base.distributed import all_gather_object, maybe_init_dist
from streaming.base.shared import prefix as shared_prefix
from streaming.base.world import World
from torch import distributed

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.manifest import Manifest, check_columns, check_shards, read_manifest
from lgm_scale.data.mixture import View, draw_passes, samples_per_source, view_sources
from lgm_scale.data.shards import ShardStream, fill_cache, local_folder
from lgm_scale.errors import DataError
from lgm_scale.randomness import Purpose
from lgm_scale.storage.transfer import Patience

__all__ = ["CheckedLoader", "EpochDataset", "StreamOptions"]

log = logging.getLogger("lgm_scale")

_PRESENT = 3  # the library's state of a shard that is in the cache
_EVICTED = 1  # that of one that is not, or no longer
_FAILED = 255  # a state that the library does not use
_GRACE = 30.0  # seconds beyond the patience of a fetch, for decompression and a busy machine
_LAST_PREFIX = 10**9


@dataclass(frozen=True)
class StreamOptions:
    """How an epoch is read; the defaults suit a local folder.

    Args:
        patience: with object storage.
        predownload: samples that a worker fetches ahead; None for the library's choice.
        cache_limit: bytes of all caches together, or a string such as "100gb"; None for none.
    """

    patience: Patience = field(default_factory=Patience)
    predownload: int | None = None
    cache_limit: int | str | None = None


_DEFAULTS = StreamOptions()


class _ShardFailure(threading.Event):
    """Set once any process of this node has failed to fetch a shard."""

    def __init__(self, shard_states: Any) -> None:
        super().__init__()
        self._shard_states = shard_states  # in shared memory

    def is_set(self) -> bool:
        """Whether this process or another one of the node has failed."""
        return super().is_set() or bool((self._shard_states.numpy() == _FAILED).any())


class EpochDataset(StreamingDataset):
    """Sources of one kind as epochs. `epoch` is 0 before the first iteration.

    Args:
        sources: one or more MDS folders.
        kind: "images", "latents" or "spatial_latents".
        shuffle: in another order every epoch; otherwise in the order of the sources.
        seed: of the order, and of flips.
        batch_size: per device.
        options: see `StreamOptions`.

    Raises: DataError, on every rank, if a source is not complete or not of that kind.
    """

    epoch: int = 0
    completed: int = -1
    """Last epoch that this process has seen the end of."""

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        kind: str,
        *,
        shuffle: bool,
        seed: int,
        batch_size: int,
        options: StreamOptions = _DEFAULTS,
    ) -> None:
        self.sources = tuple(sources)
        self.seed = seed
        self.patience = options.patience
        started = maybe_init_dist()
        try:
            _on_local_leaders(self._look_after_files)
            self.manifests = [read_manifest(local_folder(s), kind) for s in self.sources]
            folders = [local_folder(source) for source in self.sources]
            self.views, self.manifest = view_sources(self.sources, folders, self.manifests)
            with _own_prefix():
                super().__init__(
                    streams=[ShardStream(source, options.patience) for source in self.sources],
                    batch_size=batch_size,
                    shuffle=shuffle,
                    shuffle_seed=seed,
                    num_canonical_nodes=1,  # fixed: the order must not depend on the machines
                    predownload=options.predownload,
                    cache_limit=options.cache_limit,
                )
        finally:
            if started:
                distributed.destroy_process_group()
        for shard in self.shards:
            columns = getattr(shard, "column_names", ())
            check_columns(columns, kind, " and ".join(s.path for s in self.sources))
        self.samples_taken = samples_per_source(self.sources, self.views)
        self.epoch_size = sum(self.samples_taken)
        self.length = math.ceil(self.epoch_size / self._parallel_rank_world.num_ranks)
        self._failure: DataError | None = None
        self._present: set[int] = set()

    manifest: Manifest
    views: list[View]

    def _look_after_files(self) -> None:
        for source in self.sources:
            fill_cache(source, self.patience)
            if source.cache is None:
                folder = local_folder(source)
                if folder.exists():  # otherwise the manifest's own check says more
                    check_shards(folder)

    def draw_flip(self, sample_id: int) -> bool:
        """Whether this epoch's visit of a sample sees it mirrored: of (seed, epoch, sample id)."""
        key = [self.seed, int(Purpose.FLIP), self.epoch, int(sample_id)]
        return bool(np.random.default_rng(key).integers(2))

    samples_taken: list[int]
    """Samples that an epoch takes from each source."""

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch."""
        return int(self.epoch_size)

    # What an epoch holds

    def resample_streams(
        self, epoch: int, stream_id: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Choose the samples of an epoch: (lengths of runs within a shard, sample ids)."""
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

    # How it may fail

    def _resume_incr_epoch(self) -> tuple[int, int]:
        # The one place where each worker's copy learns the epoch, resumed or not. The public
        # `next_epoch` is shared by the workers and changes while the others still read it.
        self.epoch, sample_in_epoch = super()._resume_incr_epoch()
        return self.epoch, sample_in_epoch

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        ids = super()._get_work(epoch, sample_in_epoch)
        self._planned = int((ids != -1).sum())
        return ids

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch a shard; let the other workers and ranks of the node know if that fails.

        The library asks for every sample again, under a lock of the whole node. Where nothing is
        ever evicted, a shard that was seen to be there needs no second look.
        """
        if shard_id in self._present:
            return
        if self._shard_states[shard_id] == _FAILED:
            raise self._lost(shard_id)
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            self._shard_states[shard_id] = _FAILED
            raise
        if not self.cache_limit and self._shard_states[shard_id] == _PRESENT:
            self._present.add(shard_id)

    def _lost(self, shard_id: int) -> DataError:
        stream: Any = self.streams[self.stream_per_shard[shard_id]]
        name = stream.name_of(self.shards[shard_id].file_pairs[0][0])
        return DataError(
            f"{name} could not be fetched by another process of this node, whose message has the "
            "cause. Run again once the storage answers; a training resumes from its last resume "
            "state"
        )

    def on_exception(self, future: Any) -> None:
        """Keep what a background thread died of, and stop the other one."""
        error = future.exception()
        if error is None:
            return
        if not isinstance(error, DataError):
            log.error("reading ahead failed", exc_info=error)
            error = DataError(f"reading ahead failed: {type(error).__name__}: {error}")
        self._failure = self._failure or error
        self._event.set()

    # The library waits for both of its threads to report their exit; one that raised never does.

    def _prepare_thread(self, it: Any) -> None:
        try:
            super()._prepare_thread(it)
        except BaseException:
            it.on_exit()
            raise

    def _ready_thread(self, it: Any) -> None:
        try:
            super()._ready_thread(it)
        except BaseException:
            it.on_exit()
            raise

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        """The library's loop over samples that are ready, with an end to its patience."""
        limit = self.patience.retry_seconds + _GRACE
        waiting_since = time.monotonic()
        while it.yield_index < it.total and not it.should_exit() and not self._event.is_set():
            if it.ready_index <= it.yield_index:
                if time.monotonic() - waiting_since > limit:
                    self._failure = self._stalled(it, limit)
                    self._event.set()
                    break
                self._fetch_again(it)
                time.sleep(TICK)
                continue
            sample_id = it.sample_ids[it.yield_index]
            if sample_id != -1:
                yield sample_id
            it.yield_index += 1
            waiting_since = time.monotonic()
        it.on_exit()

    def _fetch_again(self, it: Any) -> None:
        """Fetch the shard that is waited for, if it was evicted while it was.

        The library's thread looks once whether a shard is there, and then waits until it is. With
        a cache of few shards, another thread or rank may have put it out again in between; the
        wait would have no end.
        """
        if not self.cache_limit or it.ready_index >= it.total:
            return
        sample_id = int(it.sample_ids[it.ready_index])
        if sample_id != -1:
            shard_id = self.spanner[sample_id][0]
            if self._shard_states[shard_id] == _EVICTED:
                self.prepare_shard(shard_id, blocking=False)

    def _stalled(self, it: Any, seconds: float) -> DataError:
        ids = it.sample_ids[it.yield_index :]
        shard_id = self.spanner[int(ids[ids != -1][0])][0]
        stream: Any = self.streams[self.stream_per_shard[shard_id]]
        name = stream.name_of(self.shards[shard_id].file_pairs[0][0])
        return DataError(f"{name} did not arrive within {seconds:.0f} s: the fetch of it hangs")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over this worker's part of an epoch.

        Raises: DataError if a shard could not be fetched, here or in another process of the node,
            or if fewer samples came than were to come.
        """
        if not hasattr(self, "_event"):
            self._event = _ShardFailure(self._shard_states)
        count, cause = 0, None
        self._planned = 0
        try:
            for sample in super().__iter__():
                yield sample
                count += 1
        except DataError as error:
            self._failure = self._failure or error
            self._event.set()
        except Exception as error:
            if not self._event.is_set():
                raise
            cause = error
        if self._event.is_set():
            failed = np.flatnonzero(self._shard_states.numpy() == _FAILED)
            lost = self._lost(int(failed[0])) if len(failed) else None
            final = self._failure or lost or DataError(f"reading failed: {cause}")
            raise DataError(f"epoch {self.epoch} is not complete: {final}") from cause
        if count != self._planned:
            raise DataError(
                f"epoch {self.epoch} ended after {count:,} of {self._planned:,} samples of this "
                "process, and nothing says why: the stream is not to be trusted. Run again, from "
                "the last resume state"
            )
        self.completed = self.epoch


class CheckedLoader(StreamingDataLoader):
    """Whole batches of an `EpochDataset`, equally many on every rank, or an error.

    An epoch has floor(samples / global batch) batches, whatever the number of ranks; the rest,
    less than one global batch, is dropped.

    Args:
        dataset: what to load.
        batch_size: per device, the data set's own.
        **options: of `torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: EpochDataset, *, batch_size: int, **options: Any) -> None:
        super().__init__(dataset, batch_size=batch_size, drop_last=True, **options)
        self.epochs = dataset

    @property
    def _global_batch(self) -> int:
        assert self.batch_size is not None
        return self.batch_size * World.detect().num_ranks

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.epochs.epoch_samples // self._global_batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches of an epoch, or of what a resumed run has left of it.

        Raises: DataError if batches are missing, with what a worker said.
        """
        count, planned, epoch = 0, -1, -1
        try:
            for batch in super().__iter__():
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

    def _plan(self) -> tuple[int, int]:
        """The epoch, and its batches from where it was begun, or resumed, to its end."""
        state = self.epochs.state_dict(0, from_beginning=False)
        left = max(self.epochs.epoch_samples - state["sample_in_epoch"], 0)
        return state["epoch"], left // self._global_batch


def _without_traceback(error: DataError) -> str:
    """What a worker said. DataLoader hands it on as the text of a traceback."""
    return str(error).rpartition(f"{DataError.__module__}.{DataError.__qualname__}: ")[2].strip()


def _on_local_leaders(work: Callable[[], None]) -> None:
    """Do something once per node. A failure becomes one on every rank, not a barrier for ever."""
    leader, problem = World.detect().is_local_leader, None
    if leader:
        try:
            work()
        except Exception as error:
            problem = error
    texts = [None if problem is None else str(problem)]
    if distributed.is_available() and distributed.is_initialized():
        texts = all_gather_object(texts[0])
    if problem is not None:
        raise problem
    told = [text for text in texts if text is not None]
    if told:
        raise DataError(told[0])


@contextmanager
def _own_prefix() -> Iterator[None]:
    """Let a data set search for its names in shared memory where no other one does.

    The library takes the first free number. Two runs that start at one moment on one node take
    the same, and every number that a killed run left behind is tried and opened. One random number
    for all ranks, from which the search begins, has neither trouble.
    """
    start = secrets.randbelow(_LAST_PREFIX)
    if distributed.is_available() and distributed.is_initialized():
        start = all_gather_object(start)[0]
    original = shared_prefix._each_prefix_int
    shared_prefix._each_prefix_int = lambda: itertools.count(start)  # type: ignore[assignment]
    try:
        yield
    finally:
        shared_prefix._each_prefix_int = original
