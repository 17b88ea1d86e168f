"""From rows to figures: means of each training, and the transplant against every control, seeds × items."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from pkt.demo.measuring import METHODS, OURS
from pkt.statistics import compare, holm

Runs = dict[str, list[dict[str, Any]]]  # method -> its trainings, by row
LEVEL = 0.95


def summed(runs: list[dict[str, Any]], *, alone: bool = False) -> dict[str, Any]:
    """Figures of each training, and their means; of the start before it, as the first training found it. alone: one value each."""
    values = [_figures(run["after"]) for run in runs]
    if alone:
        return values[0]
    found: dict[str, Any] = {name: [v[name] for v in values] for name in values[0]}
    found |= {f"{name}_mean": statistics.mean(v[name] for v in values) for name in values[0]}
    if "before" in runs[0]:
        found["before"] = _figures(runs[0]["before"])
    return found


def _figures(rows: dict[str, list[Any]]) -> dict[str, float]:
    def nll(name: str) -> float:
        losses, counts = zip(*rows[name], strict=True)
        return float(sum(losses) / sum(counts))

    return {"nll": nll("task"), "exact_match": sum(rows["match"]) / len(rows["match"]), "general": nll("general")}


def items(runs: list[dict[str, Any]], name: str) -> Any:
    """[seeds, items] whose mean over items is the figure of each training: NLL a token for losses, the share right for matches."""
    if name == "match":
        return np.array([run["after"]["match"] for run in runs], np.float64)
    losses, counts = (np.array([[row[i] for row in run["after"][name]] for run in runs]) for i in (0, 1))
    return losses * losses.shape[1] / counts.sum(1, keepdims=True)


def comparisons(runs: Runs) -> list[dict[str, Any]]:
    """The transplant minus every control of the descendant, and the paper's window minus plain LoRA on each student.

    p values of one figure against all controls are adjusted together (Holm).
    """
    if min(map(len, runs.values())) < 2:
        return []
    ours = [(OURS, name) for name, method in METHODS.items() if name != OURS and not method.stranger]
    paper = [("the paper's window", "plain LoRA"), ("stranger: the paper's window", "stranger: plain LoRA")]
    found = []
    for pairs, figures in ((ours, ("task", "match", "general")), (paper, ("task",))):
        for figure in figures:
            each = [compare(items(runs[a], figure), items(runs[b], figure), level=LEVEL) for a, b in pairs]
            adjusted = holm([c.p for c in each])
            found += [
                {
                    "figure": figure,
                    "a": a,
                    "b": b,
                    "mean": c.mean,
                    "low": c.low,
                    "high": c.high,
                    "p": c.p,
                    "adjusted": q,
                }
                for (a, b), c, q in zip(pairs, each, adjusted, strict=True)
            ]
    return found


def goals(summary: dict[str, Any]) -> dict[str, Any]:
    """What was set before any control was run, and whether it was reached."""
    methods = summary["methods"]
    ours, before = methods[OURS], summary["models"]["descendant"]["nll"]
    others = {name: m["nll_mean"] for name, m in methods.items() if name != OURS and not METHODS[name].stranger}
    best = min(others, key=lambda name: others[name])
    less = [c for c in summary["comparisons"] if c["a"] == OURS and c["figure"] == "general"]
    told = [c for c in summary["comparisons"] if c["a"] == OURS and c["figure"] == "task"]
    start = ours["before"]["nll"] / before
    return {
        "step 0: NLL of the transplant over the student's, goal 0.5": start,
        "after training: NLL over that of the best control, goal 0.7": ours["nll_mean"] / others[best],
        "best control": best,
        "step 0 met": start <= 0.5,
        "after training met": bool(told)
        and ours["nll_mean"] <= 0.7 * others[best]
        and all(c["high"] < 0 for c in told),
        "forgets less than every control": bool(less) and all(c["high"] < 0 for c in less),
    }
