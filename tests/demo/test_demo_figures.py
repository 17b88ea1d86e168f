"""From the rows of the demo's trainings to its figures and words: nothing is claimed that the rows do not say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pkt.demo.measuring import METHODS, OURS, settings
from pkt.demo.showing import sentences, table_of, verdict
from pkt.demo.summing import comparisons, goals, items, summed


def run(rng: Any, loss: float, right: float, general: float, rows: int = 60) -> dict[str, Any]:
    counts = rng.integers(10, 20, rows).tolist()
    rows_of = lambda mean: [(c * mean * rng.uniform(0.9, 1.1), c) for c in counts]  # noqa: E731
    return {"task": rows_of(loss), "match": (rng.random(rows) < right).tolist(), "general": rows_of(general)}


def demo(ours: tuple[float, float, float], others: tuple[float, float, float], seeds: int = 3) -> dict[str, Any]:
    """A summary in which the transplant reaches these figures and everything else those."""
    rng = np.random.default_rng(5)
    runs = {}
    for name in METHODS:
        figures = ours if name == OURS else others
        runs[name] = [{"after": run(rng, *figures)} for _ in range(seeds)]
        runs[name][0]["before"] = run(rng, 3.0 if name == OURS else 8.0, 0.0, 0.6)
    lineages = ("descendant", "descends"), ("student", "no lineage")
    summary: dict[str, Any] = {
        "seeds": seeds,
        "test_rows": 60,
        "general_rows": 60,
        "guess": {"answer": "7", "exact_match": 0.1},
        "models": {
            n: summed([{"after": run(rng, 8.0, 0.0, 0.5)}], alone=True) for n in ("teacher", "descendant", "student")
        },
        "methods": {n: {"lr": 0.01, "a_scale": 3.0, **summed(found)} for n, found in runs.items()},
        "lineage": {name: {"verdict": verdict} for name, verdict in lineages},
        "comparisons": comparisons(runs),
    }
    return {**summary, "goals": goals(summary)}


def test_figures_are_means_of_their_rows() -> None:
    found = run(np.random.default_rng(1), 2.0, 0.5, 1.0)
    nll = sum(loss for loss, _ in found["task"]) / sum(count for _, count in found["task"])
    summary = summed([{"after": found}])
    assert summary["nll"] == [nll]
    assert summary["exact_match"] == [sum(found["match"]) / 60]
    # Items are weighted so that their plain mean is the mean over tokens.
    assert items([{"after": found}], "task").mean() == pytest.approx(nll)


def test_what_is_better_is_said_to_be() -> None:
    summary = demo((0.2, 0.6, 0.7), (0.9, 0.1, 5.0))
    assert "it beats every control" in sentences(summary)[0]
    assert all(line.startswith(f"{OURS} beats ") for line in verdict(summary))
    assert summary["goals"]["after training met"]
    assert summary["goals"]["forgets less than every control"]
    assert "cannot be told from plain LoRA" in sentences(summary)[1]


@pytest.mark.parametrize(("ours", "says"), [((0.9, 0.1, 5.0), "cannot be told from"), ((1.8, 0.1, 9.0), "loses to")])
def test_what_is_not_is_not(ours: tuple[float, float, float], says: str) -> None:
    summary = demo(ours, (0.9, 0.1, 5.0))
    controls = [n for n, m in METHODS.items() if n != OURS and not m.stranger]
    assert f"it beats 0 of {len(controls)} controls, not " in sentences(summary)[0]
    assert all(f"{OURS} {says} " in line for line in verdict(summary))
    assert not summary["goals"]["after training met"]
    assert not summary["goals"]["forgets less than every control"]
    assert ("forgets more general text than wrong units and noise" in sentences(summary)[0]) == (says == "loses to")


def test_right_answers_that_stay_as_they_were_are_said_to_stay() -> None:
    summary = demo((0.2, 0.6, 0.7), (0.9, 0.1, 5.0))
    summary["models"]["descendant"]["exact_match"] = summary["methods"][OURS]["before"]["exact_match"] = 0.125
    assert "and leaves right answers at 12%; after" in sentences(summary)[0]
    summary["methods"][OURS]["before"]["exact_match"] = 0.5
    assert "and from 12% to 50% right answers; after" in sentences(summary)[0]


def test_one_seed_decides_nothing() -> None:
    summary = demo((0.2, 0.6, 0.7), (0.9, 0.1, 5.0), seeds=1)
    assert verdict(summary) == ["one training seed: no difference has a spread; give --seeds 2 or more"]
    assert not summary["goals"]["after training met"]


def test_the_table_has_a_row_for_every_model_and_method_and_the_tuning_one_for_each() -> None:
    head, rows = table_of(demo((0.2, 0.6, 0.7), (0.9, 0.1, 5.0)))
    assert len(rows) == 4 + len(METHODS)
    assert {len(row) for row in rows} == {len(head)}
    assert set(settings()) == set(METHODS)
