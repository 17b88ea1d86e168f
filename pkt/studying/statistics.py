"""Whether one method beats another, from training seeds × test items; and the same for several controls at once.

Both the seeds and the items are samples, so the variance of a mean difference has a part of each (Clark 1973's quasi-F as an
interval). Items alone, or the few seeds alone, would call differences of nothing certain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pkt.errors import PktError


@dataclass(frozen=True)
class Comparison:
    """Mean of a − b, its interval, the two-sided p, the standard error and its degrees of freedom."""

    mean: float
    low: float
    high: float
    p: float
    error: float
    freedom: float


def compare(a: Any, b: Any, *, level: float = 0.95) -> Comparison:
    """The mean of a − b over training seeds and test items, [seeds, items] each, paired in both.

    Var = (MS_seeds + MS_items − MS_rest) / (k n), never below either part, with Satterthwaite's degrees of freedom. Raises
    `PktError` for fewer than two seeds or items, and shapes that differ.
    """
    from scipy import stats

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 2 or min(a.shape) < 2:
        raise PktError(
            f"compare needs two arrays [seeds, items] of one shape, at least 2 x 2; given {list(a.shape)} and {list(b.shape)}"
        )
    d = a - b
    k, n = d.shape
    mean, by_seed, by_item = d.mean(), d.mean(1), d.mean(0)
    seeds, items = n * by_seed.var(ddof=1), k * by_item.var(ddof=1)
    rest = ((d - by_seed[:, None] - by_item + mean) ** 2).sum() / ((k - 1) * (n - 1))
    total = max(seeds + items - rest, seeds, items)
    if total == 0:
        return Comparison(float(mean), float(mean), float(mean), float(mean == 0), 0.0, math.inf)
    freedom = total**2 / (seeds**2 / (k - 1) + items**2 / (n - 1) + rest**2 / ((k - 1) * (n - 1)))
    error = math.sqrt(total / (k * n))
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return Comparison(float(mean), float(mean - half), float(mean + half), p, error, float(freedom))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: all that stay below a level hold at it together."""
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return [float(v) for v in adjusted]
