"""Comparisons over seeds × items: what scipy says where there is one kind of variance, and how often an interval is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pkt import PktError
from pkt.studying import compare, holm


@pytest.mark.parametrize("axis", [0, 1])
def test_one_kind_of_variance_is_scipys_paired_t(axis: int) -> None:
    """Where all items (or all seeds) say the same, what is left is a t test over the seeds (or the items)."""
    from scipy import stats

    rng = np.random.default_rng(3)
    a, b = (np.broadcast_to(rng.normal(0.3 * i, 1, (6, 1)), (6, 40)) for i in (1, 0))
    given = (a, b) if axis == 0 else (a.T, b.T)
    expected = stats.ttest_rel(a[:, 0], b[:, 0])
    low, high = expected.confidence_interval(0.95)
    found = compare(*given)
    assert (found.mean, found.p, found.freedom) == pytest.approx((a.mean() - b.mean(), expected.pvalue, 5))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_both_kinds_by_hand() -> None:
    """2 × 3: MS_seeds 6·¼, MS_items 2·1, MS_rest 1/2·(…) written out."""
    a = np.array([[1.0, 2.0, 4.0], [2.0, 3.0, 3.0]])
    found = compare(a, np.zeros_like(a))
    seeds, items = 3 * np.var([7 / 3, 8 / 3], ddof=1), 2 * np.var([1.5, 2.5, 3.5], ddof=1)
    residual = a - a.mean(1, keepdims=True) - a.mean(0) + 2.5
    rest = (residual**2).sum() / 2
    total = max(seeds + items - rest, seeds, items)
    assert (seeds, items, rest) == pytest.approx((1 / 6, 2.0, 2 / 3))
    assert found.error == pytest.approx((total / 6) ** 0.5)
    assert found.freedom == pytest.approx(total**2 / (seeds**2 / 1 + items**2 / 2 + rest**2 / 2))


def test_no_variance_at_all() -> None:
    same = np.ones((3, 4))
    assert (compare(same, same).p, compare(2 * same, same).p) == (1.0, 0.0)


@pytest.mark.parametrize("shapes", [((1, 9), (1, 9)), ((3, 9), (3, 8)), ((9,), (9,))])
def test_what_cannot_be_compared_is_refused(shapes: Any) -> None:
    with pytest.raises(PktError, match="at least 2 x 2"):
        compare(*(np.zeros(s) for s in shapes))


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def answers(rng: Any, seeds: int, base: Any) -> Any:
    """0/1 answers: an item's difficulty, shared by two methods or their own, each training's level, and chance."""
    items = base + rng.normal(0, 0.5, len(base))
    level = rng.normal(0, 0.15, (seeds, 1))
    z = items + level + rng.normal(0, 0.5, (seeds, len(base)))
    return (rng.random(z.shape) < 1 / (1 + np.exp(-z))).astype(float)


def losses(rng: Any, seeds: int, base: Any) -> Any:
    return np.exp(base / 2) * (1 + rng.normal(0, 0.05, (seeds, 1))) + rng.gamma(1, 0.2, (seeds, len(base)))


@pytest.mark.parametrize("draw", [answers, losses])
@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_cover_what_they_say(draw: Any, seeds: int) -> None:
    """Two methods of the same truth: 95% intervals hold zero in 91 to 98.5% of the simulated comparisons."""
    rng = np.random.default_rng(7 + seeds)
    held = 0
    for _ in range(1000):
        base = rng.normal(-1, 1.5, 200)
        found = compare(draw(rng, seeds, base), draw(rng, seeds, base))
        held += found.low <= 0 <= found.high
    assert 910 <= held <= 985
