"""When a state is saved: every so often, at the end, and when somebody asks the run to stop."""

from __future__ import annotations

import re
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger

from lgm_scale.checkpoint.checkpointer import Checkpointer
from lgm_scale.training.stopping import StopRequest


class StateSaver(Callback):
    """Save at step and epoch boundaries.

    Composer's events come in this order: `batch_end` (the moving average moves, ranks agree
    whether to stop), `batch_checkpoint`, `epoch_end`, `epoch_checkpoint`. So a state that is saved
    here has all of a step.

    Args:
        checkpointer: Bound to the model, and begun.
        interval: `100ba`: after every hundredth step; `1ep`: at the end of every epoch.
        stop: Whoever asks for it gets a state, and the run ends there.
        companions: Small files to go beside the states, in object storage.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        interval: str,
        stop: StopRequest,
        companions: dict[str, Path] | None = None,
    ) -> None:
        match = re.fullmatch(r"(\d+)(ba|ep)", interval)
        assert match, "checked by lgm_scale.config.rules"
        self.checkpointer = checkpointer
        self.every, self.unit = int(match[1]), match[2]
        self.stop = stop
        stop.tell = checkpointer.parts_done
        self.companions = companions
        self._saved_step = -1

    def fit_start(self, state: State, logger: Logger) -> None:
        """Note the step of the state that was loaded: it needs no second copy."""
        self._saved_step = state.timestamp.batch.value

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Go on with the last save; save after a step that is due, or if the run is to stop."""
        self.checkpointer.proceed(self.stop.least)
        due = self.unit == "ba" and state.timestamp.batch.value % self.every == 0
        self._save_if(due or self.stop.agreed, state)
        if self.stop.agreed:
            state.stop_training()

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save after an epoch that is due."""
        self._save_if(self.unit == "ep" and state.timestamp.epoch.value % self.every == 0, state)

    def _save_if(self, due: bool, state: State) -> None:
        assert state.max_duration is not None
        step, ended = state.timestamp.batch.value, state.timestamp >= state.max_duration
        if (due or ended) and step != self._saved_step:
            self.checkpointer.save(state, self.companions)
            self._saved_step = step
