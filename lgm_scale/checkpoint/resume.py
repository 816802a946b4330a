"""Save a run's state, and find and load the newest one that is whole. On all ranks together."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from composer.core import State
from composer.utils import dist
from torch import Tensor, nn

from lgm_scale.checkpoint.attempts import Attempt, Attempts, valid_states
from lgm_scale.checkpoint.manifest import (
    MANIFEST_NAME,
    StateFile,
    StateManifest,
    StateName,
)
from lgm_scale.checkpoint.tensors import files_needed, read_pieces, write_pieces
from lgm_scale.errors import CheckpointError
from lgm_scale.parallel.agreement import on_rank_zero, raise_everywhere
from lgm_scale.parallel.pieces import Piece, owned, plain_name
from lgm_scale.storage.files import file_hash
from lgm_scale.storage.stores import Storage
from lgm_scale.training.ema import EMA

__all__ = ["Resume", "open_run"]

log = logging.getLogger("lgm_scale")

RUN_NAME = "run.json"


def open_run(storage: Storage, run_name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The run that a storage belongs to: {run_id, run_name, config}; made if there is none.

    Call on rank 0. Raises: CheckpointError if it is damaged.
    """
    try:
        return json.loads(storage.read(RUN_NAME))
    except FileNotFoundError:
        if any(StateName.parse(name.split("/")[0]) for name in storage.names()):
            raise CheckpointError(
                f"{storage.root} holds states without {RUN_NAME}: whose they are nobody can tell; "
                "restore that file, or choose another folder"
            ) from None
    except ValueError as error:
        raise CheckpointError(f"{storage.root}/{RUN_NAME} is damaged ({error})") from error
    run = {"run_id": uuid.uuid4().hex, "run_name": run_name, "config": config}
    storage.write(RUN_NAME, (json.dumps(run, indent=1) + "\n").encode())
    return run


class Resume:
    """The door to a run's states.

    Args:
        storage: Where they lie.
        run_id: A state of another run is never read.
        strategy: Recorded.
        keep: How many states stay.
    """

    def __init__(self, storage: Storage, run_id: str, strategy: str, keep: int) -> None:
        self.storage = storage
        self.run_id = run_id
        self.strategy = strategy
        self.keep = keep
        self.attempts = Attempts(storage)
        self.model: nn.Module | None = None
        self.pieces: Sequence[Piece] = []
        self.ema: EMA | None = None
        self.reload: Callable[[], None] = lambda: None
        self._speaks: list[bool] = []

    def bind(
        self,
        model: nn.Module,
        pieces: Sequence[Piece],
        ema: EMA,
        reload: Callable[[], None] = lambda: None,
    ) -> None:
        """What to save and to load into, once the strategy has been applied.

        Args:
            model: For its buffers.
            pieces: Of this rank.
            ema: Started.
            reload: Called after loading, where the model reads other copies than the pieces.
        """
        self.model, self.pieces, self.ema, self.reload = model, pieces, ema, reload
        self._speaks = owned(pieces)

    # --- saving ---------------------------------------------------------------------------

    def save(self, state: State, companions: dict[str, Path] | None = None) -> StateName:
        """Write a state, then its manifest, then delete what is too old.

        Args:
            state: Composer's.
            companions: Small files that go beside the states, in object storage only.

        Raises: CheckpointError on every rank if one rank failed; SupersededError.
        """
        attempt = self._own().number
        name = StateName(state.timestamp.batch.value, attempt)
        on_rank_zero(self.attempts.check)
        scalars = _scalars(state)
        files = self._write_files(name)
        on_rank_zero(lambda: self._seal(name, scalars, files, companions or {}))
        return name

    def _own(self) -> Attempt:
        assert self.attempts.own is not None, "begin() comes first"
        return self.attempts.own

    def _write_files(self, name: StateName) -> list[StateFile]:
        """This rank's file; the files of all ranks."""
        assert self.model is not None
        file, error = None, None
        workplace = self.storage.workplace()
        try:
            path = workplace / f"rank-{dist.get_global_rank():05d}.safetensors"
            first = dist.get_global_rank() == 0
            buffers = dict(_plain_buffers(self.model)) if first else {}
            written = write_pieces(path, self.pieces, self._speaks, self._average(), buffers)
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

    def _average(self) -> dict[str, Any]:
        assert self.ema is not None
        return {
            piece.name: value
            for piece, value in zip(self.ema.pieces, self.ema.average, strict=True)
        }

    def _seal(
        self,
        name: StateName,
        scalars: dict[str, Any],
        files: list[StateFile],
        companions: dict[str, Path],
    ) -> None:
        """On rank 0: from here on the state counts."""
        there = set(self.storage.names(f"{name}/"))
        lost = [file.name for file in files if f"{name}/{file.name}" not in there]
        if lost:
            raise CheckpointError(
                f"checkpoint.folder: {self.storage.root} is not shared by all ranks: rank 0 does "
                f"not see {lost[0]}; use a folder that every node sees, or object storage"
            )
        self.attempts.check()
        manifest = StateManifest(
            run_id=self.run_id,
            step=name.step,
            attempt=name.attempt,
            world_size=dist.get_world_size(),
            strategy=self.strategy,
            parameters=[[piece.name, list(piece.shape)] for piece in self.pieces],
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
            if state not in keep and state <= newest:
                # The manifest first: half a state must not look like a whole one.
                self.storage.delete(f"{state}/{MANIFEST_NAME}")
                self.storage.delete(f"{state}/")

    def _folders(self) -> list[StateName]:
        tops = {name.split("/")[0] for name in self.storage.names("ba")}
        return sorted(state for top in tops if (state := StateName.parse(top)) is not None)

    def _whole(self, states: list[StateName]) -> list[StateName]:
        """Those with a manifest."""
        there = set(self.storage.names("ba"))
        return [state for state in states if f"{state}/{MANIFEST_NAME}" in there]

    # --- loading --------------------------------------------------------------------------

    def begin(self, state: State) -> int:
        """Load the newest whole state, if any, and number this attempt. On all ranks.

        Returns: Steps done.
        Raises: CheckpointError if there are states and none is whole, or one of another model.
        """
        candidates = on_rank_zero(
            lambda: valid_states(self._whole(self._folders()), self.attempts.all())
        )
        step = 0
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
        number = on_rank_zero(
            lambda: vars(self.attempts.start(step, dist.get_world_size(), self.strategy))
        )
        self.attempts.own = Attempt(**number)
        if step and dist.get_global_rank() == 0:
            log.info("resumed after step %d (attempt %d)", step, self._own().number)
        return step

    def _try(self, name: StateName, state: State) -> str | None:
        """Load one state; what is wrong with it."""
        content, problem = on_rank_zero(lambda: self._read_manifest(name))
        if problem is not None:
            return problem
        manifest = StateManifest.from_bytes(content)
        if manifest.run_id != self.run_id:
            return "it was written by another run"
        self._check_model(manifest)
        folder = Path(tempfile.mkdtemp(prefix="lgm_scale-resume-"))
        shared = Path(dist.all_gather_object(str(folder))[_first_rank_of_node()])
        try:
            problems = dist.all_gather_object(self._fetch(name, manifest, shared))
            problem = next((found for found in problems if found is not None), None)
            if problem is not None:
                return problem
            self._load(name, manifest, shared, state)
            dist.barrier()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return None

    def _read_manifest(self, name: StateName) -> tuple[bytes, str | None]:
        """Bytes, or what is wrong with them."""
        try:
            content = self.storage.read(f"{name}/{MANIFEST_NAME}")
            StateManifest.from_bytes(content)
        except (OSError, CheckpointError) as error:
            return b"", str(error)
        return content, None

    def _check_model(self, manifest: StateManifest) -> None:
        here = [[piece.name, list(piece.shape)] for piece in self.pieces]
        if here != manifest.parameters:
            pairs = zip(manifest.parameters, here, strict=False)
            unlike = next(((was, now) for was, now in pairs if was != now), None)
            example = ""
            if unlike is not None:
                (was, shape), (now, other) = unlike
                example = f"; {was} {shape} there, {now} {other} here"
            raise CheckpointError(
                f"checkpoint.folder: {self.storage.root} holds another model: "
                f"{len(manifest.parameters)} parameters there, {len(here)} here{example}. Choose "
                "another `out`"
            )

    def _fetch(self, name: StateName, manifest: StateManifest, shared: Path) -> str | None:
        """Check files, each by one rank; from object storage, bring them to this node first."""
        needed = {file.name for file in files_needed(manifest, self.pieces)}
        local_world = dist.get_local_world_size()
        if self.storage.remote:
            everyone = dist.all_gather_object(needed)
            first = _first_rank_of_node()
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
        assert self.model is not None
        paths = {}
        for file in files_needed(manifest, self.pieces):
            stored = f"{name}/{file.name}"
            fetched = shared / stored.replace("/", "--")
            paths[file.name] = fetched if fetched.is_file() else self.storage.get(stored, shared)
        error = None
        try:
            read_pieces(manifest, paths, self.model, self.pieces, self._average())
        except CheckpointError as problem:
            error = problem
        raise_everywhere(error)
        self.reload()
        _load_scalars(manifest.scalars, state)


def _first_rank_of_node() -> int:
    return dist.get_global_rank() - dist.get_local_rank()


def _plain_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((plain_name(name), buffer) for name, buffer in model.named_buffers())


def _scalars(state: State) -> dict[str, Any]:
    """Everything of a run that is no tensor. Random numbers need no place: all are keyed.

    Every rank must call it: some callbacks agree over ranks before they hand out their state.
    """
    timestamp = {
        key: value.total_seconds() if isinstance(value, timedelta) else value
        for key, value in state.timestamp.state_dict().items()
    }
    callbacks = {type(c).__name__: c.state_dict() for c in state.callbacks}
    return {
        "timestamp": timestamp,
        "dataset": state._dataset_state_dict()["train"],
        "learning_rates": [group["lr"] for group in state.optimizers[0].param_groups],
        "schedulers": [_plain(scheduler.state_dict()) for scheduler in state.schedulers],
        "callbacks": {name: values for name, values in callbacks.items() if values},
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's numbers; its functions of time come from the configuration."""
    return {key: value for key, value in values.items() if key != "lr_lambdas"}


def _load_scalars(scalars: dict[str, Any], state: State) -> None:
    times = {
        key: timedelta(seconds=value) if key.endswith("_wct") and value is not None else value
        for key, value in scalars["timestamp"].items()
    }
    state.timestamp.load_state_dict(times)
    if scalars["dataset"] is not None:
        state._load_dataset_state({"train": dict(scalars["dataset"]), "eval": {}})
    for group, rate in zip(
        state.optimizers[0].param_groups, scalars["learning_rates"], strict=True
    ):
        group["lr"] = rate
    for scheduler, values in zip(state.schedulers, scalars["schedulers"], strict=True):
        scheduler.load_state_dict({**scheduler.state_dict(), **values})
    for callback in state.callbacks:
        if type(callback).__name__ in scalars["callbacks"]:
            callback.load_state_dict(scalars["callbacks"][type(callback).__name__])
