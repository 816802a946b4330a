"""Everything of a run's state that is no tensor, as plain data for a manifest."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from composer.core import State

from lgm_scale.parallel.composer_internals import dataset_position, restore_dataset_position

# A scheduler's state as torch tells it holds its functions of time. They are no plain data, and
# come from the configuration again.
_FUNCTIONS = "lr_lambdas"


def read_scalars(state: State) -> dict[str, Any]:
    """Times, place in the data, learning rates and what callbacks remember, ready for JSON.

    Random numbers need no place: every draw is keyed by seed, step and sample.

    Every rank must call it: some callbacks agree over ranks before they hand out their state.
    """
    timestamp = {
        key: value.total_seconds() if isinstance(value, timedelta) else value
        for key, value in state.timestamp.state_dict().items()
    }
    callbacks = {type(c).__name__: c.state_dict() for c in state.callbacks}
    return {
        "timestamp": timestamp,
        "dataset": dataset_position(state),
        "learning_rates": [group["lr"] for group in state.optimizers[0].param_groups],
        "schedulers": [
            {key: value for key, value in scheduler.state_dict().items() if key != _FUNCTIONS}
            for scheduler in state.schedulers
        ],
        "callbacks": {name: values for name, values in callbacks.items() if values},
    }


def load_scalars(scalars: dict[str, Any], state: State) -> None:
    """Put what `read_scalars` has told back into Composer's state."""
    times = {
        key: timedelta(seconds=value) if key.endswith("_wct") and value is not None else value
        for key, value in scalars["timestamp"].items()
    }
    state.timestamp.load_state_dict(times)
    if scalars["dataset"] is not None:
        restore_dataset_position(state, scalars["dataset"])
    for group, rate in zip(
        state.optimizers[0].param_groups, scalars["learning_rates"], strict=True
    ):
        group["lr"] = rate
    for scheduler, values in zip(state.schedulers, scalars["schedulers"], strict=True):
        scheduler.load_state_dict({**scheduler.state_dict(), **values})
    for callback in state.callbacks:
        if type(callback).__name__ in scalars["callbacks"]:
            callback.load_state_dict(scalars["callbacks"][type(callback).__name__])


def renew_learning_rates(state: State) -> None:
    """Compute the next step's learning rates from the configuration, not from the loaded state.

    For a run whose schedule was changed on purpose; in any other they are the same.
    """
    groups = state.optimizers[0].param_groups
    for scheduler in state.schedulers:
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        functions: Any = getattr(scheduler, _FUNCTIONS)
        for group, base, function in zip(groups, scheduler.base_lrs, functions, strict=True):
            group["lr"] = base * function(scheduler.last_epoch)
