"""The starts of a run, in order, and the fence between them. Free of torch.

Each start of a run is an attempt with a number of its own. A state carries the number of the
attempt that wrote it, so no attempt can overwrite another's state. An attempt notes at which step
it began: what an older attempt writes beyond that step was written behind its back, by a process
that was believed dead, and is never read. And before it writes, an attempt looks for newer ones:
a rank that was cut off and comes back stops there.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass

from lgm_scale.checkpoint.manifest import StateName
from lgm_scale.errors import CheckpointError, SupersededError
from lgm_scale.storage.stores import Storage

__all__ = ["Attempt", "Attempts"]

_FOLDER = "attempts/"
# Set by schedulers and launchers; recorded so that a history can be told afterwards.
_SCHEDULER_KEYS = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST", "SKYPILOT_TASK_ID")


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    number: int
    resumed_step: int
    """Steps done when it began."""
    world_size: int
    strategy: str
    host: str
    started: float
    """Seconds since 1970."""
    scheduler: dict[str, str]
    token: str
    """Drawn at random: two starts at the same moment tell themselves apart by it."""


class Attempts:
    """The attempts of one run; only rank 0 writes.

    Args:
        storage: Of the run's state.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.own: Attempt | None = None

    def all(self) -> list[Attempt]:
        """In order."""
        attempts = []
        for name in self.storage.names(_FOLDER):
            try:
                attempts.append(Attempt(**json.loads(self.storage.read(name))))
            except (ValueError, TypeError) as error:
                raise CheckpointError(
                    f"{self.storage.root}/{name} is damaged ({error}); without it nobody can tell "
                    "which states are valid: restore it, or delete the folder to start anew"
                ) from error
        return attempts

    def start(self, resumed_step: int, world_size: int, strategy: str) -> Attempt:
        """Number this attempt and make it known. Raises: CheckpointError on a race."""
        number = max((attempt.number for attempt in self.all()), default=0) + 1
        attempt = Attempt(
            number,
            resumed_step,
            world_size,
            strategy,
            socket.gethostname(),
            time.time(),
            {key: os.environ[key] for key in _SCHEDULER_KEYS if key in os.environ},
            uuid.uuid4().hex,
        )
        content = (json.dumps(asdict(attempt)) + "\n").encode()
        if not self.storage.create(f"{_FOLDER}{number:04d}.json", content):
            raise CheckpointError(
                f"{self.storage.root}: another process started this run at the same moment; let "
                "one of them run"
            )
        self.own = attempt
        return attempt

    def check(self) -> None:
        """Before anything is written. Raises: SupersededError if a newer attempt has begun."""
        assert self.own is not None
        newest = max(self._number(name) for name in self.storage.names(_FOLDER))
        if newest > self.own.number:
            raise SupersededError(
                f"{self.storage.root}: this is attempt {self.own.number} of the run, and attempt "
                f"{newest} has taken over since; stopped, and nothing was "
                "overwritten. Stop one of the two jobs if both are meant to live"
            )

    @staticmethod
    def _number(name: str) -> int:
        return int(name.removeprefix(_FOLDER).removesuffix(".json"))


def valid_states(states: list[StateName], attempts: list[Attempt]) -> list[StateName]:
    """States that belong to the run's history, the newest first.

    A state of attempt a at step s belongs to it if every later attempt began at step s or after.
    """
    begun: dict[int, int] = {attempt.number: attempt.resumed_step for attempt in attempts}
    valid = [
        state
        for state in states
        if state.attempt in begun
        and all(step >= state.step for number, step in begun.items() if number > state.attempt)
    ]
    return sorted(valid, reverse=True)
