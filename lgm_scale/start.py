"""How a command starts that needs what takes seconds to import: Composer, timm."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import what is large in this block without the garbage collector, now and later.

    A million objects stay to the end of the process. Passes over them, while they come, in the
    middle of a training and at its end, were a quarter of the processor time of a short run. Where
    Composer is there already, as in a notebook, nothing happens: what lies there is not all ours.
    """
    if "composer" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()  # later passes leave out what is there now
    finally:
        gc.enable()
