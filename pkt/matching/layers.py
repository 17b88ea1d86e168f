"""Which teacher layer each student layer is: the increasing choice with the largest sum of matches."""

from __future__ import annotations

import torch
from torch import Tensor


def increasing(scores: Tensor) -> list[int]:
    """The teacher layer of each student layer, from matches [teacher's layers, student's].

    Strictly increasing, the largest sum, by dynamic programming; a student with more layers than its teacher (one that was
    stretched) gets the best of each.
    """
    deep, layers = scores.shape
    if layers > deep:
        return [int(i) for i in scores.argmax(0)]
    best = torch.full((layers, deep), -torch.inf, dtype=torch.float64)
    origin = torch.zeros(layers, deep, dtype=torch.int64)
    best[0] = scores[:, 0]
    for j in range(1, layers):
        # The largest of what ends before each layer, and where.
        before, where = best[j - 1].cummax(0)
        best[j, 1:] = before[:-1] + scores[1:, j]
        origin[j, 1:] = where[:-1]
    at = int(best[-1].argmax())
    found = [at]
    for j in range(layers - 1, 0, -1):
        at = int(origin[j, at])
        found.append(at)
    return found[::-1]
