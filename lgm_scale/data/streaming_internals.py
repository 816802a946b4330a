"""Everything that we take from the inside of mosaicml-streaming: the guard around its epochs.

Left to itself, the library ends an epoch as if it were complete in the process that could not
fetch a shard, and lets the others wait for ever (`docs/streaming.md`). It has no public hook for
any of what this file does, so the names that begin with an underscore, and all of `streaming.base`,
were read from version 0.13.0; each says what breaks without it. `tests/unit/test_private_names.py`
fails when one is gone. No other file of the package uses such a name.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _ShardState
from streaming.base.distributed import all_gather_object, maybe_init_dist
from streaming.base.format.base.reader import FileInfo, Reader
from streaming.base.format.mds import encodings
from streaming.base.shared import prefix as shared_prefix
from streaming.base.world import World
from torch import distributed
from typing_extensions import override

from lgm_scale.data.config import SourceConfig
from lgm_scale.data.manifest import INDEX_NAME
from lgm_scale.data.shards import local_folder
from lgm_scale.errors import DataError
from lgm_scale.storage.files import write_whole
from lgm_scale.storage.transfer import Expected, Patience, fetch, join, shown

log = logging.getLogger("lgm_scale")

_FAILED = 255  # a state of a shard that `_ShardState` does not use
_GRACE = 30.0  # seconds beyond the patience of a fetch, for decompression and a busy machine
_LAST_PREFIX = 10**9

# The library parses a column's type anew for every value: a quarter of a latent's time. What it
# makes of one has no state. Without the cache everything reads as well, but slower.
encodings._get_coder = functools.cache(encodings._get_coder)


class ShardStream(Stream):
    """A stream that fetches patiently, checks what it got, and says what went wrong."""

    def __init__(self, source: SourceConfig, patience: Patience) -> None:
        folder = local_folder(source)
        remote = source.path if source.cache is not None else None
        super().__init__(remote=remote, local=str(folder))
        self.patience = patience
        self._expected: dict[str, Expected] = {}

    @override
    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Reader]:
        # The index is read here alone: the moment to note what each file must be.
        shards = super().get_shards(world, allow_unsafe_types)
        for shard in shards:
            for pair in shard.file_pairs:
                for info in filter(None, pair):
                    self._expected[info.basename] = Expected(info.bytes, info.hashes)
        return shards

    @override
    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        # The library takes a file that is there for whole; a killed run may have left half of it.
        if self.remote is not None:
            for name, expected in self._expected.items():
                path = Path(self.local, name)
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_size != expected.num_bytes:
                        path.unlink()
        super().set_up_local(shards, cache_usage_per_shard)

    @override
    def prepare_shard(self, shard: Reader) -> int:
        try:
            return super().prepare_shard(shard)
        except DataError:  # of the fetch, which names the file
            raise
        except OSError as error:  # while decompressing
            name = shard.file_pairs[0][0].basename
            raise DataError(f"{join(self.local, name)} cannot be written: {error}") from error

    @override
    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        # Without it the library fetches by itself: its number of tries knows no time, and a file
        # with the wrong hash is an assertion that names no remote file.
        local = Path(self.local, to_basename or from_basename)
        if self.remote is None:
            raise DataError(f"{local} is missing, but {INDEX_NAME} lists it: copy it again")
        expected = self._expected.get(from_basename)
        fetch(join(self.remote, from_basename), local, self.patience, expected)
        return str(local)

    def name_of(self, info: FileInfo) -> str:
        """Where a file of a shard comes from, for messages."""
        return shown(join(self.remote or self.local, info.basename))


class _ShardFailure(threading.Event):
    """Set once any process of this node has failed to fetch a shard."""

    def __init__(self, shard_states: Any) -> None:
        super().__init__()
        self._shard_states = shard_states  # in shared memory

    def is_set(self) -> bool:
        """Whether this process or another one of the node has failed."""
        return super().is_set() or bool((self._shard_states.numpy() == _FAILED).any())


class GuardedDataset(StreamingDataset):
    """A streaming data set whose epochs are complete, or end with an error in every process.

    Every process counts what it gives against what it was to give, waits no longer than it was
    told to, and knows the shard and the cause when it fails.
    """

    epoch: int = 0
    """The epoch that this process reads; 0 before the first iteration."""
    completed: int = -1
    """The last epoch that this process has seen the end of."""

    def __init__(self, streams: list[ShardStream], patience: Patience, **options: Any) -> None:
        super().__init__(streams=streams, **options)
        self.patience = patience
        self._failure: DataError | None = None
        self._present: set[int] = set()
        self._planned = 0

    @override
    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over this worker's part of an epoch.

        Raises: DataError if a shard could not be fetched, here or in another process of the node,
            or if fewer samples came than were to come.
        """
        # The library makes an `_event` only if there is none; its threads and `get_item` ask it
        # whether to go on. As ours also asks the shared states, a failure in one process stops
        # the others; without it they wait for a shard that never comes.
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

    @override
    def _resume_incr_epoch(self) -> tuple[int, int]:
        # The one place where each worker's copy learns the epoch, resumed or not. The public
        # `next_epoch` is shared by the workers and changes while the others still read it; flips
        # and crops of a worker would then be those of another epoch.
        self.epoch, sample_in_epoch = super()._resume_incr_epoch()
        return self.epoch, sample_in_epoch

    @override
    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        # The one place where a worker's share of an epoch is known (-1 is padding): without it
        # nobody could tell a short epoch from a whole one.
        ids = super()._get_work(epoch, sample_in_epoch)
        self._planned = int((ids != -1).sum())
        return ids

    @override
    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch a shard; let the other workers and ranks of the node know if that fails.

        The library asks for every sample again, under a lock of the whole node. Where nothing is
        ever evicted, a shard that was seen to be there needs no second look.
        """
        if shard_id in self._present:
            return
        # `_shard_states`, in shared memory, is the one thing that all processes of a node look at:
        # a failure that is noted there reaches them all.
        if self._shard_states[shard_id] == _FAILED:
            raise self._lost(shard_id)
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException as error:
            if self._shard_states[shard_id] == _FAILED:  # by another process, since the look above
                raise self._lost(shard_id) from error
            with contextlib.suppress(OSError):  # of a full disk, which is the cause perhaps
                if isinstance(error, DataError):
                    write_whole(self._cause_of(shard_id), str(error))
                else:  # nor may another epoch's be told
                    self._cause_of(shard_id).unlink(missing_ok=True)
            self._shard_states[shard_id] = _FAILED
            raise
        if not self.cache_limit and self._shard_states[shard_id] == _ShardState.LOCAL:
            self._present.add(shard_id)

    @override
    def on_exception(self, future: Any) -> None:
        # The library raises in the thread that is already dead; keep what it died of instead.
        error = future.exception()
        if error is None:
            return
        if not isinstance(error, DataError):
            log.error("reading ahead failed", exc_info=error)
            error = DataError(f"reading ahead failed: {type(error).__name__}: {error}")
        self._failure = self._failure or error
        self._event.set()

    # The library waits for both of its threads to report their exit; one that raised never does,
    # and the process would hang at the start of the next epoch or at its end.

    @override
    def _prepare_thread(self, it: Any) -> None:
        try:
            super()._prepare_thread(it)
        except BaseException:
            it.on_exit()
            raise

    @override
    def _ready_thread(self, it: Any) -> None:
        try:
            super()._ready_thread(it)
        except BaseException:
            it.on_exit()
            raise

    @override
    def _each_sample_id(self, it: Any) -> Iterator[int]:
        # The library's own loop, with an end to its patience: it waits for a sample for ever.
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
            if self._shard_states[shard_id] == _ShardState.REMOTE:
                self.prepare_shard(shard_id, blocking=False)

    def _stalled(self, it: Any, seconds: float) -> DataError:
        ids = it.sample_ids[it.yield_index :]
        name = self._shard_name(self.spanner[int(ids[ids != -1][0])][0])
        return DataError(f"{name} did not arrive within {seconds:.0f} s: the fetch of it hangs")

    def _cause_of(self, shard_id: int) -> Path:
        """Where a process notes why it has lost a shard: beside the lock that a node shares."""
        return Path(f"{self._cache_filelock_path}.{shard_id}.lost")

    def _lost(self, shard_id: int) -> DataError:
        """What the process that lost a shard said: a loader hands on one worker's words alone."""
        with contextlib.suppress(OSError):
            return DataError(self._cause_of(shard_id).read_text())
        return DataError(
            f"{self._shard_name(shard_id)} could not be fetched by another process of this node, "
            "whose message has the cause. Run again once the storage answers; a training resumes "
            "from its last resume state"
        )

    def _shard_name(self, shard_id: int) -> str:
        stream: Any = self.streams[self.stream_per_shard[shard_id]]
        return stream.name_of(self.shards[shard_id].file_pairs[0][0])


def num_ranks() -> int:
    """Ranks that share the data, as the library counts them."""
    return World.detect().num_ranks


def rank_place() -> int:
    """Which one of every `num_ranks()` samples of an epoch's order this rank reads.

    The library deals an epoch out to nodes and then to the ranks of each, a sample at a time
    (`partition/orig.py`): so a rank's i-th sample is at place i * num_ranks() + rank_place(), and
    the global batches are the same for any number of ranks. A test deals epochs out.
    """
    world = World.detect()
    return world.rank_of_node * world.num_nodes + world.node


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Have a process group for a while, where ranks were started and none has made one yet."""
    started = maybe_init_dist()
    try:
        yield
    finally:
        if started:
            distributed.destroy_process_group()


def on_local_leaders(work: Callable[[], None]) -> None:
    """Do something once per node. A failure becomes one on every rank, not a barrier for ever.

    Raises: DataError on every rank, or what `work` raised on the rank where it did.
    """
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


@contextlib.contextmanager
def own_prefix() -> Iterator[None]:
    """Let a data set search for its names in shared memory where no other one does.

    The library takes the first free number. Two runs that start at one moment on one node take
    the same, and every number that a killed run left behind is tried and opened. One random number
    for all ranks, from which the search begins, has neither trouble. `_each_prefix_int`, which
    lists the numbers to try, is a global of the library; there is no argument for it.
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
