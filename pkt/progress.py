"""One progress bar for everything that may take more than two seconds, on stderr, with the time left."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

DELAY = 2.0
_quiet = False
_alone = threading.Lock()  # one bar at a time: a load inside something that counts is a part of its step


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
    if not shown or _quiet or not _alone.acquire(blocking=False):
        yield lambda done: None
        return
    try:
        with _drawn(what, total, unit) as advance:
            yield advance
    finally:
        _alone.release()


@contextlib.contextmanager
def _drawn(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
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
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = progress.add_task(what, total=total)
    # Not at a step's end: the first one alone may take long.
    late = threading.Timer(DELAY, progress.start)
    late.daemon = True
    late.start()
    try:
        yield lambda done: progress.update(task, completed=done)
    finally:
        late.cancel()
        late.join()
        if progress.live.is_started:
            progress.stop()
