"""Commands as a user types them, without a new interpreter: arguments, status, what was said."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from lgm_scale.errors import exit_on_user_error


class Said(NamedTuple):
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


def typed(main: Callable[[], int | None], *args: str | Path) -> Said:
    """Run a command's `main` with these arguments, up to its end."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["command", *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            exit_on_user_error(main)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    return Said(status, out.getvalue(), err.getvalue())


def refusal(main: Callable[[], int | None], *args: str | Path) -> str:
    """What a command says that ends with a user error."""
    said = typed(main, *args)
    assert said.status == 2, said
    assert "Traceback" not in said.err + said.out
    return said.err
