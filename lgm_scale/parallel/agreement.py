"""One rank decides or fails, and all ranks know."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from composer.utils import dist

from lgm_scale.errors import LGMError

__all__ = ["on_rank_zero", "raise_everywhere"]

Result = TypeVar("Result")


def on_rank_zero(decide: Callable[[], Result]) -> Result:
    """What `decide` returns on rank 0, on every rank; a user error is raised on every rank.

    Every rank must call it. The result must be plain data.
    """
    outcome: list = [None, None]
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = decide()
        except LGMError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def raise_everywhere(error: LGMError | None) -> None:
    """Raise the error of the first rank that has one, on all ranks. Every rank must call it."""
    for found in dist.all_gather_object(error):
        if found is not None:
            raise found
