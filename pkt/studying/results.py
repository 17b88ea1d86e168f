"""What a study found, from its cells alone: every training's figures, every comparison, and what the gain is made of."""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pkt.files import atomic_file, write_json
from pkt.statistics import compare, holm, word_for
from pkt.studying.details import costs_of, crossed, item_counts, most_different, panels_of
from pkt.studying.layout import Layout
from pkt.studying.metrics import LOWER, figure, groups_of
from pkt.studying.schema import FolderStart, OwnStart, PlainLora, StartOptions, Transfer, Transplant
from pkt.studying.store import Cell, Store


def stats_of(layout: Layout, store: Store) -> dict[str, Any]:
    """stats.json: of a task the untrained models, each start before and after, the grid and what was chosen; comparisons; costs."""
    study = layout.study
    tasks = {task: _task(layout, store, task) for task in study.tasks}
    found: dict[str, Any] = {
        "study": study.study,
        "of": study.compare.of,
        "level": study.compare.level,
        "seeds": list(study.training_seeds),
        "tuning": {"lr": list(study.rates.lr), "a_scale": list(study.rates.a_scale), "seeds": list(study.rates.seeds)},
        "tasks": tasks,
        "panels": panels_of(layout),
        "comparisons": _comparisons(layout, store),
        "crossed": crossed(layout, lambda task, name: _deciding_items(layout, store, task, name)),
        "costs": costs_of(store),
        "failures": store.failures(),
    }
    found["verdict"] = headline(layout, found["comparisons"])
    return found


def _task(layout: Layout, store: Store, task: str) -> dict[str, Any]:
    study = layout.study
    names = {model: name for name, model in study.teachers.items()}
    untrained = {
        names.get(model, "student"): {
            name: figures(store.value(cell)) for name, cell in layout.tests(model, task).items() if store.has(cell)
        }
        for model in layout.untrained()
    }
    return {
        "rows": len(layout.learnt(task)),
        "held_out": len(layout.held_out(task)),
        "decides": study.tasks[task].decides,
        "untrained": untrained,
        "starts": {name: _start(layout, store, task, name) for name in layout.starts},
    }


def _start(layout: Layout, store: Store, task: str, name: str) -> dict[str, Any]:
    grid = layout.grid(task, store)
    curve, chosen = layout.curve(task, name, grid, store), layout.chosen(task, name, store)
    lrs = sorted({s.lr for s in grid})
    found: dict[str, Any] = {
        "seeds_of": layout.study.seeds_of(task, layout.starts[name]),
        "cost": layout.cost(task, name),
        "extra_steps": layout.extra(task, name),
        "curve": [
            {"lr": s.lr, "a_scale": s.a_scale, "nll": None if math.isinf(nll) else nll}
            for s, nll in (curve or {}).items()
        ],
        "chosen": None if chosen is None else vars(chosen),
        "at_the_end": chosen is not None and len(lrs) > 1 and chosen.lr in (lrs[0], lrs[-1]),
    }
    cell = layout.start(task, name, layout.study.training_seeds[0])
    if cell is not None and store.has(cell):
        found["seconds_to_make"] = store.value(cell)["seconds"]
    if chosen is None:
        return found
    trained = [layout.train(task, name, chosen, seed) for seed in layout.study.training_seeds]
    done = [cell for cell in trained if store.has(cell)]
    values = [store.value(cell) for cell in done]
    found |= {
        "trained": len(done),
        "diverged": sum(v["diverged"] for v in values),
        "trainable": values[0]["trainable"] if values else None,
        "norm": values[0]["norm"] if values else None,
        "losses": [[round(loss, 5) for loss in v["losses"]] for v in values],
        "steps": len(values[0]["losses"]) if values else None,
        "clipped": sum(v["clipped"] for v in values) / len(values) if values else None,
        "seconds_to_train": sum(v["seconds"] for v in values) / len(values) if values else None,
        "before": _figures_of(layout.tests(trained[0], task, before=True), store),
        "after": [_figures_of(layout.tests(cell, task), store) for cell in done],
    }
    return found


def _figures_of(cells: dict[str, Cell], store: Store) -> dict[str, dict[str, float]]:
    return {name: figures(store.value(cell)) for name, cell in cells.items() if store.has(cell)}


def figures(value: dict[str, Any]) -> dict[str, float]:
    """The figures of one test; none of a training that diverged."""
    return {metric: figure(metric, items) for metric, items in value.items()}


def items_of(layout: Layout, store: Store, task: str, name: str, test: str, metric: str) -> Any:
    """[seeds, items] whose means over items are the trainings' figures; None while a training is missing or one diverged."""
    chosen = layout.chosen(task, name, store)
    if chosen is None:
        return None
    cells = [layout.test(layout.train(task, name, chosen, seed), test, task) for seed in layout.study.training_seeds]
    values = [store.value(cell) for cell in cells if store.has(cell)]
    if len(values) < len(cells) or any(metric not in value for value in values):
        return None
    if metric != "nll":
        return np.array([value[metric] for value in values], np.float64)
    losses, counts = (np.array([[row[i] for row in value["nll"]] for value in values]) for i in (0, 1))
    return losses * losses.shape[1] / counts.sum(1, keepdims=True)


def _deciding_items(layout: Layout, store: Store, task: str, name: str) -> Any:
    test, _, metric = layout.study.tasks[task].decides.rpartition(".")
    return items_of(layout, store, task, name, test, metric)


def controls_of(layout: Layout) -> list[str]:
    """Those that `compare.of` is held against; a panel's variants are compared too, as a family of their own."""
    study = layout.study
    return list(study.compare.controls) or [name for name in study.starts if name != study.compare.of]


def _comparisons(layout: Layout, store: Store) -> list[dict[str, Any]]:
    """compare.of minus each control, by task and figure; p values of one family are adjusted together (Holm).

    Families: the controls × tasks on the deciding metrics; on every other figure; and of each panel.
    """
    study = layout.study
    ours = study.compare.of
    families: dict[str, list[tuple[str, str, str, str]]] = {}
    for task, spec in study.tasks.items():
        for test, measured in layout.measurements(task).items():
            for metric in measured.metrics:
                decides = f"{test}.{metric}" == spec.decides
                family = "deciding" if decides else f"{test}.{metric}"
                rows = families.setdefault(family, [])
                rows += [(task, test, metric, control) for control in controls_of(layout)]
                if decides:
                    for panel, varied in study.panels.items():
                        names = [f"{panel}={value}" for value in varied.over]
                        families.setdefault(f"panel {panel}", []).extend((task, test, metric, n) for n in names)
    found = []
    for family, rows in families.items():
        each = [(row, *(items_of(layout, store, row[0], n, row[1], row[2]) for n in (ours, row[3]))) for row in rows]
        ready = [(row, a, b) for row, a, b in each if a is not None and b is not None and min(a.shape) > 1]
        files = [layout.measurements(row[0])[row[1]].data for row, *_ in ready]
        clusters = [groups_of(file, a.shape[1]) if file else None for file, (_, a, _) in zip(files, ready, strict=True)]
        made = [
            compare(a, b, level=study.compare.level, groups=g) for (_, a, b), g in zip(ready, clusters, strict=True)
        ]
        for ((task, test, metric, control), a, b), c, q in zip(ready, made, holm([c.p for c in made]), strict=True):
            won = item_counts(a, b, metric)
            if family == "deciding":
                won["flipped"] = most_different(layout, layout.measurements(task)[test], a, b, metric)
            margin = study.compare.margin.get(metric, 0.0)
            word = word_for(c, q, margin=margin, lower=LOWER[metric], seeds=len(a), planned=len(study.training_seeds))
            found.append(
                {
                    "family": family, "task": task, "test": test, "metric": metric, "of": ours, "control": control,
                    "role": role_of(layout, control), "items": won,
                    "mean": c.mean, "low": c.low, "high": c.high, "p": c.p, "adjusted": q, "word": word,
                    "margin": margin, "detectable": c.detectable, "seeds_for_margin": c.seeds_for(margin) if margin else None,
                }
            )  # fmt: skip
    return found


def headline(layout: Layout, comparisons: list[dict[str, Any]]) -> str:
    """What the gain is made of: the first control that is not beaten on every task says so."""
    decided = [c for c in comparisons if c["family"] == "deciding"]
    words = {name: [c["word"] for c in decided if c["control"] == name] for name in controls_of(layout)}
    if not all(len(w) == len(layout.study.tasks) for w in words.values()) or any(
        "not yet" in w for w in words.values()
    ):
        return f"Not yet: the study is unfinished, or has fewer than {max(3, len(layout.study.training_seeds))} seeds."
    lost = [name for name, w in words.items() if any(word != "better" for word in w)]
    if not lost:
        return (
            "Better than every control: consistent with the task's knowledge having moved, on these models and tasks."
        )
    for role, said in _SAYINGS:
        found = [name for name in lost if role_of(layout, name) == role]
        if found:
            return f"{said} (not better than {', '.join(found)})."
    return f"Not better than {', '.join(lost)}."


_SAYINGS = (
    ("plain", "No gain over plain LoRA was seen"),
    ("size", "What helped is the size of the start, not what the teacher holds"),
    ("units", "What helped is the teacher's weights, not which units they are put on"),
    ("region", "The teacher's weights helped; choosing them by sensitivity did not"),
    ("off-task", "The start helped; the task it was made on did not matter"),
    ("neutral", "The start helped; keeping it did not matter"),
    ("repruned", "Cutting the tuned teacher once more does as much"),
    ("own", "The student's own weights or gradients give as much"),
)


def role_of(layout: Layout, name: str) -> str:
    """What a control rules out."""
    start: StartOptions = layout.starts[name]
    if start.seeds_of is not None and start.kind == layout.starts[layout.study.compare.of].kind:
        return "off-task"
    if isinstance(start, PlainLora):
        return "plain" if start.init == "default" else "own"
    if isinstance(start, OwnStart):
        return "plain" if start.how == "lora" else "own"
    if isinstance(start, Transplant):
        roles = {"noise": "size", "wrong-units": "units", "neutral": "neutral", "repruned": "repruned"}
        return roles.get(start.control or "", "other")
    if isinstance(start, Transfer) and start.drawn:
        return "region"
    return "folder" if isinstance(start, FolderStart) else "other"


def rows_of(layout: Layout, store: Store) -> Iterator[tuple[Any, ...]]:
    """results.csv: task, start, seed, when, test, metric, value."""
    for task in layout.study.tasks:
        for name in layout.starts:
            chosen = layout.chosen(task, name, store)
            for seed in layout.study.training_seeds if chosen is not None else ():
                assert chosen is not None
                train = layout.train(task, name, chosen, seed)
                for before in (True, False):
                    for test, cell in layout.tests(train, task, before=before).items():
                        for metric, value in figures(store.value(cell)).items() if store.has(cell) else ():
                            yield task, name, seed, "before" if before else "after", test, metric, value


def write_results(layout: Layout, store: Store, out: Path) -> dict[str, Any]:
    """stats.json, results.csv and rows.csv.gz (by item); returns the first."""
    found = stats_of(layout, store)
    with atomic_file(out / "stats.json") as scratch:
        write_json(scratch, found)
    with atomic_file(out / "results.csv") as scratch:
        scratch.write_text(_csv(("task", "start", "seed", "when", "test", "metric", "value"), rows_of(layout, store)))
    with atomic_file(out / "rows.csv.gz") as scratch:
        text = _csv(("task", "start", "test", "metric", "seed", "item", "value"), _items(layout, store))
        scratch.write_bytes(gzip.compress(text.encode(), mtime=0))
    return found


def _items(layout: Layout, store: Store) -> Iterator[tuple[Any, ...]]:
    for task in layout.study.tasks:
        for test, measured in layout.measurements(task).items():
            for metric in measured.metrics:
                for name in layout.starts:
                    found = items_of(layout, store, task, name, test, metric)
                    for seed, row in zip(layout.study.training_seeds, () if found is None else found, strict=False):
                        for item, value in enumerate(row):
                            yield task, name, test, metric, seed, item, f"{value:.6g}"


def _csv(head: tuple[str, ...], rows: Iterator[tuple[Any, ...]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
