"""A run comes in and goes out: whose state this is, and where its result goes.

With state in object storage, the result and the log go there as well, and come back from there:
a run needs nothing from the disk of a machine that is gone.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from lgm_scale.checkpoint.manifest import StateName
from lgm_scale.checkpoint.run_folder import METRICS_NAME, RunFolder, differing_keys
from lgm_scale.config.loading import to_dict
from lgm_scale.errors import CheckpointError, ConfigError
from lgm_scale.parallel.collectives import on_rank_zero
from lgm_scale.storage.files import write_whole
from lgm_scale.storage.stores import Storage, open_storage

__all__ = ["EnteredRun", "enter_run", "leave_result"]

RUN_NAME = "run.json"
_RESULT = "result.json"
_BUNDLE = "bundle/"


@dataclass(frozen=True)
class EnteredRun:
    """A run that may go on here: its id, whether it has its result, and where its states lie."""

    run_id: str
    finished: bool
    storage: Storage


def enter_run(folder: RunFolder) -> EnteredRun:
    """Make sure that folder and state belong to this very run. On all ranks.

    Raises: ConfigError with the keys that differ; CheckpointError.
    """
    location = folder.config.checkpoint.folder or str(folder.path / "state")
    storage = open_storage(location, "checkpoint.folder", folder.config.data.patience)
    run_id, finished = on_rank_zero(lambda: _enter(folder, storage))
    return EnteredRun(run_id, finished, storage)


def _enter(folder: RunFolder, storage: Storage) -> tuple[str, bool]:
    """The run's id, and whether it is finished. Called on rank 0."""
    folder.claim()
    config = folder.config
    run = _open_run(storage, config.run_name, to_dict(config))
    there = dict(run["config"])
    if storage.remote:
        there["out"] = config.out  # another machine may put it elsewhere
    differing = differing_keys(there, config)
    if differing:
        raise ConfigError(
            differing,
            f"checkpoint.folder: {storage.root} holds the state of a run with another "
            "configuration; choose another folder",
        )
    return run["run_id"], storage.remote and _fetch_result(storage, folder)


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
    run = {"run_id": uuid.uuid4().hex, "run_name": run_name, "config": config}
    storage.write(RUN_NAME, (json.dumps(run, indent=1) + "\n").encode())
    return run


def _fetch_result(storage: Storage, folder: RunFolder) -> bool:
    """Bring the log and a finished run's bundle to `out`. Returns: whether it is finished."""
    names = storage.names()
    metrics = folder.path / METRICS_NAME
    if METRICS_NAME in names and not metrics.exists():
        write_whole(metrics, storage.read(METRICS_NAME))
    if _RESULT not in names:
        return False
    bundle = [name for name in names if name.startswith(_BUNDLE)]
    # bundle.json last: a bundle without it is none.
    for name in sorted(bundle, key=lambda name: name.endswith("bundle.json")):
        write_whole(folder.path / name, storage.read(name))
    return True


def leave_result(storage: Storage, folder: RunFolder, steps: int) -> None:
    """Put bundle and log beside the state in object storage. Call on rank 0.

    `result.json` comes last: where it is, everything else is there.
    """
    if not storage.remote:
        return
    for path in sorted(folder.bundle.rglob("*")):
        if path.is_file():
            storage.write(_BUNDLE + path.relative_to(folder.bundle).as_posix(), path.read_bytes())
    metrics = folder.path / METRICS_NAME
    if metrics.is_file():
        storage.write(METRICS_NAME, metrics.read_bytes())
    storage.write(_RESULT, (json.dumps({"steps": steps}) + "\n").encode())
