"""All commands in one application, and how it ends."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import warnings
from typing import TextIO

from pkt.cli import extracting, shrinking, starting, students, studying, teaching, transplanting, viewing
from pkt.cli.application import app, err_console, launched, state
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
    """Run the command that was typed; a fault that the user can mend is one red line, of several ranks too."""
    state.stopped = "stopped"
    warnings.showwarning = _note
    with contextlib.ExitStack() as stack:
        try:
            if launched():
                _join(stack)
            app()
        except (PktError, OSError) as error:
            if state.debug:
                raise
            _tell(error)
            sys.exit(1)
        except SystemExit as done:
            if done.code in (130, 143) and (
                state.ranks is None or state.ranks.speaks()
            ):  # Ctrl-C, by typer, and SIGTERM
                err_console.print(state.stopped, style="red")
            raise


def _join(stack: contextlib.ExitStack) -> None:
    """Become one of the ranks that torchrun started; the first one speaks."""
    from pkt import files, ranks

    # Whoever is stopped from here on has something to put in order.
    files.begun = True
    state.ranks = stack.enter_context(ranks.joined())
    state.ranks.give_up = _give_up
    if not state.ranks.first:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        warnings.simplefilter("ignore")


def _tell(error: Exception) -> None:
    if state.ranks is not None:
        from pkt.ranks import OtherRankError

        if isinstance(error, OtherRankError):
            # Whoever started the ranks stops all of them when one ends, and the other has something to say.
            time.sleep(1)
            return
        if not state.ranks.speaks():
            return
    err_console.print("error:", style="bold red", end=" ")
    err_console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)


def _give_up(error: Exception) -> None:
    """End this process at once: the other ranks, at work, do not hear that it failed."""
    _tell(error)
    os._exit(1)
