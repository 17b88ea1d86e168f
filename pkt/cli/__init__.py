"""The command line: a thin skin over pkt's functions. Results go to stdout, progress and errors to stderr.

This file imports next to nothing, so that a signal has somewhere to go before the rest, half of it torch's, is there.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any


def main() -> None:
    """Entry point: one red line for what the user can mend, exit code 1; 130 for Ctrl-C, 143 for SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        from pkt.cli.commands import run

        run()
    finally:
        # Of several ranks one has said what there was to say, and torchrun stops the others.
        last = _leave if os.environ.get("WORLD_SIZE", "1") == "1" else _quit
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, last)


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave through every `finally`; but at once while nothing has been begun.

    An exception in the middle of an import, torch's above all, would be swallowed, leave half a module behind for whoever
    imports it next, or end in a crash.
    """
    if not getattr(sys.modules.get("pkt.files"), "begun", False):
        _leave(number, frame)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")
    _quit(number, frame)


def _quit(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def __getattr__(name: str) -> Any:
    if name == "app":
        from pkt.cli.commands import app

        return app
    raise AttributeError(f"module 'pkt.cli' has no attribute {name!r}")
