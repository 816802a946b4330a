"""Save a run's state, and find and load the newest one that is whole. On all ranks together.

The order of what is written is the whole point of this file. A process can be killed between any
two lines of it, and whatever lies on the disk then must be a state that is whole, or be seen to be
none:

    attempts/0003.json                   before anything else: older attempts stop at it
    ba00001500-a0003/rank-*.safetensors  each written aside and renamed; no state yet
    ba00001500-a0003/manifest.json       last: from here on, this is the newest state
    (older states are deleted)           only now, their manifests first

Killed before the manifest, a run has files in a folder that nobody reads; the next save of the run
deletes them. Killed between manifest and deletion, it has one state more than it needs. Killed in a
deletion, it has files without a manifest once more.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from composer.core import State
from composer.utils import dist
from torch import nn

from lgm_scale.checkpoint.attempts import Attempt, Attempts, valid_states
from lgm_scale.checkpoint.manifest import (
    MANIFEST_NAME,
    RUN_NAME,
    StateFile,
    StateManifest,
    StateName,
)
from lgm_scale.checkpoint.scalars import load_scalars, read_scalars
from lgm_scale.checkpoint.tensors import (
    check_same_model,
    files_needed,
    read_shards,
    write_shards,
)
from lgm_scale.errors import CheckpointError, SupersededError
from lgm_scale.parallel.collectives import on_rank_zero, raise_everywhere
from lgm_scale.parallel.shards import ParameterShard, owned
from lgm_scale.storage.files import file_hash
from lgm_scale.storage.stores import Storage
from lgm_scale.training.ema import EMA

__all__ = ["Checkpointer"]

log = logging.getLogger("lgm_scale")


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
        self.keep = keep
        self.attempts = Attempts(storage)

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
        """Write a state, then its manifest, then delete what is too old.

        Args:
            state: Composer's state.
            companions: Small files that go beside the states, in object storage only.

        Raises: CheckpointError on every rank if one rank failed; SupersededError if another
            process has taken the run over.
        """
        attempt = self._own().number
        name = StateName(state.timestamp.batch.value, attempt)
        on_rank_zero(self.attempts.check)  # before a byte is written
        scalars = read_scalars(state)
        files = self._write_files(name)
        on_rank_zero(lambda: self._seal(name, scalars, files, companions or {}))
        return name

    def _own(self) -> Attempt:
        assert self.attempts.own is not None, "begin() comes first"
        return self.attempts.own

    def _write_files(self, name: StateName) -> list[StateFile]:
        """Write this rank's file. Returns: what the manifest is to say of the files of all ranks.

        A rank that fails says so first and raises then, together with all others: they would wait
        for it in the next collective until the timeout.
        """
        file, error = None, None
        workplace = self.storage.workplace()
        try:
            path = workplace / f"rank-{dist.get_global_rank():05d}.safetensors"
            # Buffers are equal on all ranks, and small.
            buffers = dict(self.model.named_buffers()) if dist.get_global_rank() == 0 else {}
            written = write_shards(path, self.shards, self._owned, self.ema.by_name(), buffers)
            # The checksum is that of what was meant to be written, before the disk or the network
            # had it: at resume it tells whether they kept it.
            file = StateFile(path.name, path.stat().st_size, file_hash(path), written)
            self.storage.put(path, f"{name}/{path.name}")
        except (OSError, CheckpointError) as problem:
            error = CheckpointError(
                f"checkpoint.folder: rank {dist.get_global_rank()} could not write {name} to "
                f"{self.storage.root}: {problem}; the state before it is whole. Make room or mend "
                "the folder, and run the same command again"
            )
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
        raise_everywhere(error)
        return [found for found in dist.all_gather_object(file) if found is not None]

    def _seal(
        self,
        name: StateName,
        scalars: dict[str, Any],
        files: list[StateFile],
        companions: dict[str, Path],
    ) -> None:
        """Write the manifest: from here on the state counts. Called on rank 0."""
        # Nodes whose folder is not shared would each keep a part of the state, and the run would
        # notice when it needs it.
        there = set(self.storage.names(f"{name}/"))
        lost = [file.name for file in files if f"{name}/{file.name}" not in there]
        if lost:
            raise CheckpointError(
                f"checkpoint.folder: {self.storage.root} is not shared by all ranks: rank 0 does "
                f"not see {lost[0]}; use a folder that every node sees, or object storage"
            )
        self.attempts.check()  # again: writing the files has taken time
        manifest = StateManifest(
            run_id=self.run_id,
            step=name.step,
            attempt=name.attempt,
            world_size=dist.get_world_size(),
            strategy=self.strategy,
            parameters=[[shard.name, list(shard.shape)] for shard in self.shards],
            scalars=scalars,
            files=files,
        )
        self.storage.write(f"{name}/{MANIFEST_NAME}", manifest.to_bytes())
        if self.storage.remote:
            for companion, path in companions.items():
                if path.is_file():
                    self.storage.write(companion, path.read_bytes())
        self._prune(name)

    def _prune(self, newest: StateName) -> None:
        """Keep the newest valid states; delete others, and what dead attempts left unfinished."""
        names = self._folders()
        keep = valid_states(self._whole(names), self.attempts.all())[: self.keep]
        for state in names:
            # Not what is newer: it would belong to an attempt that has just taken the run over.
            if state not in keep and state <= newest:
                # The manifest first: half a state must not look like a whole one.
                self.storage.delete(f"{state}/{MANIFEST_NAME}")
                self.storage.delete(f"{state}/")

    def _folders(self) -> list[StateName]:
        tops = {name.split("/")[0] for name in self.storage.names("ba")}
        return sorted(state for top in tops if (state := StateName.parse(top)) is not None)

    def _whole(self, states: list[StateName]) -> list[StateName]:
        """Those that have a manifest."""
        there = set(self.storage.names("ba"))
        return [state for state in states if f"{state}/{MANIFEST_NAME}" in there]

    # --- loading --------------------------------------------------------------------------

    @cached_property
    def candidates(self) -> list[StateName]:
        """States that a resume tries, the newest first. All ranks must ask together."""
        return on_rank_zero(lambda: valid_states(self._whole(self._folders()), self.attempts.all()))

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
        manifest = on_rank_zero(lambda: self._read_manifest(name))
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

    def _read_manifest(self, name: StateName) -> StateManifest | str:
        """The manifest, or what is wrong with it."""
        try:
            return StateManifest.from_bytes(self.storage.read(f"{name}/{MANIFEST_NAME}"))
        except (OSError, CheckpointError) as error:
            return str(error)

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
