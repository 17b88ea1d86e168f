"""What a study will take, before anything runs: its cells, the readings of its teachers, time and disk.

Time is counted in operations, at the rate that this machine multiplies matrices with, and corrected by the cells of the study
that are there. Models and rows that are not here are assumed, and said.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pkt.errors import PktError
from pkt.models import Model, ModelSpec
from pkt.studying.costs import FORWARD, READING, SEARCH, size
from pkt.studying.layout import Layout, Setting
from pkt.studying.metrics import DECODED
from pkt.studying.schema import FolderStart, Measurement, PlainLora, StartOptions, Transfer, Transplant
from pkt.studying.store import Cell, Store, check_place

USED = 0.4  # of the rate of one large product, what a training keeps
DECODING = 10  # times the work of a token that is read: one token at a time does not fill a processor
STEP, BEGIN = 0.02, 1.0  # seconds beside the arithmetic: of a step or batch, and of loading a model
GGUF = 1e7  # numbers a second of such a file, which are made anew of its blocks: 135 million took 13 s
H100 = 989e12  # bf16 operations a second, as its maker says
ROWS = {"seeds": 32, "train": 1000, "held_out": 200, "test": 1000}  # assumed of a file that is not here
TOKENS = 200  # assumed of a row
# hidden, feed-forward, layers, heads of models that presets name: Llama 1 and 2
LLAMA = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40), "30b": (6656, 17920, 60, 52)}
ANY = "7b"  # taken for a model that nothing is known of


@dataclass(frozen=True)
class Work:
    """Of one cell: operations, those of them that decode, and steps or batches."""

    kind: str
    key: str
    operations: float
    decoding: float = 0.0
    steps: float = 0.0
    bytes: float = 0.0
    cell: Cell | None = None  # where everything is here
    loading: float = 0.0  # seconds; tests have the model that was trained

    def seconds(self, rate: float) -> float:
        return (self.operations + DECODING * self.decoding) / (USED * rate) + STEP * self.steps + self.loading


@dataclass
class Sizes:
    """How large models and rows are: read where they are here, assumed and noted where not."""

    layout: Layout
    assumed: dict[str, str] = field(default_factory=dict)

    def spec(self, name: str) -> ModelSpec:
        try:
            return Model.of(name).spec
        except PktError:
            shape = next(
                (s for s in sorted(LLAMA, key=len, reverse=True) if name.lower().rstrip("-hf").endswith(s)), ANY
            )
            self.assumed[name] = f"the shapes of a Llama {shape.upper()}"
            return _llama(shape)

    def loading(self, *names: str | None) -> float:
        """Seconds that reading models takes."""
        return sum(BEGIN + (size(self.spec(n)) / GGUF if _is_gguf(n) else 0.0) for n in names if n is not None)

    def rows(self, file: str, role: str) -> tuple[int, int]:
        """How many, and their tokens."""
        try:
            found = self.layout.rows(file)
        except PktError:
            if not Path(file).is_file():
                self.assumed[file] = f"{ROWS[role]} rows of {TOKENS} tokens"
                return ROWS[role], ROWS[role] * TOKENS
            text = Path(file).read_bytes()
            self.assumed[file] = "four bytes to a token"
            return text.count(b"\n"), len(text) // 4
        return len(found), found.tokens


def _is_gguf(name: str) -> bool:
    try:
        model = Model.of(name)
        return model.is_here and model.weights.form == "gguf"
    except PktError:
        return False


def absent(layout: Layout) -> list[str]:
    """Models and rows that a study names and that are not here."""
    study = layout.study
    missing = []
    for name in layout.untrained():
        try:
            _ = Model.of(name).spec
        except PktError:
            missing.append(name)
    files = [
        f
        for task in study.tasks.values()
        for f in (task.seeds, task.train, task.held_out, *(t.data for t in task.tests.values()))
    ]
    named = [f for f in dict.fromkeys([*files, study.general]) if f and isinstance(f, str)]
    return missing + [f for f in named if not Path(f).is_file()]


def plan_of(layout: Layout, out: Path) -> dict[str, Any]:
    """What there is to make, as plain values. Raises `PktError` for what would stop a study whose models and rows are here."""
    check_place(out)
    store, missing = Store(out), absent(layout)
    if not missing:
        layout.check()
    sizes = Sizes(layout)
    unique = {work.key: work for work in works(layout, store, sizes, known=not missing)}
    done = [w for w in unique.values() if w.cell is not None and store.has(w.cell)]
    left = [w for w in unique.values() if w.cell is None or not store.has(w.cell)]
    rate, name = rate_here(layout, sizes)
    corrected = _corrections(done, store, rate)
    seconds: dict[str, float] = {}
    for work in left:
        seconds[work.kind] = seconds.get(work.kind, 0.0) + work.seconds(rate) * corrected.get(work.kind, 1.0)
    kinds = {kind: sum(w.kind == kind for w in unique.values()) for kind in ("start", "tune", "train", "test")}
    jobs = [] if missing else [str(job) for job in layout.jobs(store)]
    return {
        "study": layout.study.study,
        "cells": kinds,
        "there": {kind: sum(w.kind == kind for w in done) for kind in kinds},
        "readings": _readings(layout, left),
        "seconds": seconds,
        "machine": {
            "name": name,
            "operations_a_second": rate,
            "corrected_by": {k: round(v, 3) for k, v in corrected.items()},
        },
        "h100_seconds": sum(w.seconds(H100) for w in left),
        "disk_bytes": sum(w.bytes for w in left),
        "assumed": sizes.assumed,
        "missing": missing,
        "next": jobs,
    }


def works(layout: Layout, store: Store, sizes: Sizes, *, known: bool) -> Iterator[Work]:
    """All cells, if no grid grows further; those that are one have one key."""
    study = layout.study
    student = sizes.spec(study.student)
    for task in study.tasks:
        made = _OfTask(layout, task, sizes, student, known=known)
        for model in layout.untrained() if layout.asked(task, "untrained") else ():
            yield from made.tests(model, None)
        for name, start in layout.starts.items():
            if not layout.asked(task, name):
                continue
            grid = (
                layout.grid(task, store)
                if known
                else [Setting(lr, a) for lr in study.rates.lr for a in study.rates.a_scale]
            )
            chosen = layout.chosen(task, name, store) if known else None
            yield from made.starts(name, start)
            for setting in grid:
                for seed in study.rates.seeds:
                    yield made.tune(name, start, setting, seed)
            for seed in study.training_seeds:
                yield from made.train(name, start, chosen, seed)


class _OfTask:
    """The cells of one task. known: everything is here, so that cells have keys."""

    def __init__(self, layout: Layout, task: str, sizes: Sizes, student: ModelSpec, *, known: bool) -> None:
        self.layout, self.task, self.sizes, self.student, self.known = layout, task, sizes, student, known
        study, spec = layout.study, layout.study.tasks[task]
        count, tokens = sizes.rows(spec.train, "train")
        held = spec.held_out if isinstance(spec.held_out, int) else 0
        learnt = (count - held) if spec.rows is None else spec.rows
        each = tokens / max(1, count)
        self.learnt = learnt, learnt * each
        self.held = (held, held * each) if held else sizes.rows(str(spec.held_out), "held_out")
        self.numbers = size(student)
        self.chosen: set[StartOptions] = set()  # transplants whose α is chosen once for their controls
        self.learning = study.training.rank * sum(
            sum(t.shape) * max(1, t.experts) for t in student.targets if not t.unadaptable
        )

    def starts(self, name: str, start: StartOptions) -> Iterator[Work]:
        if isinstance(start, (PlainLora, FolderStart)):
            return
        study = self.layout.study
        tokens = 0.0
        seeds_of = study.tasks[study.seeds_of(self.task, start)].seeds
        if start.needs_seeds and seeds_of is not None:
            count, tokens = self.sizes.rows(seeds_of, "seeds")
            tokens = tokens * (start.seeds or count) / max(1, count)
        draws = (*study.rates.seeds, *study.training_seeds) if start.drawn else (0,)
        shared, each = self._making(start, tokens)
        for i, seed in enumerate(draws):
            cell = self.layout.start(self.task, name, seed) if self.known else None
            key = cell.key if cell is not None else f"start {self.task} {name} {seed}"
            made = Work("start", key, 40 * study.training.rank * self.numbers, bytes=4.0 * self.learning, cell=cell)
            passes, loading = shared if i == 0 else (0.0, 0.0)
            yield replace(made, operations=made.operations + 2 * passes, loading=each + loading)

    def _making(self, start: StartOptions, tokens: float) -> tuple[tuple[float, float], float]:
        """Passes of tokens through numbers and seconds of loading that all draws of a start share, and the loading of each draw."""
        student = self.sizes.loading(self.layout.study.student)
        if isinstance(start, Transfer):
            return (READING * size(self.sizes.spec(start.teacher)) * tokens, self.sizes.loading(start.teacher)), 0.0
        if not isinstance(start, Transplant):
            return ((READING + SEARCH) * self.numbers * tokens, 0.0), student
        search = SEARCH * self.numbers * tokens, student
        cutting = self.sizes.loading(start.teacher, start.base)
        if start.control in ("neutral", "repruned"):
            return search if start.control == "neutral" else (2 * search[0], 2 * search[1]), cutting
        # All that have one α share its choice.
        chosen = replace(start, control=None)
        first = start.kept is None and chosen not in self.chosen
        self.chosen.add(chosen)
        return search if first else (0.0, 0.0), 0.0 if start.control == "noise" else cutting

    def _learn(self, start: StartOptions, name: str, epochs: float) -> tuple[float, float]:
        rows, tokens = self.learnt
        extra = self.layout.extra(self.task, name) if self.known else 0.25 if start.extra_steps else 0.0
        epochs *= 1 + extra
        each = 4 * self.numbers + 10 * self.learning
        return each * tokens * epochs, math.ceil(rows / self.layout.study.training.batch_size) * epochs

    def _forward(self, rows: float, tokens: float) -> tuple[float, float]:
        return 2 * FORWARD * (self.numbers + 2 * self.learning) * tokens, math.ceil(rows / 32)

    def tune(self, name: str, start: StartOptions, setting: Setting, seed: int) -> Work:
        study = self.layout.study
        learn, steps = self._learn(start, name, study.training.epochs * study.rates.epochs)
        held, batches = self._forward(*self.held)
        cell = self.layout.tune(self.task, name, setting, seed) if self.known else None
        key = cell.key if cell is not None else f"tune {self.task} {name} {setting} {seed}"
        loading = self.sizes.loading(study.student)
        return Work("tune", key, learn + held, steps=steps + batches, bytes=1e3, cell=cell, loading=loading)

    def train(self, name: str, start: StartOptions, chosen: Setting | None, seed: int) -> Iterator[Work]:
        study = self.layout.study
        learn, steps = self._learn(start, name, study.training.epochs)
        cell = self.layout.train(self.task, name, chosen or Setting(1.0, 1.0), seed) if self.known else None
        key = cell.key if cell is not None else f"train {self.task} {name} {seed}"
        yield Work("train", key, learn, steps=steps, bytes=3e3, cell=cell, loading=self.sizes.loading(study.student))
        yield from self.tests(key, cell)
        if seed == study.training_seeds[0]:
            yield from self.tests(f"{key} before", cell, before=True)

    def tests(self, of: str, cell: Cell | None, *, before: bool = False) -> Iterator[Work]:
        """Of a training's cell, or of a model of this name."""
        untrained = of in self.layout.untrained()
        for test, spec in self.layout.measurements(self.task).items():
            operations, decoding, batches, rows = self._test(spec)
            found = None
            if self.known:
                found = self.layout.test(of if cell is None else cell, test, self.task, before=before)
            key = found.key if found is not None else f"test {of} {test} {self.task if not untrained else spec.data}"
            loading = self.sizes.loading(of) / len(self.layout.measurements(self.task)) if untrained else 0.0
            kept = 2e3 + 30.0 * rows * len(spec.metrics)
            yield Work("test", key, operations, decoding, batches, kept, found, loading)

    def _test(self, spec: Measurement) -> tuple[float, float, float, int]:
        count, tokens = self.sizes.rows(spec.data if spec.lm_eval is None else str(spec.lm_eval), "test")
        rows = count if spec.limit is None else min(count, spec.limit)
        operations, batches = self._forward(rows, tokens * rows / max(1, count))
        decodes = bool(DECODED & set(spec.metrics))
        written = rows * spec.max_new_tokens if decodes else 0
        return (
            operations * len(spec.metrics),
            2.0 * self.numbers * written,
            batches + spec.max_new_tokens * (written > 0),
            rows,
        )


def _readings(layout: Layout, left: list[Work]) -> list[dict[str, Any]]:
    """Of each teacher that transfers are made of: how many starts one reading of it serves."""
    names = {model: name for name, model in layout.study.teachers.items()}
    found: dict[str, int] = {}
    keys = {w.key for w in left if w.kind == "start"}
    for task in layout.study.tasks:
        for name, start in layout.starts.items():
            if isinstance(start, Transfer) and layout.asked(task, name):
                teacher = names[start.teacher]
                draws = (*layout.study.rates.seeds, *layout.study.training_seeds) if start.drawn else (0,)
                for seed in draws:
                    unknown = f"start {task} {name} {seed}"
                    key = unknown if unknown in keys else getattr(_cell(layout, task, name, seed), "key", "")
                    if key in keys:
                        keys.discard(key)
                        found[teacher] = found.get(teacher, 0) + 1
    return [{"teacher": teacher, "starts": count} for teacher, count in found.items()]


def _cell(layout: Layout, task: str, name: str, seed: int) -> Cell | None:
    try:
        return layout.start(task, name, seed)
    except PktError:
        return None


def _corrections(done: list[Work], store: Store, rate: float) -> dict[str, float]:
    """How long finished cells of a kind took, over what they would have been given."""
    found = {}
    for kind in {w.kind for w in done}:
        some = [w for w in done if w.kind == kind]
        took = sum(_took(w, store) for w in some)
        found[kind] = took / sum(w.seconds(rate) for w in some)
    return found


def _took(work: Work, store: Store) -> float:
    assert work.cell is not None
    # A training's record is written after its tests, of a training that was timed by itself.
    if work.kind in ("start", "train"):
        return float(store.value(work.cell)["seconds"])
    return float(store.record(work.cell)["seconds"])


def rate_here(layout: Layout, sizes: Sizes) -> tuple[float, str]:
    """Operations a second of one large product on this machine, as a study's trainings would make it, and the machine."""
    cuda = torch.cuda.is_available()
    device, side = ("cuda", 8192) if cuda else ("cpu", 1024)
    half = cuda and layout.study.training.precision in ("auto", "bf16", "fp16")
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if half else torch.float32)
    before = torch.get_num_threads()
    threads = layout.threads(sizes.spec(layout.study.student))
    torch.set_num_threads(threads)
    try:
        a @ a
        best = math.inf
        for _ in range(8):
            begin = time.perf_counter()
            a @ a
            if cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    return 2 * side**3 / best, torch.cuda.get_device_name() if cuda else f"CPU, {threads} thread{'s' * (threads > 1)}"


def _llama(shape: str) -> ModelSpec:
    from transformers import LlamaConfig

    hidden, inner, layers, heads = LLAMA[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000,
    )
    return Model.of(config).spec
