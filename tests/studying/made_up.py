"""stats.json of a study that nobody ran: two tasks, three panels, figures drawn from a generator; and the file of a small one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from pkt.statistics import compare, holm, word_for
from pkt.studying.metrics import LOWER

STARTS = {
    "pkt": 0.30,
    "noise of the same size": 0.10,
    "random window": 0.22,
    "next task": 0.25,
    "pissa": 0.28,
    "lora": 0.0,
}
ROLES = {
    "noise of the same size": "size",
    "random window": "region",
    "next task": "off-task",
    "pissa": "own",
    "lora": "plain",
}
PANELS = {
    "layers": ("layers", ["first", "last"]),
    "samples": ("seeds", [4, 16]),
    "cross": ("seeds_of", ["gsm", "mmlu"]),
}
DECIDES = {"gsm": "zero.nll", "mmlu": "zero.choice"}
SEEDS, ITEMS = 3, 60


def stats() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    tasks, items = {}, {}
    variants = {f"{panel}={value}": 0.2 for panel, (_, over) in PANELS.items() for value in over}
    for task, decides in DECIDES.items():
        metric = decides.split(".")[1]
        starts = {}
        for name, gain in {**STARTS, **variants}.items():
            seed = draw.normal(0, 0.02, (SEEDS, 1))
            if metric == "nll":
                each = 1.2 - gain + seed + draw.normal(0, 0.15, (SEEDS, ITEMS))
            else:
                each = (draw.random((SEEDS, ITEMS)) < 0.4 + gain + seed).astype(float)
            items[task, name] = each
            starts[name] = _start(draw, metric, each, name)
        tasks[task] = {
            "rows": 1000, "held_out": 200, "decides": decides, "starts": starts,
            "untrained": {m: {"zero": {metric: v}, "general": {"nll": 2.1}} for m, v in (("student", 0.9), ("13b", 0.5))},
        }  # fmt: skip
    return {
        "study": "made up & <odd>", "of": "pkt", "level": 0.95, "seeds": list(range(SEEDS)),
        "verdict": "No gain over plain LoRA was seen.",
        "tuning": {"lr": [1e-4, 3e-4], "a_scale": [1.0, 3.0], "seeds": [1000]}, "tasks": tasks, "failures": [],
        "panels": {
            n: {"of": "pkt", "vary": vary, "over": over, "names": [f"{n}={v}" for v in over]}
            for n, (vary, over) in PANELS.items()
        },
        "comparisons": _comparisons(items), "crossed": {"cross": _crossed()}, "costs": _costs(),
    }  # fmt: skip


def half() -> dict[str, Any]:
    """The same after a kill: one start of a task has two of three seeds, the other task is being tuned."""
    found = copy.deepcopy(stats())
    found["tasks"]["gsm"]["starts"]["pissa"] |= {"trained": 2}
    for start in found["tasks"]["mmlu"]["starts"].values():
        kept = {n: start[n] for n in ("seeds_of", "extra_steps", "at_the_end")}
        start.clear()
        start |= {**kept, "curve": [], "chosen": None}
    found["comparisons"] = [c for c in found["comparisons"] if c["task"] == "gsm" and c["control"] != "pissa"]
    found["crossed"] = {"cross": {"plain": "lora", "cells": [], "shares": {}}}
    found["failures"] = [{"cell": "train mmlu noise", "error": "its worker ended"}]
    return found


def _start(draw: Any, metric: str, each: Any, name: str) -> dict[str, Any]:
    after = [{"zero": {metric: float(v)}, "general": {"nll": 2.1 + abs(float(draw.normal()))}} for v in each.mean(1)]
    curve = [{"lr": lr, "a_scale": 1.0, "nll": float(1 + draw.random())} for lr in (1e-4, 3e-4, 9e-4)]
    return {
        "seeds_of": "gsm", "extra_steps": 0.0, "curve": curve, "chosen": {"lr": 3e-4, "a_scale": 1.0}, "at_the_end": name == "lora",
        "seconds_to_make": 12.5, "trained": SEEDS, "diverged": 0, "trainable": 1_234_567, "seconds_to_train": 90.0, "steps": 47,
        "norm": float(draw.random()), "clipped": 0.25, "before": {"zero": {metric: 0.9}, "general": {"nll": 2.1}}, "after": after,
        "losses": [[2 / (step + 1) + float(draw.random()) / 9 for step in range(47)] for _ in range(SEEDS)],
    }  # fmt: skip


def _comparisons(items: dict[tuple[str, str], Any]) -> list[dict[str, Any]]:
    rows = [(task, control) for task in DECIDES for control in ROLES]
    made = [compare(items[task, "pkt"], items[task, control]) for task, control in rows]
    found = []
    for (task, control), c, q in zip(rows, made, holm([c.p for c in made]), strict=True):
        test, metric = DECIDES[task].split(".")
        margin = 0.02 if metric == "nll" else 0.01
        word = word_for(c, q, margin=margin, lower=LOWER[metric], seeds=SEEDS, planned=SEEDS)  # type: ignore[index]
        flipped = [
            {"item": i, "question": "How many? " * 20, "answer": "42", "ours": 0.1, "control": 0.9} for i in range(4)
        ]
        won = {
            "count": ITEMS,
            "won": 0.4,
            "lost": 0.2,
            **({"even": 0.4} if metric == "nll" else {"both": 0.3, "neither": 0.1}),
        }
        found.append(
            {
                "family": "deciding", "task": task, "test": test, "metric": metric, "of": "pkt", "control": control,
                "role": ROLES[control], "items": {**won, "flipped": flipped}, "mean": c.mean, "low": c.low, "high": c.high,
                "p": c.p, "adjusted": q, "word": word, "margin": margin, "detectable": c.detectable,
                "seeds_for_margin": c.seeds_for(margin),
            }
        )  # fmt: skip
    return found


def _crossed() -> dict[str, Any]:
    cells = [
        {"seeds_of": a, "task": b, "metric": DECIDES[b].split(".")[1], "mean": 0.2, "low": 0.1, "high": 0.3}
        for a in DECIDES
        for b in DECIDES
    ]
    return {"plain": "lora", "cells": cells, "shares": {"gsm": {"share": 0.66, "low": 0.4, "high": 0.9}, "mmlu": None}}


def _costs() -> dict[str, Any]:
    kinds = {k: {"cells": 30, "seconds": s, "peak_bytes": 2e9} for k, s in (("start", 30.0), ("train", 9000.0))}
    return {"kinds": kinds, "versions": {"torch": ["2.13", "2.14"], "pkt": ["0.1.0"]}, "devices": ["cpu"]}


def one_test(test: str, decides: str) -> str:
    """A study of two starts and one test, of few steps: its file."""
    return f"""student: demo:student
tasks:
  sums:
    train: demo:data/train.jsonl
    rows: 4
    held_out: 2
    tests:
      {test}
    decides: {decides}
starts:
  pissa: {{kind: start, how: pissa}}
  lora: {{kind: lora}}
training: {{rank: 2, epochs: 1, batch_size: 4, micro_batch: 4, max_length: 256}}
rates: {{lr: [1e-3], a_scale: [1], seeds: [7], epochs: 1, extend: 0}}
seeds: 2
compare: {{of: pissa}}
"""
