"""Which teacher layer each student layer is: the increasing choice with the largest sum of matches."""

from __future__ import annotations

import torch
from torch import Tensor


def increasing(scores: Tensor, least: float = -torch.inf) -> list[int]:
    """The teacher layer of each student layer, from matches [teacher's layers, student's].

    Strictly increasing, the largest sum, by dynamic programming; a layer whose match would not be above `least` has none, -1.
    A student with more layers than its teacher (one that was stretched) gets the best of each.
    """
    deep, layers = scores.shape
    if layers > deep:
        best, nearest = scores.max(0)
        return [int(i) if value > least else -1 for i, value in zip(nearest, best, strict=True)]
    # What each match is worth beyond none; without a bound, so much that as many as possible are made.
    gain = scores - least if least > -torch.inf else scores + 2 * deep * scores.abs().max() + 1
    total = torch.zeros(deep + 1, layers + 1, dtype=torch.float64)
    for j in range(1, layers + 1):
        for i in range(1, deep + 1):
            total[i, j] = max(total[i - 1, j], total[i, j - 1], total[i - 1, j - 1] + gain[i - 1, j - 1])
    found = [-1] * layers
    i, j = deep, layers
    while i and j:
        if total[i, j] == total[i - 1, j]:
            i -= 1
        elif total[i, j] == total[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            found[j] = i
    return found
