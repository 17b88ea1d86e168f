"""The rows of every step shared out among ranks, so that a step has its number of rows whatever theirs is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Sampler

from pkt.ranks import Ranks
from pkt.seeds import IGNORE, Example


class RowsOfRank(Sampler[list[int]]):
    """Micro-batches of one rank: of each step every `world`-th row of those that one process would take, in the same order.

    rows: of a step; at_once: of a micro-batch, at most. All ranks have as many micro-batches in every step; one without a row is
    [~i] of some row i, which counts for nothing (`MaybeEmpty`).
    """

    def __init__(self, order: Any, rows: int, at_once: int, ranks: Ranks) -> None:
        self.order, self.rows, self.ranks = order, rows, ranks
        self.micro = micro_batches(rows, at_once, ranks.world)
        self.batch_sampler = order  # by this name the Trainer looks for what has epochs

    def __len__(self) -> int:
        return self.micro * math.ceil(len(self.order) / self.rows)

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(self.order)
        while step := list(itertools.islice(order, self.rows)):
            mine = step[self.ranks.rank :: self.ranks.world]
            for place in range(self.micro):
                yield mine[place :: self.micro] or [~step[0]]


def micro_batches(rows: int, at_once: int, world: int) -> int:
    """Of each rank in a step."""
    return math.ceil(math.ceil(rows / world) / at_once)


class MaybeEmpty(Sequence[Any]):
    """Rows (examples, or pairs with one in front); row ~i is row i without a token that counts."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if index >= 0:
            return self.rows[index]
        row = self.rows[~index]
        return _silent(row) if isinstance(row, Example) else (_silent(row[0]), None)


def _silent(row: Example) -> Example:
    return replace(row, labels=[IGNORE] * len(row.labels))
