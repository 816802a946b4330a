"""When ranks fail, say first what failed first. Free of torch.

One rank's error makes all others fail, with errors about lost connections, and a launcher shows
rank 0's first. So each rank leaves its traceback in `<out>/failures`, and rank 0 prints the one
that was there before its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from lgm_scale.errors import LGMError


@contextlib.contextmanager
def first_failure_on_top(folder: Path) -> Iterator[None]:
    """Surround the work of a rank, and leave its traceback in `folder` if it fails.

    Errors pass through. Those that are messages for the user are the same on all ranks, and leave
    nothing.

    Args:
        folder: A folder that all ranks share.
    """
    started = time.time()
    try:
        yield
    except LGMError:  # a message for the user, and the same on all ranks
        raise
    except Exception:
        rank = int(os.environ.get("RANK", "0"))
        # A launcher ends all ranks when one has failed. This one is ending, and has to say why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            earlier = _failures_since(folder, started)
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{time.time():.3f}-rank-{rank:05d}.txt"
            (folder / name).write_text(traceback.format_exc())
            if rank == 0 and earlier:
                first = earlier[0]
                print(
                    f"{_rank_of(first)} failed first:\n{first.read_text()}\n"
                    "rank 0 then failed as well, maybe because of it:",
                    file=sys.stderr,
                    flush=True,
                )
            elif rank == 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                print(
                    "rank 0 failed, and no other rank has left a traceback. If the error below is "
                    "a lost connection, another rank was killed (memory?) or its node is gone:",
                    file=sys.stderr,
                    flush=True,
                )
        raise


def _failures_since(folder: Path, started: float) -> list[Path]:
    """Tracebacks that ranks of this start have left, the first one first."""
    when = {path: float(path.name.split("-")[0]) for path in folder.glob("*-rank-*.txt")}
    return sorted((path for path in when if when[path] >= started), key=when.__getitem__)


def _rank_of(path: Path) -> str:
    return f"rank {int(path.stem.rsplit('-', 1)[1])}"
