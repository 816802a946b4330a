"""Checkpoints of the authors of a family, turned into bundles.

    python -m lgm_scale.release_import KIND SRC DST ...

`reading` opens files without executing them, and `names` accounts for every key of a checkpoint.
Each family brings an importer that knows the form of its authors' files. What does not fit entirely
is refused.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lgm_scale.release_import.names import KeyReport

CLASSES_HELP = "names, one per line, or 'imagenet'; default: indices"

Importer = Callable[[Namespace], "tuple[KeyReport, list[str]]"]
"""Writes the bundle `args.folder` from the checkpoint `args.source`, with the weights
`args.weights` ("ema" or "model"). Returns what became of every key, and remarks for the user.
Raises: CheckpointError, ConfigError, DataError."""
