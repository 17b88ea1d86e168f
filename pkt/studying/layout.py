"""A study as cells: which there are, what each is made from, and which can be made now.

Nothing here runs anything. What is done is known from the store alone: rates are chosen from the tunings in it, and the
trainings follow from the rates.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pkt.adapters import check_fit
from pkt.errors import PktError
from pkt.extraction import Start, open_start
from pkt.files import sha256
from pkt.lora import ROWS
from pkt.matching import Lineage, lineage
from pkt.models import Model, ModelSpec, load_tokenizer, spec_of
from pkt.models.adapter_files import WEIGHTS
from pkt.seeds import Seeds, load_seeds
from pkt.studying import costs
from pkt.studying.harness import needs_harness
from pkt.studying.judging import TEMPLATE, Judge
from pkt.studying.metrics import DECODED, references_of
from pkt.studying.schema import FolderStart, Measurement, PlainLora, StartOptions, Study, Transfer
from pkt.studying.store import Cell, Store
from pkt.targets import Targets
from pkt.training import Distillation, distillation

GENERAL = "general"
UNTRAINED = "untrained"  # the models that are not trained, where a start is named
# Options of a training that are in every key; later ones, only where they are not at their defaults.
ALWAYS = ("rank", "epochs", "batch_size", "micro_batch", "scheduler", "warmup", "max_length", "precision")
SMALL = 5_000_000  # numbers of a student below which one thread trains it


@dataclass(frozen=True)
class Setting:
    """A point of the grid."""

    lr: float
    a_scale: float


@dataclass(frozen=True)
class Job:
    """Cells that are made together, in order: one start, one tuning, or a training with its tests."""

    kind: str
    cells: tuple[Cell, ...]
    task: str = ""
    start: str = ""
    seed: int = 0
    setting: Setting | None = None

    def __str__(self) -> str:
        words = [self.kind, self.task, self.start]
        if self.setting is not None:
            words.append(f"lr {self.setting.lr:g}, A × {self.setting.a_scale:g}, seed {self.seed}")
        return " ".join(filter(None, words))


class Layout:
    """The cells of a study. Rows and models are read once, when asked for.

    only: patterns of tasks, starts or task/start, of which alone cells are made; default: all. Raises `PktError` for one that
    names nothing.
    """

    def __init__(self, study: Study, only: Sequence[str] = ()) -> None:
        self.study, self.only = study, tuple(only)
        self.transplanted: dict[Any, Start] = {}  # what a transplant keeps, made once for all that are held against it
        self.starts = study.varied()
        pairs = [(task, name) for task in study.tasks for name in (*self.starts, UNTRAINED)]
        for pattern in self.only:
            if not any(_names(pattern, task, name) for task, name in pairs):
                raise PktError(
                    f"--only {pattern} names no task, start or task/start; tasks are {', '.join(study.tasks)}, starts "
                    f"{', '.join(self.starts)}, or {UNTRAINED}"
                )

    def asked(self, task: str, name: str) -> bool:
        """Whether the cells of a start on a task are to be made."""
        return not self.only or any(_names(pattern, task, name) for pattern in self.only)

    # Inputs ---------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.study.student)

    @functools.cache  # noqa: B019  # one layout lives as long as its study
    def model(self, name: str) -> dict[str, str]:
        """Hashes of a model's weights and configuration."""
        return Model.of(name).content()

    @functools.cache  # noqa: B019
    def rows(self, file: str) -> Seeds:
        found = load_seeds(file, self.tokenizer, max_length=self.study.training.max_length)
        spec = Model.of(self.study.student).spec
        found.check_fits(spec.vocab_size, spec.positions, spec.name)
        return found

    @functools.cache  # noqa: B019
    def lineage(self, root: str) -> Lineage:
        """Of the student and what it was cut from, found once for all controls of a transplant."""
        return lineage(root, self.study.student, progress=False)

    @functools.cache  # noqa: B019
    def learnt(self, name: str) -> Seeds:
        """The rows that a task trains on. Raises `PktError` where some of them choose the rates too."""
        task = self.study.tasks[name]
        rows = self.rows(task.train)
        kept = len(rows) - (task.held_out if isinstance(task.held_out, int) else 0)
        count = kept if task.rows is None else task.rows
        if kept <= 0:
            raise PktError(
                f"{rows.source} has {len(rows)} rows, and {task.held_out} of them are to choose rates by, so that none is left to "
                "learn from; give more rows, or hold out fewer (held_out in the study)"
            )
        if not 0 < count <= kept:
            raise PktError(
                f"{rows.source} has {len(rows)} rows; {count} to learn from and {task.held_out} to choose rates by are more"
            )
        return head(rows, count)

    @functools.cache  # noqa: B019
    def held_out(self, name: str) -> Seeds:
        task = self.study.tasks[name]
        if isinstance(task.held_out, str):
            found, learnt = self.rows(task.held_out), {tuple(row.input_ids) for row in self.learnt(name)}
            both = sum(tuple(row.input_ids) in learnt for row in found)
            if both:
                raise PktError(
                    f"{task.held_out}: {both} of its {len(found)} rows are learnt from too ({task.train}); rates are chosen by "
                    "others"
                )
            return found
        rows = self.rows(task.train)
        return Seeds(list(rows[len(rows) - task.held_out :]), rows.source, rows.pad_id, rows.today)

    def seeds(self, task: str, start: StartOptions) -> Seeds:
        """The rows that a start is made of."""
        file = self.study.tasks[self.study.seeds_of(task, start)].seeds
        assert file is not None
        rows = self.rows(file)
        if start.seeds is not None and not 0 < start.seeds <= len(rows):
            raise PktError(f"{rows.source} has {len(rows)} rows; a start asks for the first {start.seeds}")
        return rows if start.seeds is None else head(rows, start.seeds)

    def check(self) -> None:
        """Read all rows and models there are to read. Raises `PktError` for what would stop the study after hours."""
        for task in self.study.tasks:
            self.learnt(task)
            self.held_out(task)
            for measured in self.measurements(task).values():
                if measured.lm_eval is not None:
                    needs_harness()
                else:
                    self.measured_on(measured.data, measured.limit)
            for name, start in self.starts.items():
                self.tune(task, name, Setting(1.0, 1.0), 0)
                self.taught(task, start)
        for start in self.starts.values():
            if isinstance(start, FolderStart):
                check_fit(open_start(start.path).pairs, spec_of(self.study.student), start.path)

    # Cells ----------------------------------------------------------------------------------------------------------

    def start(self, task: str, name: str, seed: int) -> Cell | None:
        """What a training of this seed begins from; None where it is drawn as it begins, or lies in a folder."""
        start = self.starts[name]
        if isinstance(start, (PlainLora, FolderStart)):
            return None
        inputs: dict[str, Any] = {
            "student": self.model(self.study.student),
            "rank": self.study.training.rank,
            "options": self._options(start),
            **({"draw": seed} if start.drawn else {}),
        }
        if start.needs_seeds:
            inputs["seeds"] = self.seeds(task, start).fingerprint
        labels = {"task": task, "start": name, **({"draw": seed} if start.drawn else {})}
        return Cell("start", inputs, labels)

    def _options(self, start: StartOptions) -> dict[str, Any]:
        """What differs from the defaults, models by their content."""
        left = ("seeds_of", "seeds", "extra_steps", "teacher_targets", "mix")
        found = changed(start, *left)
        for name in ("teacher", "base"):
            if name in found:
                found[name] = self.model(found[name])
        for name in ("adapter", "kept", "path"):
            if name in found:
                file = Path(found[name]) / WEIGHTS
                if not file.is_file():
                    raise PktError(f"{found[name]} has no {WEIGHTS}; name a folder that pkt or PEFT wrote")
                found[name] = sha256(file.read_bytes())
        return {"kind": start.kind, **found}

    def _begun(self, task: str, name: str, seed: int) -> dict[str, Any]:
        """The start, as an input of a training."""
        cell, start = self.start(task, name, seed), self.starts[name]
        if cell is not None:
            found: dict[str, Any] = {"start": cell.key}
            if isinstance(start, Transfer) and start.mode != "paired":
                found["mode"] = start.mode
        else:
            found = {"start": self._options(start), "student": self.model(self.study.student)}
        extra = self.extra(task, name)
        if extra:
            found["extra_steps"] = extra
        if start.teacher_targets is not None:
            found |= {"teacher_targets": self.targets(start.teacher_targets).told["sha256"], "mix": start.mix}
        return found

    @functools.cache  # noqa: B019
    def cost(self, task: str, name: str) -> float:
        """What making a start costs, as a share of its training."""
        start, learnt = self.starts[name], self.learnt(task)
        if isinstance(start, PlainLora):
            tokens = head(learnt, min(ROWS, len(learnt))).tokens
        else:
            tokens = self.seeds(task, start).tokens if start.needs_seeds else 0
        teacher = Model.of(start.teacher).spec if isinstance(start, Transfer) else None
        trained = learnt.tokens * self.study.training.epochs
        return costs.share(start, Model.of(self.study.student).spec, teacher, seeds=tokens, learnt=trained)

    def extra(self, task: str, name: str) -> float:
        """The share of further steps that a start is trained for."""
        asked = self.starts[name].extra_steps
        return self.cost(task, self.study.compare.of) if isinstance(asked, str) else asked

    @functools.cache  # noqa: B019
    def targets(self, folder: str) -> Targets:
        return Targets.load(folder)

    def taught(self, task: str, start: StartOptions) -> Distillation | None:
        """What a teacher says of the rows. Raises `PktError` for targets of other rows or another tokenizer."""
        if start.teacher_targets is None:
            return None
        spec, rows = Model.of(self.study.student).spec, self.learnt(task)
        return distillation(self.targets(start.teacher_targets), start.mix, rows, self.tokenizer, spec)

    def _training(self, epochs: float = 1.0) -> dict[str, Any]:
        """How a training goes; epochs: a share of those asked for."""
        given = dataclasses.replace(self.study.training, epochs=self.study.training.epochs * epochs)
        return {**{name: getattr(given, name) for name in ALWAYS}, **changed(given, *ALWAYS)}

    def tune(self, task: str, name: str, setting: Setting, seed: int) -> Cell:
        rates = self.study.rates
        inputs = {
            **self._begun(task, name, seed),
            "rows": self.learnt(task).fingerprint,
            "held_out": self.held_out(task).fingerprint,
            "training": self._training(rates.epochs),
            **vars(setting),
            "seed": seed,
        }
        return Cell("tune", inputs, {"task": task, "start": name, **vars(setting), "seed": seed})

    def train(self, task: str, name: str, setting: Setting, seed: int) -> Cell:
        inputs = {
            **self._begun(task, name, seed),
            "rows": self.learnt(task).fingerprint,
            "training": self._training(),
            **vars(setting),
            "seed": seed,
        }
        return Cell("train", inputs, {"task": task, "start": name, **vars(setting), "seed": seed})

    def measurements(self, task: str) -> dict[str, Measurement]:
        """A task's tests, and general text."""
        general = {} if self.study.general is None else {GENERAL: Measurement(self.study.general)}
        return {**self.study.tasks[task].tests, **general}

    def test(self, of: Cell | str, test: str, task: str, *, before: bool = False) -> Cell:
        """The test of a training, before it or after; or of a model that was not trained."""
        spec = self.measurements(task)[test]
        inputs: dict[str, Any] = {
            **self._asked(spec),
            **({"model": self.model(of)} if isinstance(of, str) else {"train": of.key}),
            **({"before": True} if before else {}),
        }
        if "exact_match" in spec.metrics:
            inputs["answer"] = spec.answer
        if "rouge_l" in spec.metrics:
            inputs["rouge_l"] = 2  # the answer without what a template puts after it
        if DECODED & set(spec.metrics):
            inputs["max_new_tokens"] = spec.max_new_tokens
            if spec.stop:
                inputs["stop"] = list(spec.stop)
        if {"exact_match", "rouge_l"} & set(spec.metrics):
            several = references_of(self.measured_on(spec.data, spec.limit))
            if any(len(each) > 1 for each in several):
                inputs["references"] = sha256(json.dumps(several))
        if spec.judge is not None:
            inputs["judge"] = self.judge(spec.judge)
        labels = {"model": of} if isinstance(of, str) else dict(of.labels)
        return Cell("test", inputs, {**labels, "task": task, "test": test, **({"when": "before"} if before else {})})

    def _asked(self, spec: Measurement) -> dict[str, Any]:
        if spec.lm_eval is not None:
            return {"lm_eval": spec.lm_eval.inputs()}
        return {"rows": self.measured_on(spec.data, spec.limit).fingerprint, "metrics": list(spec.metrics)}

    @functools.cache  # noqa: B019
    def judge(self, judge: Judge) -> dict[str, Any]:
        """What an opinion depends on: which model is asked, and how; not where it is served."""
        here = judge.endpoint is None
        return {"model": self.model(judge.model) if here else judge.model, "template": TEMPLATE}

    @functools.cache  # noqa: B019
    def measured_on(self, file: str, limit: int | None) -> Seeds:
        """The rows of a test."""
        rows = self.rows(file)
        return rows if limit is None else head(rows, limit)

    def tests(self, of: Cell | str, task: str, *, before: bool = False) -> dict[str, Cell]:
        return {name: self.test(of, name, task, before=before) for name in self.measurements(task)}

    def untrained(self) -> list[str]:
        return list(dict.fromkeys([self.study.student, *self.study.teachers.values()]))

    # What can be made now -------------------------------------------------------------------------------------------

    def grid(self, task: str, store: Store) -> list[Setting]:
        """The settings that every start of a task is tuned at: grown at the ends that are some start's best, for all alike."""
        rates, ratio = self.study.rates, _ratio(self.study.rates.lr)
        lrs, scales = list(rates.lr), rates.a_scale
        for _ in range(rates.extend):
            found = [self._best(task, name, _grid(lrs, scales), store) for name in self.starts]
            if any(best is None for best in found):
                break
            ends = {best.lr for best in found if best is not None}
            grown = ([lrs[0] / ratio] if lrs[0] in ends else []) + lrs + ([lrs[-1] * ratio] if lrs[-1] in ends else [])
            if grown == lrs:
                break
            lrs = grown
        return _grid(lrs, scales)

    def chosen(self, task: str, name: str, store: Store) -> Setting | None:
        """The setting a start is reported at; None while the task is not tuned."""
        grid = self.grid(task, store)
        # The grid may grow for the sake of another start.
        if any(self._best(task, other, grid, store) is None for other in self.starts):
            return None
        return self._best(task, name, grid, store)

    def _best(self, task: str, name: str, grid: list[Setting], store: Store) -> Setting | None:
        """The smallest held-out NLL, of as good ones, or where all diverged, the smallest rate; None while a tuning is missing."""
        losses = self.curve(task, name, grid, store)
        return None if losses is None else min(losses, key=lambda s: (losses[s], s.lr, s.a_scale))

    def curve(self, task: str, name: str, grid: list[Setting], store: Store) -> dict[Setting, float] | None:
        """Mean held-out NLL over the tuning seeds by setting, infinite where one diverged; None while a tuning is missing."""
        found = {}
        for setting in grid:
            cells = [self.tune(task, name, setting, seed) for seed in self.study.rates.seeds]
            if not all(map(store.has, cells)):
                return None
            values = [store.value(cell)["nll"] for cell in cells]
            found[setting] = math.inf if None in values else sum(values) / len(values)
        return found

    def threads(self, student: ModelSpec | None = None) -> int:
        """One for a student of a few million numbers: two that wait for each other take longer than one does the work."""
        small = costs.size(student or Model.of(self.study.student).spec) < SMALL
        return 1 if small else torch.get_num_threads()

    def jobs(self, store: Store, *, all_of_it: bool = False) -> Iterator[Job]:
        """What is missing and can be made from what is there; each cell once, whatever asks for it (a start that is made of another
        task's seeds is that task's own). all_of_it: what was not asked for too."""
        claimed: set[str] = set()
        for job in self._jobs(store):
            if not all_of_it and not self.asked(job.task, UNTRAINED if job.kind == UNTRAINED else job.start):
                continue
            cells = tuple(cell for cell in job.cells if cell.key not in claimed)
            claimed.update(cell.key for cell in cells)
            if cells:
                yield dataclasses.replace(job, cells=cells)

    def _jobs(self, store: Store) -> Iterator[Job]:
        for task in self.study.tasks:
            for model in self.untrained():
                missing = [c for c in self.tests(model, task).values() if not store.has(c)]
                if missing:
                    yield Job(UNTRAINED, tuple(missing), task, model)
        wanted = [(task, name) for task in self.study.tasks for name in self.starts]
        for task, name in wanted:
            yield from self._starts_missing(task, name, store)
        for task, name in wanted:
            yield from self._tunes_missing(task, name, store)
        for task, name in wanted:
            yield from self._trains_missing(task, name, store)

    def _starts_missing(self, task: str, name: str, store: Store) -> Iterator[Job]:
        drawn = self.starts[name].drawn
        for seed in (*self.study.rates.seeds, *self.study.training_seeds) if drawn else (0,):
            cell = self.start(task, name, seed)
            if cell is not None and not store.has(cell):
                yield Job("start", (cell,), task, name, seed)

    def _ready(self, task: str, name: str, seed: int, store: Store) -> bool:
        cell = self.start(task, name, seed)
        return cell is None or store.has(cell)

    def _tunes_missing(self, task: str, name: str, store: Store) -> Iterator[Job]:
        for setting in self.grid(task, store):
            for seed in self.study.rates.seeds:
                cell = self.tune(task, name, setting, seed)
                if not store.has(cell) and self._ready(task, name, seed, store):
                    yield Job("tune", (cell,), task, name, seed, setting)

    def _trains_missing(self, task: str, name: str, store: Store) -> Iterator[Job]:
        setting = self.chosen(task, name, store)
        if setting is None:
            return
        for seed in self.study.training_seeds:
            cells = self.of_training(task, name, setting, seed)
            if not all(map(store.has, cells)) and self._ready(task, name, seed, store):
                yield Job("train", tuple(cells), task, name, seed, setting)

    def of_training(self, task: str, name: str, setting: Setting, seed: int) -> list[Cell]:
        """A training and its tests; the first seed's also before it."""
        train = self.train(task, name, setting, seed)
        before = self.tests(train, task, before=True) if seed == self.study.training_seeds[0] else {}
        return [*before.values(), *self.tests(train, task).values(), train]


def changed(options: Any, *left: str) -> dict[str, Any]:
    """The options that are not at their defaults, but for those in `left`: a new option with a default is in no key."""
    found = {f.name: (getattr(options, f.name), f.default) for f in dataclasses.fields(options) if f.name not in left}
    return {name: value for name, (value, default) in found.items() if value != default}


def _names(pattern: str, task: str, name: str) -> bool:
    return any(fnmatch.fnmatchcase(text, pattern) for text in (task, name, f"{task}/{name}"))


def head(rows: Seeds, count: int) -> Seeds:
    return Seeds(list(rows[:count]), rows.source, rows.pad_id, rows.today)


def _grid(lrs: list[float], scales: tuple[float, ...]) -> list[Setting]:
    return [Setting(lr, scale) for lr in lrs for scale in scales]


def _ratio(lrs: tuple[float, ...]) -> float:
    return lrs[-1] / lrs[-2] if len(lrs) > 1 else 2.0
