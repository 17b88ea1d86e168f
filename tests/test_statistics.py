"""Comparisons over seeds × items: what scipy says where there is one kind of variance, and how often an interval is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pkt import PktError
from pkt.statistics import word_for
from pkt.studying import Comparison, compare, holm


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


def test_items_that_cluster_enter_as_their_groups() -> None:
    """Copies of an item add nothing: ten copies of each in a group are that one item, once clustered."""
    rng = np.random.default_rng(5)
    a, b = (rng.normal(0.2 * i, 1, (4, 12)) for i in (1, 0))
    single = compare(a, b)
    copied = compare(np.repeat(a, 10, 1), np.repeat(b, 10, 1), groups=np.repeat(np.arange(12), 10))
    assert (copied.mean, copied.error, copied.p) == pytest.approx((single.mean, single.error, single.p))
    assert compare(np.repeat(a, 10, 1), np.repeat(b, 10, 1)).error < single.error
    with pytest.raises(PktError, match="a group of each of 12 items"):
        compare(a, b, groups=np.zeros(12))


def test_clustered_intervals_cover_what_they_say() -> None:
    """57 subjects of 20 questions, a subject's level a method's own: 95% intervals hold zero in 91 to 98.5%, clustered."""
    rng = np.random.default_rng(11)
    groups = np.repeat(np.arange(57), 20)
    held = 0
    for _ in range(600):
        base = rng.normal(-1, 1.5, len(groups))

        def method(base: Any = base) -> Any:
            own = rng.normal(0, 0.4, 57)[groups]
            return answers(rng, 5, base + own)

        found = compare(method(), method(), groups=groups)
        held += found.low <= 0 <= found.high
    assert 0.91 * 600 <= held <= 0.985 * 600


def test_what_a_comparison_would_have_seen() -> None:
    """A true difference of `detectable` is seen four times in five; so is one that `seeds_for` gives enough seeds for."""
    rng = np.random.default_rng(13)

    def found(seeds: int, shift: float) -> Any:
        noise = [rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 0.5, (seeds, 100)) for _ in range(2)]
        return compare(noise[0] + shift, noise[1])

    typical = [found(6, 0.0) for _ in range(400)]
    shift = float(np.median([c.detectable for c in typical]))
    seen = sum(found(6, shift).p < 0.05 for _ in range(400)) / 400
    assert 0.7 < seen < 0.9
    needed = int(np.median([c.seeds_for(shift / 2) for c in typical]))
    assert 15 < needed < 40
    assert 0.65 < sum(found(needed, shift / 2).p < 0.05 for _ in range(400)) / 400 < 0.92
    # Ten items never tell a hundredth of their spread.
    few = compare(rng.normal(0, 1, 10) + rng.normal(0, 0.01, (5, 10)), np.zeros((5, 10)))
    assert few.seeds_for(0.01) is None


def test_words() -> None:
    def word(mean: float, error: float, adjusted: float, **options: Any) -> str:
        made = Comparison(mean, 0, 0, 0, error, 20.0)
        return word_for(made, adjusted, **{"margin": 0.1, "lower": True, "seeds": 5, "planned": 5, **options})

    assert word(-0.5, 0.1, 0.01) == "better"
    assert word(-0.5, 0.1, 0.01, lower=False) == "worse"
    assert word(0.5, 0.1, 0.01) == "worse"
    assert word(0.01, 0.01, 0.9) == "the same"
    assert word(0.01, 0.2, 0.9) == "cannot tell"
    assert word(-0.5, 0.1, 0.01, seeds=4) == "not yet"
    assert word(-0.5, 0.1, 0.01, seeds=2, planned=2) == "not yet"
