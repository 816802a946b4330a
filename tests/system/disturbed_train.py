"""The training command, disturbed: DISTURB=bug or kill in rank 1, or a machine is taken away."""

from __future__ import annotations

import os
import signal
import threading

import lgm_scale.train
from lgm_scale.errors import exit_on_user_error
from lgm_scale.families.lgm.training import LGMTrainingModel
from lgm_scale.training.stopping import StopRequest

LAUNCH = ("-m", "composer.cli.launcher", "-n", "2", "tests/system/disturbed_train.py")
RANK_1_STEP, TAKEN_STEP = 3, 10

loss, on_signal = LGMTrainingModel.loss, StopRequest._on_signal
told = threading.Event()


def note_signal(self, number, frame):
    on_signal(self, number, frame)
    told.set()


def disturbed_loss(self, outputs, batch):
    disturb = os.environ["DISTURB"]
    if os.environ["RANK"] == "1" and batch["step"] == RANK_1_STEP:
        if disturb == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if disturb == "bug":
            raise ZeroDivisionError("a bug in rank 1")
    if disturb == "taken" and batch["step"] == TAKEN_STEP:
        if os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGTERM)  # the launcher, which tells all ranks
        assert told.wait(600)
    return loss(self, outputs, batch)


if __name__ == "__main__":
    LGMTrainingModel.loss = disturbed_loss  # type: ignore[method-assign]
    StopRequest._on_signal = note_signal  # type: ignore[method-assign]
    exit_on_user_error(lgm_scale.train.main)
