"""Whether one method beats another, from training seeds × test items; and the same for several controls at once.

Both the seeds and the items are samples, so the variance of a mean difference has a part of each (Clark 1973's quasi-F as an
interval). Items alone, or the few seeds alone, would call differences of nothing certain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pkt.errors import PktError

Word = Literal["better", "worse", "the same", "cannot tell", "not yet"]
FEWEST = 3  # seeds below which nothing is said of trainings


@dataclass(frozen=True)
class Comparison:
    """Mean of a − b, its interval, the two-sided p, the standard error and its degrees of freedom.

    parts: of the squared error, what further seeds make smaller (at one seed), and what only further items do.
    """

    mean: float
    low: float
    high: float
    p: float
    error: float
    freedom: float
    parts: tuple[float, float] = (0.0, 0.0)

    def interval(self, level: float) -> tuple[float, float]:
        half = _quantile((1 + level) / 2, self.freedom) * self.error
        return self.mean - half, self.mean + half

    @property
    def detectable(self) -> float:
        """The true difference that would be seen at 5% four times in five."""
        return (_quantile(0.975, self.freedom) + _quantile(0.8, self.freedom)) * self.error

    def seeds_for(self, difference: float, most: int = 1000) -> int | None:
        """How many seeds would see a true difference of this size four times in five; None: these items do not suffice for it."""
        by_seed, by_item = self.parts
        for k in range(2, most + 1):
            error = math.sqrt(by_seed / k + by_item)
            freedom = self.freedom if by_item > by_seed / k else k - 1
            if (_quantile(0.975, freedom) + _quantile(0.8, freedom)) * error <= abs(difference):
                return k
        return None


def word_for(found: Comparison, adjusted: float, *, margin: float, lower: bool, seeds: int, planned: int) -> Word:
    """What a comparison says at 5%: better, worse, the same (the 90% interval lies within ±margin), or cannot tell.

    lower: whether less is better. Fewer seeds than planned, or than `FEWEST`: not yet.
    """
    if seeds < planned or seeds < FEWEST:
        return "not yet"
    if adjusted < 0.05:
        return "better" if (found.mean < 0) == lower else "worse"
    low, high = found.interval(0.9)
    return "the same" if -margin < low and high < margin else "cannot tell"


def _quantile(share: float, freedom: float) -> float:
    from scipy import stats

    return float(stats.norm.ppf(share) if math.isinf(freedom) else stats.t.ppf(share, freedom))


def _grouped(d: Any, groups: Any) -> Any:
    """[seeds, groups]: sums over each group, scaled so that their mean is the items'."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    if index.shape != d.shape[1:] or index.max() < 1:
        raise PktError(f"groups must name a group of each of {d.shape[1]} items, at least two in all")
    sums = np.zeros((d.shape[0], index.max() + 1))
    np.add.at(sums.T, index, d.T)
    return sums * (sums.shape[1] / d.shape[1])


def compare(a: Any, b: Any, *, level: float = 0.95, groups: Any = None) -> Comparison:
    """The mean of a − b over training seeds and test items, [seeds, items] each, paired in both.

    Var = (MS_seeds + MS_items − MS_rest) / (k n), never below either part, with Satterthwaite's degrees of freedom. groups: of each
    item, where items cluster (MMLU's subjects); they enter as the sums of their items. Raises `PktError` for fewer than two
    seeds, items or groups, and shapes that differ.
    """
    from scipy import stats

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 2 or min(a.shape) < 2:
        raise PktError(
            f"compare needs two arrays [seeds, items] of one shape, at least 2 x 2; given {list(a.shape)} and {list(b.shape)}"
        )
    d = a - b if groups is None else _grouped(a - b, groups)
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
    # Of total / (k n): what k divides, and what is left with ever more seeds.
    by_item = max(0.0, (items - rest) / (k * n))
    parts = (max(0.0, total / n - k * by_item), by_item)
    return Comparison(float(mean), float(mean - half), float(mean + half), p, error, float(freedom), parts)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: all that stay below a level hold at it together."""
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return [float(v) for v in adjusted]
