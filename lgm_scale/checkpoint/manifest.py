"""What a state says of itself: whose it is, its step, and its files with their checksums.

A state is complete once its manifest is there, and whole if every file has the checksum that the
manifest gives. Free of torch; data sets have a manifest of their own (`lgm_scale.data.manifest`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from lgm_scale.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
RUN_NAME = "run.json"
"""Whose states lie in a folder: id, name and configuration of the run."""
FORMAT = 1


@dataclass(frozen=True, order=True)
class StateName:
    """Step and attempt of a state: the name of its folder."""

    step: int
    attempt: int

    def __str__(self) -> str:
        return f"ba{self.step:08d}-a{self.attempt:04d}"

    @classmethod
    def parse(cls, name: str) -> StateName | None:
        """The state that a folder's name stands for; None for other names."""
        match = re.fullmatch(r"ba(\d{8,})-a(\d{4,})", name)
        return cls(int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class StateFile:
    """A file of a state, and which ranges of parameters it holds.

    Args:
        name: Where it lies below the state's folder.
        size: Its length in bytes.
        sha256: Hexadecimal digest of its content.
        pieces: [index of the parameter, first element, number of elements], one for each range.
    """

    name: str
    size: int
    sha256: str
    pieces: list[list[int]]


@dataclass(frozen=True)
class StateManifest:
    """The content of a state's manifest.json.

    Args:
        run_id: The run's id, drawn when it began; a state is read by its own run only.
        step: Steps that were done when it was saved.
        attempt: Number of the start of the run that wrote it.
        world_size: How many ranks wrote it; any other number may read it.
        strategy: The parallel strategy that they ran; any other may read it.
        parameters: Name and shape of each parameter, in the model's order.
        scalars: Everything that is no tensor: times, learning rates, place in the data.
        files: The files that hold the tensors, with their checksums.
        format: Version of this layout.
    """

    run_id: str
    step: int
    attempt: int
    world_size: int
    strategy: str
    parameters: list[list[Any]]
    scalars: dict[str, Any]
    files: list[StateFile]
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """JSON that carries its own SHA-256: nothing else vouches for a manifest."""
        body = json.dumps(dataclasses.asdict(self), separators=(",", ":"))
        digest = hashlib.sha256(body.encode()).hexdigest()
        return f'{{"sha256": "{digest}",\n"body": {body}}}\n'.encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> StateManifest:
        """Parse what `to_bytes` made.

        Raises: CheckpointError if it is damaged or of another format.
        """
        try:
            whole = json.loads(content)
            body = json.dumps(whole["body"], separators=(",", ":"))  # the same text again
            if hashlib.sha256(body.encode()).hexdigest() != whole["sha256"]:
                raise CheckpointError(f"{MANIFEST_NAME} does not have its checksum")
            values = whole["body"]
            if values["format"] != FORMAT:
                raise CheckpointError(
                    f"{MANIFEST_NAME} has format {values['format']}, this version reads {FORMAT}"
                )
            files = [StateFile(**entry) for entry in values.pop("files")]
            return cls(**values, files=files)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{MANIFEST_NAME} is damaged: {error!r}") from error
