"""The training command, with a bug in rank 1 at step 3."""

from __future__ import annotations

import os

import lgm_scale.train
from lgm_scale.errors import exit_on_user_error
from lgm_scale.families.lgm.training import LGMTrainingModel

loss = LGMTrainingModel.loss


def failing_loss(self, outputs, batch):
    if os.environ["RANK"] == "1" and batch["step"] == 3:
        raise ZeroDivisionError("a bug in rank 1")
    return loss(self, outputs, batch)


if __name__ == "__main__":
    LGMTrainingModel.loss = failing_loss  # type: ignore[method-assign]
    exit_on_user_error(lgm_scale.train.main)
