"""Signs of life that ranks give each other: a machine that vanishes closes no connection, so only its silence tells."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Callable

import torch.distributed.distributed_c10d as c10d

# Seconds between two signs of life; and how many may be missed, 5 minutes' worth, before a rank is given up.
BEAT, MISSES = 10.0, 30
DONE = "done"


class Heartbeat:
    """This rank's signs of life in a store that all ranks see, and a watch on the next rank's, beside the work until `close`.

    They come from threads of their own, so that a rank that merely computes is not taken for one that is gone: torch computes
    without Python's lock. What is missed is counted in looks and not by the clock: ranks that are stopped together, as by Ctrl-Z,
    go on together. on_silence: told, in a thread, of the next rank when it has missed too many, or of None when the store answers
    no longer.

    A connection to the store that is closed ends the watch, and nothing else: so it is when another rank is done, and where one was
    killed its other connections tell.
    """

    def __init__(self, store: c10d.Store, rank: int, world: int, on_silence: Callable[[int | None], None]) -> None:
        self.store, self.rank, self.next, self.on_silence = store, rank, (rank + 1) % world, on_silence
        # What does not answer is told of before that.
        store.set_timeout(datetime.timedelta(seconds=2 * BEAT * MISSES))
        self._looks, self._seen = 0, b""
        self._ended = threading.Event()
        # Two of them: one that waits for a store that is silent tells nobody.
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """This rank is done: from now on nobody misses it."""
        self._ended.set()
        for thread in self._threads:
            thread.join(BEAT)

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):
            while not self._ended.is_set():
                self.store.set(str(self.rank), str(self._looks))
                self._seen = self.store.get(str(self.next))
                self._looks += 1
                self._ended.wait(BEAT)
            self.store.set(str(self.rank), DONE)
        self._ended.set()

    def _watch(self) -> None:
        missed, answered, before = 0, 0, (0, b"")
        while missed < MISSES:
            if self._ended.wait(BEAT):
                return
            looks, seen = self._looks, self._seen
            if seen != before[1] or (seen == DONE.encode() and looks > before[0]):
                missed, answered = 0, looks
            else:
                missed += 1
            before = looks, seen
        self.on_silence(self.next if self._looks > answered + 1 else None)
