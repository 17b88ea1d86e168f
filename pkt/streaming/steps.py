"""Steps of a reading that ranks take together: what makes one of them begin again makes all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pkt import ops
from pkt.ranks import Ranks


class OneByOneError(Exception):
    """Samples cannot share a batch in this model; begin again with one sample a micro-batch."""


class NoMemoryError(Exception):
    """A micro-batch was too large for some rank's memory; all begin again with smaller ones."""


@contextlib.contextmanager
def in_step(ranks: Ranks) -> Iterator[None]:
    """Inside, these two errors of one rank are raised on all of them, at the end of the step."""
    if ranks.alone:
        yield
        return
    again: str | None = None
    try:
        yield
    except OneByOneError:
        again = ""
    except RuntimeError as error:
        if not ops.out_of_memory(error):
            raise
        again = str(error)
    told = ranks.all_of(again)
    if "" in told:
        raise OneByOneError
    if any(told):
        raise NoMemoryError(next(filter(None, told)))
