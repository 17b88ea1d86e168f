"""What a study's tables, figures and the command say of one start: figures over its training seeds, or why there are none.

All of it is read from what stats.json holds, so that a page can be made again from that file alone.
"""

from __future__ import annotations

import statistics
from typing import Any

from pkt.studying.metrics import LOWER


def split(name: str) -> tuple[str, str]:
    """Test and metric of "test.metric"."""
    test, _, metric = name.rpartition(".")
    return test, metric


def lower(metric: str) -> bool:
    return LOWER.get(metric, False)


def measured_in(task: dict[str, Any]) -> list[str]:
    """All "test.metric" that a task's models were measured by, the deciding one first, general text last."""
    runs = [run for start in task["starts"].values() for run in start.get("after", [])]
    runs += list(task["untrained"].values())
    found = dict.fromkeys(f"{test}.{metric}" for run in runs for test, figures in run.items() for metric in figures)
    return sorted(found, key=lambda n: (n != task["decides"], split(n)[0] == "general"))


def is_variant(found: dict[str, Any], start: str) -> bool:
    """Whether a start is one of a panel's."""
    return any(start in panel["names"] for panel in found["panels"].values())


def missing(found: dict[str, Any], start: dict[str, Any]) -> str | None:
    """Why a start has no mean: nothing is said of some of the seeds."""
    planned, trained = len(found["seeds"]), start.get("trained", 0)
    if trained < planned:
        return f"{trained} of {planned} seeds"
    return f"diverged in {start['diverged']} of {trained}" if start.get("diverged") else None


def values(found: dict[str, Any], start: dict[str, Any], name: str) -> list[float]:
    """A figure of a start by training seed, in their order; none before all are in."""
    test, metric = split(name)
    if missing(found, start) is not None:
        return []
    return [run[test][metric] for run in start["after"] if metric in run.get(test, {})]


def before(start: dict[str, Any], name: str) -> float | None:
    test, metric = split(name)
    value = start.get("before", {}).get(test, {}).get(metric)
    return None if value is None else float(value)


def scaled(metric: str, value: float) -> float:
    """As it is shown: nats as they are, shares in percent."""
    return value if metric == "nll" else 100 * value


def text(metric: str, value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if metric == "nll" else f"{100 * value:.1f}%"


def mean_text(found: dict[str, Any], start: dict[str, Any], name: str, *, spread: bool = True) -> str:
    """Mean over the seeds, ± their standard deviation, or why there is none."""
    metric = split(name)[1]
    some = values(found, start, name)
    if not some:
        return missing(found, start) or ""
    mean = statistics.mean(some)
    if not spread or len(some) < 2:
        return text(metric, mean)
    deviation = statistics.stdev(some)
    return f"{mean:.3f} ± {deviation:.3f}" if metric == "nll" else f"{100 * mean:.1f} ± {100 * deviation:.1f}%"


def difference_text(metric: str, value: float) -> str:
    """Of two figures: nats, or points."""
    return f"{value:+.3f}" if metric == "nll" else f"{100 * value:+.1f}"


def interval_text(c: dict[str, Any]) -> str:
    """A comparison's difference and interval."""
    mean, low, high = (difference_text(c["metric"], c[n]) for n in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" + ("" if c["metric"] == "nll" else " points")


def comparison(found: dict[str, Any], family: str, task: str, control: str) -> dict[str, Any] | None:
    """Of compare.of and a control; None where there is none yet."""
    key = (family, task, control)
    return next((c for c in found["comparisons"] if (c["family"], c["task"], c["control"]) == key), None)


def setting_text(start: dict[str, Any]) -> str:
    """The chosen rate and scale of A, with * where the rate is an end of the grid."""
    chosen = start.get("chosen")
    return "" if chosen is None else f"{chosen['lr']:g}, {chosen['a_scale']:g}" + ("*" if start["at_the_end"] else "")


def steps_to_make(start: dict[str, Any]) -> float | None:
    """What making a start costs by the clock, as training steps of the same start."""
    seconds, trained, steps = (start.get(n) for n in ("seconds_to_make", "seconds_to_train", "steps"))
    return float(seconds / (trained / steps)) if seconds is not None and trained and steps else None


def sentence(found: dict[str, Any], c: dict[str, Any]) -> str:
    """A comparison in words."""
    task = found["tasks"][c["task"]]
    name = f"{c['test']}.{c['metric']}"
    ours, theirs = (mean_text(found, task["starts"][n], name, spread=False) for n in (c["of"], c["control"]))
    would = difference_text(c["metric"], c["detectable"]).lstrip("+")
    unit = "nats" if c["metric"] == "nll" else "points"
    seeds, margin = c["seeds_for_margin"], difference_text(c["metric"], c["margin"]).lstrip("+")
    more = "" if not c["margin"] else (
        f"; more items are needed to see {margin}, however many the seeds" if seeds is None
        else f"; {seeds} seeds would see {margin}, the margin"
    )  # fmt: skip
    return (
        f"{c['task']}, {name}, {len(found['seeds'])} training seeds, {c['items']['count']} items: {c['of']} {ours}, "
        f"{c['control']} {theirs}, each at its own rate: {interval_text(c)}, adjusted p {c['adjusted']:.2g}: {c['word']}. "
        f"This study would have seen {would} {unit}{more}."
    )


def warnings(found: dict[str, Any]) -> list[str]:
    """What a verdict is to be read with."""
    ends = []
    for task, value in found["tasks"].items():
        names = [name for name, start in value["starts"].items() if start["at_the_end"]]
        variants = sum(is_variant(found, name) for name in names)
        more = [f"{variants} variants of panels"] if variants else []
        if names:
            ends.append(f"{task} ({', '.join([n for n in names if not is_variant(found, n)] + more)})")
    return (
        [f"The best rate is still an end of the grid on {'; '.join(ends)}: a wider grid may change what is said."]
        if ends
        else []
    )
