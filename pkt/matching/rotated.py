"""A student whose hidden units are a rotation of its teacher's, as SliceGPT leaves them: the rotation by the tables."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 8192


def procrustes(
    tables: list[tuple[Tensor, Tensor]], rows: list[tuple[Tensor, Tensor]], generator: torch.Generator
) -> tuple[Tensor, float, float]:
    """(the orthonormal R [teacher's hidden, student's] that brings the tables E_t R nearest to E_s, their cosine, chance).

    Exact for a whole rotation and for principal directions of the teacher's tables, which slicing keeps; near for others.
    Chance: the cosine for rows that are paired at random. Tables and rows as in `pkt.matching.units.table_cosines`; each table
    counts alike.
    """
    (teachers, students) = (tables[0][side].shape[1] for side in (0, 1))
    cross, wrong, own = (torch.zeros(teachers, n) for n in (students, students, teachers))
    for (t, s), (i, j) in zip(tables, rows, strict=True):
        a, b = t[i[:_ROWS]].float(), s[j[:_ROWS]].float()
        a, b = a / a.norm(), b / b.norm()
        cross += a.t() @ b
        wrong += a.t() @ b[torch.randperm(len(b), generator=generator)]
        own += a.t() @ a

    def fit(product: Tensor) -> tuple[Tensor, float]:
        u, values, vh = torch.linalg.svd(product, full_matrices=False)
        turn = u @ vh
        size = (turn * (own @ turn)).sum().sqrt() * len(tables) ** 0.5
        return turn, float(values.sum() / size)

    turn, cosine = fit(cross)
    return turn, cosine, fit(wrong)[1]
