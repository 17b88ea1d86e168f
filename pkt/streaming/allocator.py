"""The C library's allocator while a transfer runs on a CPU, so that it takes no more than was planned."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


@contextlib.contextmanager
def exact_memory() -> Iterator[None]:
    """Inside, memory that is freed goes back to the system at once, so that what a run takes is what it uses.

    glibc raises the size from which a block has pages of its own with every such block that is freed, up to 32 MiB; smaller
    ones then leave holes in its heaps that differ from run to run, a quarter of the peak here and there. Other C libraries
    have no such option, or need none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    # Below it are the blocks that small work comes and goes in: those are better had again than mapped again.
    mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    mallopt(_M_TRIM_THRESHOLD, 4 << 20)
    try:
        yield
    finally:
        # Where glibc's own rule ends.
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def give_back() -> None:
    """Return what small freed blocks left in the C library's heaps to the system: between the backward pass and the choosing
    of regions it is a quarter of the peak, since what a matrix library keeps lies scattered among them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
