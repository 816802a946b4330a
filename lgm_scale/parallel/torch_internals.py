"""Everything of torch that is private and that sharding, checkpoints and training need.

Read from torch 2.7.0. `tests/unit/test_private_names_parallel.py` fails, and says why, when one
of these names is gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["allow_recompilations", "lerp_all_"]


def allow_recompilations(count: int) -> None:
    """Let torch compile one function for at least `count` different inputs.

    `torch._dynamo.config.recompile_limit` is 8. After so many graphs torch runs the function
    uncompiled, with one warning that nobody sees among others, and a run with nine token lengths
    would be slow for no visible reason. The limit is one for the whole process; it is only raised.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, count)


def lerp_all_(tensors: list[Tensor], targets: list[Tensor], weight: float) -> None:
    """Move each tensor by `weight` of its way to its target, in place.

    `torch._foreach_lerp_` does it in a few kernels for all tensors together, where a loop would
    launch one for each. torch's own optimizers are built on these functions; public names for
    them do not exist.
    """
    torch._foreach_lerp_(tensors, targets, weight)
