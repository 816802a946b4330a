"""Save a run's state, and find and load the newest one that is whole. On all ranks together.

The order of what is written is the whole point of this file. A process can be killed between any
two lines of it, and whatever lies on the disk then must be a state that is whole, or be seen to be
none:

    attempts/0003.json                   before anything else: older attempts stop at it
    ba00001500-a0003/rank-*.safetensors  each written aside and renamed; no state yet
    ba00001500-a0003/manifest.json       last: from here on, this is the newest state
    (older states are deleted)           only now, their manifests first

The training stops only while a rank copies its shards to the memory of its host. What comes then is
done beside it in two parts (`checkpoint.background`): every rank hashes and writes its file; when
all main threads know that all files are there, rank 0 writes the manifest and deletes. One save is
under way at a time: the next one, and the end of the run, wait for it.

Killed before the manifest, a run has files in a folder that nobody reads; the next save of the run
deletes them. Killed between manifest and deletion, it has one state more than it needs. Killed in a
deletion, it has files without a manifest once more.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

from composer.core import State
from composer.utils import dist
from torch import nn

from lgm_scale.checkpoint.attempts import Attempt, Attempts
from lgm_scale.checkpoint.background import Background
from lgm_scale.checkpoint.manifest import RUN_NAME, StateFile, StateManifest, StateName
from lgm_scale.checkpoint.scalars import load_scalars, read_scalars
from lgm_scale.checkpoint.state_files import StateFiles
from lgm_scale.checkpoint.tensors import (
    ShardCopy,
    check_same_model,
    files_needed,
    read_shards,
)
from lgm_scale.errors import CheckpointError, DivergenceError, LGMError, SupersededError
from lgm_scale.parallel.collectives import on_rank_zero, raise_everywhere
from lgm_scale.parallel.shards import ParameterShard, owned
from lgm_scale.storage.files import file_hash
from lgm_scale.storage.stores import Storage
from lgm_scale.training.ema import EMA

log = logging.getLogger("lgm_scale")

_LONG_WAIT = 1.0  # seconds, from which on a wait is told


class Checkpointer:
    """Saves and loads the states of one run.

    Args:
        storage: Where they lie.
        run_id: A state of another run is never read.
        strategy: Name of the run's strategy, which is recorded.
        keep: How many states stay.
    """

    model: nn.Module
    shards: Sequence[ParameterShard]
    ema: EMA
    reload: Callable[[], None]

    def __init__(self, storage: Storage, run_id: str, strategy: str, keep: int) -> None:
        self.storage = storage
        self.run_id = run_id
        self.strategy = strategy
        self.attempts = Attempts(storage)
        self._states = StateFiles(storage, self.attempts, keep)
        self._copy = ShardCopy()
        self._background = Background()

    def bind(
        self,
        model: nn.Module,
        shards: Sequence[ParameterShard],
        ema: EMA,
        reload: Callable[[], None] = lambda: None,
    ) -> None:
        """Say what to save and to load into, once the strategy has been applied.

        Args:
            model: The model, for its buffers.
            shards: This rank's shards.
            ema: The moving average, started.
            reload: Called after loading, where the model reads other copies than the shards.
        """
        self.model, self.shards, self.ema, self.reload = model, shards, ema, reload
        self._owned = owned(shards)

    # --- saving ---------------------------------------------------------------------------

    def save(self, state: State, companions: dict[str, Path] | None = None) -> StateName:
        """Begin a state: everything is taken by value, and written beside the training.

        The save before is waited for. `proceed` and `finish` see to it that this one is completed.

        Args:
            state: Composer's state.
            companions: Small files that only grow, and go beside the states, in object storage
                only: as much of them as is there now.

        Raises: on every rank if one rank failed, CheckpointError, of the save before as well;
            SupersededError if another process has taken the run over.
        """
        begun = time.monotonic()
        self.finish()
        waited = time.monotonic() - begun
        if waited > _LONG_WAIT and dist.get_global_rank() == 0:
            log.warning(
                "step %d waited %.1f s until the state before was written; a longer "
                "checkpoint.interval or faster storage would save the time",
                *(state.timestamp.batch.value, waited),
            )
        name = StateName(state.timestamp.batch.value, self._own().number)
        on_rank_zero(self.attempts.check)  # before a byte is written
        scalars = copy.deepcopy(read_scalars(state))
        # Buffers are equal on all ranks, and small.
        buffers = dict(self.model.named_buffers()) if dist.get_global_rank() == 0 else {}
        self._copy.take(self.shards, self._owned, self.ema.by_name(), buffers)
        sizes = {
            (companion, path): path.stat().st_size
            for companion, path in (companions or {}).items()
            if self.storage.remote and path.is_file()
        }
        manifest = partial(
            StateManifest,
            run_id=self.run_id,
            step=name.step,
            attempt=name.attempt,
            world_size=dist.get_world_size(),
            strategy=self.strategy,
            parameters=[[shard.name, list(shard.shape)] for shard in self.shards],
            scalars=scalars,
        )
        self._background.start(
            partial(self._states.write, name, self._copy), partial(self._agree, manifest, sizes)
        )
        return name

    def parts_done(self) -> int:
        """How many parts of saves this rank has done; for `proceed`."""
        return self._background.count()

    def proceed(self, least: int) -> None:
        """Go on with a save whose last part all ranks have done. At the same step on all ranks.

        Args:
            least: The smallest `parts_done` of all ranks.

        Raises: on every rank what the save has raised on one, as `save` does.
        """
        self._background.proceed(least)

    def finish(self) -> None:
        """Wait until the save that is under way, if any, is completed. Raises: as `proceed`."""
        self._background.finish()

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Surround the training: no save is left half done, at its end and where it diverges.

        A rank that fails alone leaves it: the others are not there to agree. Then the state before
        is the newest.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, DivergenceError) or dist.get_world_size() == 1:
                try:
                    self.finish()
                except (LGMError, OSError) as problem:  # the first error is the one to tell
                    log.warning("%s", problem)
            raise
        self.finish()

    def _own(self) -> Attempt:
        assert self.attempts.own is not None, "begin() comes first"
        return self.attempts.own

    def _agree(
        self,
        manifest: Callable[..., StateManifest],
        companions: dict[tuple[str, Path], int],
        written: Callable[[], StateFile],
    ) -> None:
        """Tell each other what was written, and let rank 0 seal it. On all ranks.

        A rank that failed says so first and raises then, together with all others: they would wait
        for it in the next collective until the timeout.
        """
        file, error = None, None
        try:
            file = written()
        except CheckpointError as problem:
            error = problem
        raise_everywhere(error)
        files = [found for found in dist.all_gather_object(file) if found is not None]
        seal = partial(self._states.seal, manifest(files=files), companions)
        first = dist.get_global_rank() == 0
        self._background.start(seal if first else lambda: None, on_rank_zero)

    # --- loading --------------------------------------------------------------------------

    @cached_property
    def candidates(self) -> list[StateName]:
        """States that a resume tries, the newest first. All ranks must ask together."""
        return on_rank_zero(self._states.newest)

    def begin(self, state: State) -> int:
        """Load the newest whole state, if any, and number this attempt. On all ranks.

        Returns: Steps done.
        Raises: CheckpointError if there are states and none is whole, or one of another model.
        """
        step, candidates = 0, self.candidates
        for name in candidates:
            problem = self._try(name, state)
            if problem is None:
                step = name.step
                break
            if dist.get_global_rank() == 0:
                log.warning("state %s is passed over: %s", name, problem)
        else:
            if candidates:
                raise CheckpointError(
                    f"checkpoint.folder: {self.storage.root} holds {len(candidates)} states and "
                    "none is whole (see above); delete the folder to start anew"
                )
        # After loading: the attempt records the step at which it begins, and with that declares
        # invalid what an older one may still write beyond it.
        number = on_rank_zero(lambda: vars(self._start(step)))
        self.attempts.own = Attempt(**number)
        if step and dist.get_global_rank() == 0:
            log.info("resumed after step %d (attempt %d)", step, self._own().number)
        return step

    def _start(self, step: int) -> Attempt:
        """Number this attempt. Raises: SupersededError if the folder has become another run's.

        A run without a state can lose its folder to another configuration. Whoever numbers its
        attempt later sees the other's name here or is seen by it in `Attempts.check`.
        """
        attempt = self.attempts.start(step, dist.get_world_size(), self.strategy)
        try:
            owner = json.loads(self.storage.read(RUN_NAME))["run_id"]
        except FileNotFoundError:
            owner = self.run_id
        if owner != self.run_id:
            raise SupersededError(
                f"{self.storage.root}: another configuration took this folder over while this run "
                "was starting; give each its own `out`"
            )
        return attempt

    def _try(self, name: StateName, state: State) -> str | None:
        """Load one state. Returns: what is wrong with it, and then nothing was loaded."""
        manifest = on_rank_zero(lambda: self._states.read_manifest(name))
        if isinstance(manifest, str):
            return manifest
        if manifest.run_id != self.run_id:
            return "it was written by another run"
        check_same_model(manifest, self.shards, self.storage.root)
        folder = Path(tempfile.mkdtemp(prefix="lgm_scale-resume-"))
        # Ranks of one node share what they fetch: the folder of the node's first rank.
        shared = Path(dist.all_gather_object(str(folder))[_first_rank_of_node()])
        try:
            problems = dist.all_gather_object(self._fetch(name, manifest, shared))
            problem = next((found for found in problems if found is not None), None)
            if problem is not None:
                return problem
            self._load(name, manifest, shared, state)
            dist.barrier()  # nobody reads there any more
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return None

    def _fetch(self, name: StateName, manifest: StateManifest, shared: Path) -> str | None:
        """Bring files to this node, if need be, and check them. Returns: what is wrong.

        Each file is hashed by one rank only, of all ranks where they share a folder, and of a node
        where each node fetches its own copy from object storage.
        """
        if self.storage.remote:
            everyone = dist.all_gather_object(
                {file.name for file in files_needed(manifest, self.shards)}
            )
            first, local_world = _first_rank_of_node(), dist.get_local_world_size()
            node = set().union(*everyone[first : first + local_world])
            wanted = [file for file in manifest.files if file.name in node]
            mine = wanted[dist.get_local_rank() :: local_world]
        else:
            mine = manifest.files[dist.get_global_rank() :: dist.get_world_size()]
        for file in mine:
            try:
                path = self.storage.get(f"{name}/{file.name}", shared)
            except (OSError, CheckpointError) as error:
                return f"{file.name} cannot be read: {error}"
            if path.stat().st_size != file.size or file_hash(path) != file.sha256:
                return f"{file.name} does not have its checksum"
        return None

    def _load(self, name: StateName, manifest: StateManifest, shared: Path, state: State) -> None:
        paths = {}
        for file in files_needed(manifest, self.shards):
            stored = f"{name}/{file.name}"
            fetched = shared / stored.replace("/", "--")
            paths[file.name] = fetched if fetched.is_file() else self.storage.get(stored, shared)
        error = None
        try:
            read_shards(manifest, paths, self.model, self.shards, self.ema.by_name())
        except CheckpointError as problem:
            error = problem
        raise_everywhere(error)
        self.reload()
        load_scalars(manifest.scalars, state)


def _first_rank_of_node() -> int:
    return dist.get_global_rank() - dist.get_local_rank()
