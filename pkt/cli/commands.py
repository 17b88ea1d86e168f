"""All commands in one application, and how it ends."""

from __future__ import annotations

import sys
import warnings
from typing import TextIO

from pkt.cli import extracting, shrinking, starting, students, studying, teaching, transplanting, viewing
from pkt.cli.application import app, err_console, state
from pkt.errors import PktError, PktWarning

__all__ = [
    "app",
    "extracting",
    "run",
    "shrinking",
    "starting",
    "students",
    "studying",
    "teaching",
    "transplanting",
    "viewing",
]


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of pkt's is a line, as an error is; another library's is as it always is."""
    if issubclass(category, PktWarning):
        err_console.print(f"note: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    else:
        err_console.print(
            warnings.formatwarning(message, category, filename, lineno), end="", highlight=False, markup=False
        )


def run() -> None:
    """Run the command that was typed; a fault that the user can mend is one red line."""
    state.stopped = "stopped"
    warnings.showwarning = _note
    try:
        app()
    except (PktError, OSError) as error:
        if state.debug:
            raise
        err_console.print("error:", style="bold red", end=" ")
        err_console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as done:
        if done.code in (130, 143):  # Ctrl-C, by typer, and SIGTERM
            err_console.print(state.stopped, style="red")
        raise
