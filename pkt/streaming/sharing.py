"""How the ranks of a machine come by a teacher's weights: each reads all of them, and the page cache makes that fewer readings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pkt.streaming.units import spoken_size

Sharing: TypeAlias = Literal["once", "together", "apart"]

# Parts that have to stay in the page cache for ranks that go side by side: each computes one and reads the next ahead, and one
# rank may be a step behind another.
STEPS = 3


@dataclass(frozen=True)
class SharedReading:
    """What each rank holds, and what that leaves for the page cache; in bytes, known before any weight is read.

    device, host: of each rank, in its device's memory and in its machine's beside it; cache: on the machine that has least;
    weights: of the whole checkpoint, part: of the most that is read at once (a layer, or what follows the layers); passes: how
    often each rank reads it.
    """

    device: Sequence[int]
    host: Sequence[int]
    cache: int
    weights: int
    part: int
    passes: int

    @property
    def way(self) -> Sharing:
        """once: all of it stays in the page cache from its first reading on. together: a part stays for as long as ranks that go
        side by side want it, so that a machine reads as much as a rank. apart: each rank reads for itself."""
        if self.weights <= self.cache:
            return "once"
        return "together" if STEPS * self.part <= self.cache else "apart"

    def lines(self) -> list[str]:
        """What each rank holds, and how often the weights are read, in a line each."""
        beside = f" and {_range(self.host)} of the host" if any(self.host) else ""
        held = (
            f"{len(self.device)} ranks, each with its share of the seeds: each holds {_range(self.device)} of the device{beside}; "
            "the first one's sizes are shown below"
        )
        return [held, *([self._read()] if self.weights else [])]

    def _read(self) -> str:
        size, left = spoken_size(self.weights), spoken_size(self.cache)
        often = "once" if self.passes == 1 else "twice"
        if self.way == "once":
            return f"the weights are read once on each machine: {size} stay in the page cache, which has {left}"
        much = f"{size} are too much for the page cache, which has {left}"
        if self.way == "together":
            return (
                f"the weights are read {often} on each machine: {much}, but the ranks go side by side, and what one has just read "
                "is there for the others"
            )
        return (
            f"each rank reads the weights {often} from the disk: {much}, and what one has read would not stay there until the "
            "others want it; start fewer ranks on a machine, or let each hold less with --device-memory"
        )


def _range(sizes: Sequence[int]) -> str:
    least, most = spoken_size(min(sizes)), spoken_size(max(sizes))
    return least if least == most else f"{least} to {most}"
