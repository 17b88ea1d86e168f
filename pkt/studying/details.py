"""What a study's report shows beside its means: whom single items favour, what seeds of other tasks give, what it all cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pkt.files import read_json
from pkt.seeds import IGNORE
from pkt.statistics import compare
from pkt.studying.layout import Layout
from pkt.studying.schema import Measurement, PlainLora
from pkt.studying.store import CELL, Store
from pkt.studying.summing import lower

MOST = 20  # items shown of a comparison
LONGEST = 240  # characters of a question

ItemsOf = Callable[[str, str], Any]  # of a task and a start: [seeds, items] of the deciding figure, or None


def panels_of(layout: Layout) -> dict[str, Any]:
    return {
        name: {"of": p.of, "vary": p.vary, "over": list(p.over), "names": [f"{name}={value}" for value in p.over]}
        for name, p in layout.study.panels.items()
    }


def item_counts(ours: Any, control: Any, metric: str) -> dict[str, Any]:
    """Shares of seeds × items on which ours is ahead, behind, and neither; of 0/1 figures, both right and neither right."""
    ahead = (control - ours if lower(metric) else ours - control) > 0
    behind = (control - ours if lower(metric) else ours - control) < 0
    found = {"count": ours.shape[1], "won": float(ahead.mean()), "lost": float(behind.mean())}
    even = ~ahead & ~behind
    if set(np.unique(ours)) | set(np.unique(control)) <= {0.0, 1.0}:
        return {**found, "both": float((even & (ours > 0)).mean()), "neither": float((even & (ours == 0)).mean())}
    return {**found, "even": float(even.mean())}


def most_different(layout: Layout, spec: Measurement, ours: Any, control: Any, metric: str) -> list[dict[str, Any]]:
    """The items on which two starts differ most, over all seeds, with question and right answer; none of the harness's."""
    if spec.lm_eval is not None:
        return []
    rows = layout.measured_on(spec.data, spec.limit)
    a, b = ours.mean(0), control.mean(0)
    order = np.argsort(-abs(a - b), kind="stable")[:MOST]
    found = []
    for item in (int(i) for i in order if a[i] != b[i]):
        row = rows[item]
        first = next(i for i, label in enumerate(row.labels) if label != IGNORE)
        question = " ".join(layout.tokenizer.decode(row.input_ids[:first], skip_special_tokens=True).split())
        asked = question if len(question) <= LONGEST else "… " + question[-LONGEST:]
        answer = row.answer if len(row.answer) <= LONGEST else row.answer[:LONGEST] + " …"
        found.append(
            {"item": item, "question": asked, "answer": answer, "ours": float(a[item]), "control": float(b[item])}
        )
    return found


def crossed(layout: Layout, items: ItemsOf) -> dict[str, Any]:
    """Of each panel that varies whose seeds a start is made of: the gain over plain LoRA of each task's seeds on each task, and
    the share of the gain of its own seeds that other tasks' seeds give."""
    study = layout.study
    plain = next((n for n, s in study.starts.items() if isinstance(s, PlainLora) and s.init == "default"), None)
    found: dict[str, Any] = {}
    for name, panel in study.panels.items():
        if panel.vary != "seeds_of" or plain is None:
            continue
        cells, shares = [], {}
        for task, spec in study.tasks.items():
            metric, base = spec.decides.rpartition(".")[2], items(task, plain)
            sign = -1.0 if lower(metric) else 1.0
            gains = {}
            for seeds_of in map(str, panel.over):
                some = items(task, f"{name}={seeds_of}")
                if some is None or base is None or min(base.shape) < 2:
                    continue
                gains[seeds_of] = sign * (some - base)
                c = compare(gains[seeds_of], 0 * base, level=study.compare.level)
                cells.append(
                    {"seeds_of": seeds_of, "task": task, "metric": metric, "mean": c.mean, "low": c.low, "high": c.high}
                )
            others = [gain for seeds_of, gain in gains.items() if seeds_of != task]
            if task in gains and others:
                shares[task] = share(sum(others) / len(others), gains[task], study.compare.level)
        found[name] = {"plain": plain, "cells": cells, "shares": shares}
    return found


def share(part: Any, whole: Any, level: float) -> dict[str, float] | None:
    """mean(part) / mean(whole), [seeds, items] each, and the interval of all ratios r for which part − r × whole may be 0 (Fieller,
    by seeds × items). None where the whole itself may be 0."""
    sure = compare(whole, 0 * whole, level=level)
    if sure.low <= 0 <= sure.high:
        return None
    kept = []
    for r in np.linspace(-3, 4, 701):
        c = compare(part - r * whole, 0 * whole, level=level)
        if c.low <= 0 <= c.high:
            kept.append(float(r))
    ratio = float(part.mean() / whole.mean())
    return {"share": ratio, "low": min([ratio, *kept]), "high": max([ratio, *kept])}


def costs_of(store: Store) -> dict[str, Any]:
    """Of the cells in the folder by kind: how many, their seconds and the most memory; and the versions and devices of all."""
    kinds: dict[str, dict[str, Any]] = {}
    versions: dict[str, set[str]] = {}
    devices: set[str] = set()
    for record in _records(store):
        kind = kinds.setdefault(record["kind"], {"cells": 0, "seconds": 0.0, "peak_bytes": 0})
        kind["cells"] += 1
        kind["seconds"] += record["seconds"]
        kind["peak_bytes"] = max(kind["peak_bytes"], record.get("peak_bytes") or 0)
        for name, version in record["versions"].items():
            versions.setdefault(name, set()).add(version)
        devices.add(record.get("device") or "unknown")
    return {
        "kinds": dict(sorted(kinds.items())),
        "versions": {name: sorted(some) for name, some in sorted(versions.items())},
        "devices": sorted(devices),
    }


def _records(store: Store) -> Iterator[dict[str, Any]]:
    for file in sorted((store.folder / "cells").glob(f"*/*/{CELL}")):
        yield read_json(file)
