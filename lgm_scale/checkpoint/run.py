"""A run comes in and goes out: whose state this is, and where its result goes.

With state in object storage, the result and the log go there as well, and come back from there:
a run needs nothing from the disk of a machine that is gone.
"""

from __future__ import annotations

import json
import logging
import uuid
from dataclasses import dataclass
from typing import Any

from composer.core import State

from lgm_scale.checkpoint.manifest import MANIFEST_NAME, RUN_NAME, StateName
from lgm_scale.checkpoint.run_folder import HISTORY_NAME, METRICS_NAME, Changes, RunFolder
from lgm_scale.checkpoint.scalars import renew_learning_rates
from lgm_scale.config.loading import to_dict
from lgm_scale.errors import CheckpointError
from lgm_scale.parallel.collectives import on_rank_zero
from lgm_scale.storage.files import write_whole
from lgm_scale.storage.stores import Storage, open_storage

log = logging.getLogger("lgm_scale")

_RESULT = "result.json"
_BUNDLE = "bundle/"


@dataclass(frozen=True)
class EnteredRun:
    """A run that may go on here: its id, whether it has its result, and where its states lie.

    `changes` are those made on purpose since it last ran; `apply_changes` makes them its own.
    """

    run_id: str
    finished: bool
    changes: Changes
    storage: Storage


def enter_run(folder: RunFolder) -> EnteredRun:
    """Make sure that folder and state belong to this very run. On all ranks.

    Raises: ConfigError with the keys that differ; CheckpointError.
    """
    location = folder.config.checkpoint.folder or str(folder.path / "state")
    storage = open_storage(location, "checkpoint.folder", folder.config.data.patience)
    return EnteredRun(*on_rank_zero(lambda: _enter(folder, storage)), storage)


def _enter(folder: RunFolder, storage: Storage) -> tuple[str, bool, Changes]:
    """The run's id, whether it is finished, and its changes. Called on rank 0."""
    names = storage.names() if storage.remote else []
    for name in (METRICS_NAME, HISTORY_NAME):
        if name in names and not (folder.path / name).exists():
            write_whole(folder.path / name, storage.read(name))
    changes = folder.changes()
    folder.claim()
    config = folder.config
    run = _open_run(storage, config.run_name, to_dict(config))
    there = dict(run["config"])
    if storage.remote:
        there["out"] = config.out  # another machine may put it elsewhere
    if _has_state(storage):
        changes |= folder.compare(there, f"checkpoint.folder: {storage.root}")
    elif to_dict(config) != there:  # nothing of the other run is left, not even its id
        run = _write_run(storage, config.run_name, to_dict(config))
    finished = _RESULT in names and not changes and folder.complete()
    if finished:
        _fetch_bundle(storage, folder)
    return run["run_id"], finished, changes


def apply_changes(run: EnteredRun, folder: RunFolder, state: State) -> None:
    """Make what was changed on purpose the run's own, once its last state is loaded.

    Learning rates are computed anew where a key of their schedule has changed. On all ranks.
    """
    if not run.changes:
        return
    renew_learning_rates(state)
    step = state.timestamp.batch.value

    def record() -> None:
        for key, change in run.changes.items():
            log.warning(
                "%s: %s until step %d, %s from here on; %s has it",
                *(key, change["from"], step, change["to"], folder.path / HISTORY_NAME),
            )
        entry = json.loads(run.storage.read(RUN_NAME)) | {"config": to_dict(folder.config)}
        run.storage.write(RUN_NAME, (json.dumps(entry, indent=1) + "\n").encode())
        folder.record(run.changes, step)
        if run.storage.remote:
            run.storage.write(HISTORY_NAME, (folder.path / HISTORY_NAME).read_bytes())

    on_rank_zero(record)


def _has_state(storage: Storage) -> bool:
    """Whether a state is whole, or was: a result is there."""
    names = storage.names()
    return _RESULT in names or any(
        StateName.parse(name.split("/")[0]) and name.endswith(f"/{MANIFEST_NAME}") for name in names
    )


def _open_run(storage: Storage, run_name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The run that a storage belongs to: {run_id, run_name, config}; made if there is none.

    The id is drawn at random. States carry it, so that a state that was copied here from another
    run, even one of the same configuration, is not taken for one of this run.

    Raises: CheckpointError if it is damaged, or is missing where there are states.
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
    return _write_run(storage, run_name, config)


def _write_run(storage: Storage, run_name: str, config: dict[str, Any]) -> dict[str, Any]:
    run = {"run_id": uuid.uuid4().hex, "run_name": run_name, "config": config}
    storage.write(RUN_NAME, (json.dumps(run, indent=1) + "\n").encode())
    return run


def _fetch_bundle(storage: Storage, folder: RunFolder) -> None:
    """Bring a finished run's bundle to `out`."""
    bundle = [name for name in storage.names() if name.startswith(_BUNDLE)]
    # bundle.json last: a bundle without it is none.
    for name in sorted(bundle, key=lambda name: name.endswith("bundle.json")):
        write_whole(folder.path / name, storage.read(name))


def leave_result(storage: Storage, folder: RunFolder, steps: int) -> None:
    """Note the result, and put bundle and log beside the state in object storage. On rank 0.

    `result.json` comes last: where it is, everything else is there.
    """
    folder.record_result()
    if not storage.remote:
        return
    for path in sorted(folder.bundle.rglob("*")):
        if path.is_file():
            storage.write(_BUNDLE + path.relative_to(folder.bundle).as_posix(), path.read_bytes())
    for path in (folder.path / METRICS_NAME, folder.path / HISTORY_NAME):
        if path.is_file():
            storage.write(path.name, path.read_bytes())
    storage.write(_RESULT, (json.dumps({"steps": steps}) + "\n").encode())
