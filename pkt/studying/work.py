"""How each kind of cell is made: a start, a tuning, a training with its tests, the tests of an untrained model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pkt.errors import DivergedError, PktError
from pkt.extraction import Extraction, Start, open_start
from pkt.files import atomic_file, read_json, write_json
from pkt.lora import draw_pairs, inject, mode_of, scale_a
from pkt.matching import Lineage
from pkt.models import load_model, spec_of_model
from pkt.options import Execution, Factorization, Lora, PlanOptions, Training
from pkt.planning import adapted
from pkt.seeds import Seeds
from pkt.starting import start as own_start
from pkt.studying.harness import harness_items
from pkt.studying.judging import instructions, win_rates
from pkt.studying.layout import Job, Layout, Setting
from pkt.studying.metrics import measured, references_of
from pkt.studying.schema import FolderStart, Measurement, OwnStart, PlainLora, StartOptions, Transfer, Transplant
from pkt.studying.store import Cell, Store
from pkt.training import fit, row_losses, silently
from pkt.transferring import Listeners, Recipe, transfer_recipes
from pkt.transplanting import Control, control_of, transplant

LINEAGE = "lineage.json"  # in the folder of a transplant
BEGUN = "start"  # the folder of a start within its cell
CLIP = 1.0  # the norm that Trainer clips gradients to


def run_job(layout: Layout, job: Job, store: Store) -> None:
    """Make a job's cells that are not there yet."""
    with silently(), _threads(layout):
        if job.kind == "start":
            _start(layout, job, store)
        elif job.kind == "tune":
            _tune(layout, job, store)
        elif job.kind == "train":
            _train(layout, job, store)
        else:
            _untrained(layout, job, store)


@contextlib.contextmanager
def _threads(layout: Layout) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(layout.threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def scan(layout: Layout, jobs: Sequence[Job], store: Store) -> None:
    """All transfers of one teacher from one reading of it, of every task and recipe: jobs of the kind "start"."""
    tasks: dict[str, Seeds] = {}
    recipes: dict[str, Recipe] = {}
    wanted: list[tuple[str, str]] = []
    for job in jobs:
        start = layout.starts[job.start]
        assert isinstance(start, Transfer)
        rows, recipe = layout.seeds(job.task, start), _recipe(start, layout.study.training.rank, job.seed)
        task = next((n for n, other in tasks.items() if other.fingerprint == rows.fingerprint), f"seeds{len(tasks)}")
        name = next((n for n, other in recipes.items() if other == recipe), f"recipe{len(recipes)}")
        tasks[task], recipes[name] = rows, recipe
        wanted.append((task, name))
    some = layout.starts[jobs[0].start]
    assert isinstance(some, Transfer)
    begin = time.perf_counter()
    with silently(), _threads(layout):
        found = transfer_recipes(
            some.teacher,
            layout.study.student,
            tasks,
            recipes,
            only=set(wanted),
            tokenizer=layout.tokenizer,
            map_vocabulary=some.map_vocabulary,
            execution=Execution(dtype=torch.float32),
            listeners=Listeners(progress=False),
        )
    seconds = (time.perf_counter() - begin) / len(jobs)
    for job, result in zip(jobs, wanted, strict=True):
        with store.making(job.cells[0]) as scratch:
            found[result].save(scratch / BEGUN)
            _note(scratch, seconds)


def _recipe(start: Transfer, rank: int, seed: int) -> Recipe:
    draw = seed if start.drawn else 0
    options = PlanOptions(
        layers=start.layers, select=start.select, modules=start.modules, align_heads=start.align_heads, seed=draw,
        map_vocabulary=start.map_vocabulary,
    )  # fmt: skip
    return Recipe(options, Factorization(rank))


def _note(scratch: Path, seconds: float) -> None:
    write_json(scratch / "result.json", {"seconds": seconds})


def _start(layout: Layout, job: Job, store: Store) -> None:
    start, study = layout.starts[job.start], layout.study
    if isinstance(start, Transfer):
        scan(layout, [job], store)
        return
    seeds = layout.seeds(job.task, start) if start.needs_seeds else None
    draw = job.seed if start.drawn else 0
    begin = time.perf_counter()
    with store.making(job.cells[0]) as scratch:
        if isinstance(start, Transplant):
            made = _transplanted(layout, start, seeds, draw)
        else:
            assert isinstance(start, OwnStart)
            made = own_start(
                study.student, seeds, how=start.how, rank=study.training.rank, a_scale=1.0, seed=draw, progress=False
            )
        made.save(scratch / BEGUN)
        _note(scratch, time.perf_counter() - begin)


def _transplanted(layout: Layout, start: Transplant, seeds: Seeds | None, draw: int) -> Start:
    """A transplant or its control. Wrong units and noise have its α, which is chosen once for all of them and their draws."""
    student, rank, told = layout.study.student, layout.study.training.rank, Path(start.kept or "") / LINEAGE
    found = Lineage.load(told) if start.kept and told.is_file() else layout.lineage(start.base or start.teacher)

    def made(control: Control | None) -> Start:
        return transplant(
            start.teacher, student, seeds or "", base=start.base, adapter=start.adapter, rank=rank, lineage=found,
            control=control, anyway=start.anyway, progress=False,
        )  # fmt: skip

    if start.control in ("neutral", "repruned"):
        return made(start.control)
    if start.kept is not None:
        kept = Start.load(start.kept)
    else:
        key = (dataclasses.replace(start, control=None), seeds and seeds.fingerprint)
        if key not in layout.transplanted:
            layout.transplanted[key] = made(None)
        kept = layout.transplanted[key]
        if start.control is None:
            return kept
    control: Any = start.control
    return control_of(
        kept, control, draw, start.teacher, student, base=start.base, adapter=start.adapter, lineage=found
    )


def begin(
    layout: Layout, task: str, name: str, setting: Setting, seed: int, store: Store
) -> tuple[Any, dict[str, float]]:
    """The student as a training of this start begins; what is random is drawn anew for each seed.

    Also how many numbers learn ("trainable"), and the norm of B₀A₀ over all matrices ("norm").
    """
    start, cell = layout.starts[name], layout.start(task, name, seed)
    torch.manual_seed(seed)
    student = load_model(layout.study.student, dtype=torch.float32)
    if isinstance(start, PlainLora):
        lora = Lora(init=start.init, rank=layout.study.training.rank, modules=start.modules)
        targets = adapted(spec_of_model(student), lora.modules)
        rows = layout.learnt(task)
        drawn = draw_pairs(student, targets, lora, 1.0, rows=rows, seed=seed)
        begun: Extraction | Start = Start("start", drawn, {})
        model = inject(student, begun, mode=mode_of(lora))
    else:
        assert cell is not None or isinstance(start, FolderStart)
        folder = store.path(cell) / BEGUN if cell is not None else Path(getattr(start, "path", ""))
        begun = open_start(folder)
        model = inject(student, begun, mode=_mode(start))
    scale_a(model, setting.a_scale)
    each = [factors for pair in begun.pairs.values() for factors in pair.each()]
    # ‖BA‖² = tr(AAᵀ BᵀB), of rank × rank.
    norm = math.sqrt(sum(max(0.0, float(((a @ a.mT) * (b.mT @ b)).sum())) for a, b in each))
    return model, {"trainable": sum(a.numel() + b.numel() for a, b in each), "norm": norm}


def _mode(start: StartOptions) -> Any:
    return getattr(start, "mode", None) if isinstance(start, (Transfer, FolderStart)) else None


def _tune(layout: Layout, job: Job, store: Store) -> None:
    setting = job.setting
    assert setting is not None

    def make() -> dict[str, Any]:
        model, _ = begin(layout, job.task, job.start, setting, job.seed, store)
        epochs = layout.study.training.epochs * layout.study.rates.epochs
        try:
            _learn(layout, model, job, setting, epochs)
            losses = row_losses(model, layout.held_out(job.task))
        except DivergedError:
            return {"nll": None}
        nll = sum(loss for loss, _ in losses) / max(1, sum(count for _, count in losses))
        return {"nll": nll if math.isfinite(nll) else None}

    store.put(job.cells[0], make)


def _train(layout: Layout, job: Job, store: Store) -> None:
    """A training and its tests, the model in memory; each test is stored by itself, the training last.

    Where a judge is asked, all that needs the model is done and kept before: a judge that goes away costs no training.
    """
    setting = job.setting
    assert setting is not None
    *tests, train = job.cells
    kept = store.kept(train, "answers")
    there = all(store.has(cell) or store.kept(unjudged(cell), "answers").is_file() for cell in tests)
    model: Any = None
    if there and (store.has(train) or kept.is_file()):
        told = store.value(train) if store.has(train) else read_json(kept)
    else:
        model, told = _trained(layout, job, store)
        if any("judge" in cell.inputs for cell in tests):
            for cell in tests:
                if not (told["diverged"] or cell.inputs.get("before")):
                    _items(layout, model, cell, job.task, store)
            _keep(kept, told)
    for cell in tests:
        gone = told["diverged"] and not cell.inputs.get("before")
        store.put(cell, dict if gone else functools.partial(_measured, layout, model, cell, job.task, store))
    store.put(train, lambda: told)
    kept.unlink(missing_ok=True)


def _trained(layout: Layout, job: Job, store: Store) -> tuple[Any, dict[str, Any]]:
    """The model, tested before, and what is told of its training."""
    assert job.setting is not None
    model, learning = begin(layout, job.task, job.start, job.setting, job.seed, store)
    for cell in job.cells:
        if cell.inputs.get("before"):
            store.put(cell, functools.partial(_measured, layout, model, cell, job.task, store))
    started = time.perf_counter()
    steps: list[tuple[float, float]] = []
    told: dict[str, Any] = dict(learning)
    try:
        loss = _learn(layout, model, job, job.setting, layout.study.training.epochs, steps)
        told |= {"diverged": False, "loss": loss}
    except DivergedError as error:
        told |= {"diverged": True, "why": str(error)}
    told |= {
        "seconds": time.perf_counter() - started,
        "losses": [loss for loss, _ in steps],
        "clipped": sum(norm > CLIP for _, norm in steps) / max(1, len(steps)),
    }
    return model, told


def _untrained(layout: Layout, job: Job, store: Store) -> None:
    model = load_model(job.start, dtype=torch.float32)
    for cell in job.cells:
        store.put(cell, functools.partial(_measured, layout, model, cell, job.task, store))


def unjudged(cell: Cell) -> Cell:
    """The test as it would be without a judge, whose key its answers are kept under: another judge reads the same."""
    return Cell(cell.kind, {name: value for name, value in cell.inputs.items() if name != "judge"}, cell.labels)


def _items(layout: Layout, model: Any, cell: Cell, task: str, store: Store) -> dict[str, Any]:
    """The items of a test that need the model, and what it wrote, which is kept."""
    file = store.kept(unjudged(cell), "answers")
    if file.is_file():
        found: dict[str, Any] = read_json(file)
        return found
    spec: Measurement = layout.measurements(task)[cell.labels["test"]]
    if spec.lm_eval is not None:
        return {"items": {"lm_eval": harness_items(model, layout.tokenizer, spec.lm_eval)}}
    rows = layout.measured_on(spec.data, spec.limit)
    items, texts = measured(
        model,
        layout.tokenizer,
        rows,
        spec.metrics,
        answer=spec.answer,
        max_new_tokens=spec.max_new_tokens,
        stop=spec.stop,
    )
    found = {"items": items, "answers": texts}
    if texts:
        _keep(file, found)
    return found


def _keep(file: Path, value: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as scratch:
        write_json(scratch, value)


def _measured(layout: Layout, model: Any, cell: Cell, task: str, store: Store) -> dict[str, Any]:
    """The items of a test."""
    found = _items(layout, model, cell, task, store)
    items: dict[str, Any] = found["items"]
    spec: Measurement = layout.measurements(task)[cell.labels["test"]]
    if spec.judge is None:
        return items
    rows = layout.measured_on(spec.data, spec.limit)
    references, kept = [each[0].strip() for each in references_of(rows)], store.kept(cell, "judged", "jsonl")
    asked = instructions(rows, layout.tokenizer)
    return items | {"win_rate": win_rates(spec.judge, asked, found["answers"], references, kept)}


def _learn(
    layout: Layout,
    model: Any,
    job: Job,
    setting: Setting,
    epochs: float,
    steps: list[tuple[float, float]] | None = None,
) -> float:
    """Train; `steps` gets the loss and the gradient's norm of each step."""
    given, start = layout.study.training, layout.starts[job.start]
    longer = 1.0 + layout.extra(job.task, job.start)
    options = Training(
        epochs * longer, given.batch_size, given.micro_batch, setting.lr, given.warmup, given.scheduler,
        save_steps=None, seed=job.seed, precision=given.precision,
    )  # fmt: skip
    rows, taught = layout.learnt(job.task), layout.taught(job.task, start)
    with tempfile.TemporaryDirectory(prefix="pkt-study-") as folder:
        on_step = None if steps is None else lambda loss, norm: steps.append((loss, norm))
        return fit(model, rows, Path(folder), options, quietly=True, taught=taught, on_step=on_step)


def failure(error: BaseException) -> str:
    """What a job failed of, in one line."""
    return str(error).splitlines()[0] if isinstance(error, PktError) else f"{type(error).__name__}: {error}"[:500]
