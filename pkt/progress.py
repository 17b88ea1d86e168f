"""One progress bar for everything that may take more than two seconds, on stderr, with the time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

DELAY = 2.0
_quiet = False


def silence(wanted: bool = True) -> None:
    """No bar and no word of what is going on from here on (`--quiet`); results, warnings and errors are said all the same."""
    global _quiet
    _quiet = wanted


def is_silent() -> bool:
    return _quiet


def tell(*lines: str) -> None:
    """Lines on stderr of what is going on."""
    for text in () if _quiet else lines:
        print(text, file=sys.stderr)


@contextlib.contextmanager
def bar(what: str, total: int, *, unit: str = "", shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield `advance(done)`. The bar appears after `DELAY` seconds, so quick work prints nothing; `shown=False`: never."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = progress.add_task(what, total=total)
    begin, started = time.perf_counter(), False

    def advance(done: int) -> None:
        nonlocal started
        if shown and not _quiet and not started and done < total and time.perf_counter() - begin > DELAY:
            progress.start()
            started = True
        progress.update(task, completed=done)

    try:
        yield advance
    finally:
        if started:
            progress.stop()
