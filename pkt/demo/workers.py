"""Processes to measure the demo's methods in, none of which outlives it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch


@contextlib.contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """A process for each core, since models this small do not fill two from one; none outlives the block, however it is left.

    This process has one thread meanwhile: threads of two processes that wait for each other's cores take many times as long.
    """
    others = multiprocessing.active_children()
    with one_thread(), ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), _begin_work) as pool:
        try:
            yield pool
        except BaseException:
            # Leaving the pool waits for its jobs, minutes for nothing.
            for worker in multiprocessing.active_children():
                if worker not in others:
                    worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _begin_work() -> None:
    # Ctrl-C ends a worker without a word of its own, and so does the end of its parent, for whose next job it would wait for ever.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
