"""Checkpoints of the authors of a family, turned into bundles.

    python -m lgm_scale.release_import KIND SRC DST ...

`reading` opens files without executing them, and `names` accounts for every key of a checkpoint.
Each family brings an importer that knows the form of its authors' files. What does not fit entirely
is refused.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from lgm_scale.release_import.names import KeyReport

__all__ = ["CLASSES_HELP", "ReleaseImporter"]

CLASSES_HELP = "names, one per line, or 'imagenet'; default: indices"


class ReleaseImporter(Protocol):
    """Turns one kind of released checkpoint into a bundle."""

    help: ClassVar[str]
    """What kind of checkpoint it reads, in a few words."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Add the options beside SRC, DST and --weights, which every kind has."""
        ...

    @staticmethod
    def run(args: Namespace) -> tuple[KeyReport, list[str]]:
        """Write the bundle `args.folder` from `args.source`, with the weights `args.weights`.

        Returns: what became of every key, and remarks for the user.
        Raises: CheckpointError, ConfigError, DataError.
        """
        ...
