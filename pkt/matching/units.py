"""One-to-one matches of units by the cosines of their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """How well one kind of unit matches: mean cosine of what was matched, and what chance gives for this pair."""

    kind: str
    matched: int
    total: int
    cosine: float
    chance: float

    @property
    def closeness(self) -> float:
        """0 at chance, 1 for the same weights."""
        return (self.cosine - self.chance) / max(1e-6, 1 - self.chance)


def unit_rows(features: Tensor) -> Tensor:
    """Rows of length one; rows of zeros stay."""
    lengths: Tensor = features.norm(dim=1, keepdim=True).clamp_min(1e-20)
    return features / lengths


def cosines(teacher: Tensor, student: Tensor) -> Tensor:
    """[teacher's units, student's units] from their features [units, features]."""
    return unit_rows(teacher) @ unit_rows(student).t()


def assign(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's unit of each student's [s], -1 where the student has more, and the score of each [s].

    scores [t, s]. Units that are each other's best come first; the others are assigned so that the sum is largest
    (`scipy.optimize.linear_sum_assignment`).
    """
    from scipy.optimize import linear_sum_assignment

    teachers, students = scores.shape
    best = scores.argmax(0)
    mutual = scores.argmax(1)[best] == torch.arange(students)
    found = torch.where(mutual, best, torch.full_like(best, -1))
    free_t = torch.ones(teachers, dtype=torch.bool)
    free_t[found[mutual]] = False
    rest_t, rest_s = free_t.nonzero()[:, 0], (~mutual).nonzero()[:, 0]
    if len(rest_t) and len(rest_s):
        rows, cols = linear_sum_assignment(scores[rest_t][:, rest_s].numpy(), maximize=True)
        found[rest_s[torch.from_numpy(cols)]] = rest_t[torch.from_numpy(rows)]
    values = scores.gather(0, found.clamp_min(0)[None])[0]
    return found, torch.where(found >= 0, values, torch.zeros_like(values))


def table_cosines(tables: list[tuple[Tensor, Tensor]], rows: list[tuple[Tensor, Tensor]], block: int = 8192) -> Tensor:
    """Cosines [teacher's hidden units, student's] of the centred columns of the tables, one below the other.

    tables: (teacher's, student's) pairs [vocabulary, hidden]; rows: for each pair the rows that mean the same tokens. Summed in
    fp32 a block of rows at a time, so that no table is widened as a whole.
    """
    gram: Tensor | None = None
    norms: list[Tensor] = [torch.zeros(1), torch.zeros(1)]
    for pair, chosen in zip(tables, rows, strict=True):
        means = [_mean(table, index, block) for table, index in zip(pair, chosen, strict=True)]
        for begin in range(0, len(chosen[0]), block):
            t, s = (
                table[index[begin : begin + block]].float() - mean
                for table, index, mean in zip(pair, chosen, means, strict=True)
            )
            gram = t.t() @ s if gram is None else gram.addmm_(t.t(), s)
            norms = [norms[0] + t.square().sum(0), norms[1] + s.square().sum(0)]
    assert gram is not None
    return gram / norms[0].sqrt().clamp_min(1e-20)[:, None] / norms[1].sqrt().clamp_min(1e-20)


def _mean(table: Tensor, index: Tensor, block: int) -> Tensor:
    total = torch.zeros(table.shape[1])
    for begin in range(0, len(index), block):
        total += table[index[begin : begin + block]].float().sum(0)
    return total / max(1, len(index))


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [size, size]."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator))
    signed: Tensor = q * r.diagonal().sign()
    return signed
