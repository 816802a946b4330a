"""The starts of a run, in order, and how they keep out of each other's way. Free of torch.

A scheduler may start a run again while processes of the last start still live, on a node that was
cut off. So each start is an attempt with a number of its own. A state carries the number of the
attempt that wrote it: no attempt can overwrite another's state. An attempt notes at which step it
began: what an older one writes beyond that step was written by a process that was believed dead,
and is never read. And before it writes, an attempt looks for newer ones: a process that was cut
off and comes back stops there. (What a job of Slurm did is in `launchers.records`, another record.)
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

_FOLDER = "attempts/"
# Set by schedulers and launchers; recorded so that a history can be told afterwards.
_SCHEDULER_KEYS = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST", "SKYPILOT_TASK_ID")


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Args:
        number: 1 for the first start, and one more for each that follows.
        resumed_step: Steps that were done when it began.
        world_size: How many ranks it has.
        strategy: The parallel strategy that it runs.
        host: Name of rank 0's machine.
        started: When it began, in seconds since 1970.
        scheduler: What the scheduler's environment says of the job.
        token: Drawn at random: two starts at the same moment tell themselves apart by it.
    """

    number: int
    resumed_step: int
    world_size: int
    strategy: str
    host: str
    started: float
    scheduler: dict[str, str]
    token: str


class Attempts:
    """The attempts of one run; only rank 0 writes.

    Args:
        storage: Where the run's states lie.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.own: Attempt | None = None

    def all(self) -> list[Attempt]:
        """Every attempt so far, in order. Raises: CheckpointError if a record is damaged."""
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
        """Number this attempt and make it known to all later ones.

        Args:
            resumed_step: Steps that are done.
            world_size: How many ranks there are.
            strategy: The parallel strategy, for the record.

        Raises: CheckpointError if another process does the same at the same moment.
        """
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
        """See that no newer attempt has begun; called before anything is written.

        Raises: SupersededError if one has.
        """
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
    """The states that belong to the run's history, the newest first.

    A newer attempt may begin between an older one's check and the end of its write, so states of
    a process that was believed dead must be told apart here. A state of attempt a at step s
    belongs to the history if every later attempt began at step s or after.
    """
    begun: dict[int, int] = {attempt.number: attempt.resumed_step for attempt in attempts}
    valid = [
        state
        for state in states
        if state.attempt in begun
        and all(step >= state.step for number, step in begun.items() if number > state.attempt)
    ]
    return sorted(valid, reverse=True)
