"""The files of states in a storage: written, sealed, listed, deleted.

No rank talks to another here, so that it can be done in a thread beside the training.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from composer.utils import dist

from lgm_scale.checkpoint.attempts import Attempts, valid_states
from lgm_scale.checkpoint.manifest import MANIFEST_NAME, StateFile, StateManifest, StateName
from lgm_scale.checkpoint.tensors import ShardCopy
from lgm_scale.errors import CheckpointError
from lgm_scale.storage.files import file_hash
from lgm_scale.storage.stores import Storage


class StateFiles:
    """The states of one run.

    Args:
        storage: Where they lie.
        attempts: The starts of the run, which say what of it is valid.
        keep: How many states stay.
    """

    def __init__(self, storage: Storage, attempts: Attempts, keep: int) -> None:
        self.storage = storage
        self.attempts = attempts
        self.keep = keep

    def newest(self) -> list[StateName]:
        """States that have a manifest and belong to the run's history, the newest first."""
        return self._valid(self._folders())

    def read_manifest(self, name: StateName) -> StateManifest | str:
        """The manifest, or what is wrong with it."""
        try:
            return StateManifest.from_bytes(self.storage.read(f"{name}/{MANIFEST_NAME}"))
        except (OSError, CheckpointError) as error:
            return str(error)

    def write(self, name: StateName, shards: ShardCopy) -> StateFile:
        """Write this rank's file.

        Returns: What the manifest is to say of it.
        Raises: CheckpointError if it cannot be written.
        """
        rank, workplace = dist.get_global_rank(), None
        try:
            workplace = self.storage.workplace()
            path = workplace / f"rank-{rank:05d}.safetensors"
            shards.write(path)
            # The checksum is that of what was meant to be written, before the disk or the network
            # had it: at resume it tells whether they kept it.
            file = StateFile(path.name, path.stat().st_size, file_hash(path), shards.pieces)
            self.storage.put(path, f"{name}/{path.name}")
        except (OSError, CheckpointError) as problem:
            raise CheckpointError(
                f"checkpoint.folder: rank {rank} could not write {name} to "
                f"{self.storage.root}: {problem}; the state before it is whole. Make room or mend "
                "the folder, and run the same command again"
            ) from problem
        finally:
            if workplace is not None:
                shutil.rmtree(workplace, ignore_errors=True)
        return file

    def seal(self, manifest: StateManifest, companions: Mapping[tuple[str, Path], int]) -> None:
        """Write the manifest: from here on the state counts. Then delete what is too old.

        Called on rank 0, when the files of all ranks are there.

        Args:
            manifest: The state's.
            companions: Names of files to go beside the states, where they are on this machine, and
                how many of their bytes are meant.

        Raises: CheckpointError if the folder is not shared; SupersededError.
        """
        # Nodes whose folder is not shared would each keep a part of the state, and the run would
        # notice when it needs it.
        name = StateName(manifest.step, manifest.attempt)
        there = set(self.storage.names(f"{name}/"))
        lost = [file.name for file in manifest.files if f"{name}/{file.name}" not in there]
        if lost:
            raise CheckpointError(
                f"checkpoint.folder: {self.storage.root} is not shared by all ranks: rank 0 does "
                f"not see {lost[0]}; use a folder that every node sees, or object storage"
            )
        self.attempts.check()  # again: writing the files has taken time
        self.storage.write(f"{name}/{MANIFEST_NAME}", manifest.to_bytes())
        for (companion, path), size in companions.items():
            with path.open("rb") as file:
                self.storage.write(companion, file.read(size))
        self._prune(name)

    def _prune(self, newest: StateName) -> None:
        """Keep the newest valid states; delete others, and what dead attempts left unfinished."""
        names = self._folders()
        keep = self._valid(names)[: self.keep]
        for state in names:
            # Not what is newer: it would belong to an attempt that has just taken the run over.
            if state not in keep and state <= newest:
                # The manifest first: half a state must not look like a whole one.
                self.storage.delete(f"{state}/{MANIFEST_NAME}")
                self.storage.delete(f"{state}/")

    def _folders(self) -> list[StateName]:
        tops = {name.split("/")[0] for name in self.storage.names("ba")}
        return sorted(state for top in tops if (state := StateName.parse(top)) is not None)

    def _valid(self, states: list[StateName]) -> list[StateName]:
        there = set(self.storage.names("ba"))
        whole = [state for state in states if f"{state}/{MANIFEST_NAME}" in there]
        return valid_states(whole, self.attempts.all())
