"""What a study is: models, tasks, starts, rates and what is compared; read from YAML, or refused in one line."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pkt.errors import PktError
from pkt.lora import check_init
from pkt.options import AnswerRule, Lora
from pkt.studying.harness import Harness
from pkt.studying.judging import Judge
from pkt.studying.kinds import KINDS
from pkt.studying.kinds import FolderStart as FolderStart
from pkt.studying.kinds import OwnStart as OwnStart
from pkt.studying.kinds import PlainLora as PlainLora
from pkt.studying.kinds import StartOptions as StartOptions
from pkt.studying.kinds import Transfer as Transfer
from pkt.studying.kinds import Transplant as Transplant
from pkt.studying.metrics import Metric
from pkt.studying.yaml_files import Placed, read_yaml


@dataclass(frozen=True)
class Measurement:
    """Rows in pkt's form that a trained model is measured on, or a task of the harness. answer: how an answer is taken from a text
    (`pkt evaluate`); stop: texts that end an answer, where a model runs on into a next question; judge: who says whether an answer
    is better than the row's (win_rate)."""

    data: str = ""
    metrics: tuple[Metric, ...] = ("nll",)
    answer: AnswerRule = "mark"
    max_new_tokens: int = 128
    limit: int | None = None
    stop: tuple[str, ...] = ()
    judge: Judge | None = None
    lm_eval: Harness | None = None


@dataclass(frozen=True)
class Task:
    """seeds: rows that starts are made of; train: rows learnt from, the first `rows` of them; held_out: how many of the last rows
    of `train`, or a file, choose the rates; decides: the test's metric that the verdict is about."""

    train: str
    held_out: int | str
    tests: dict[str, Measurement]
    decides: str
    seeds: str | None = None
    rows: int | None = None


NEXT = "next"
HARNESS: Metric = "lm_eval"
COST: Literal["cost"] = "cost"
CHARGED = "lora, charged"


@dataclass(frozen=True)
class Panel:
    """One option of a start (`of`), varied: a variant for each value in `over`."""

    of: str
    vary: str
    over: tuple[str | int | float | bool, ...]


@dataclass(frozen=True)
class Fitting:
    """How every start is trained. dropout is 0, so that nothing but the start differs."""

    rank: int = 16
    epochs: float = 3.0
    batch_size: int = 64
    micro_batch: int = 8
    scheduler: str = "linear"
    warmup: float = 0.0
    max_length: int = 2048
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


@dataclass(frozen=True)
class Rates:
    """The grid that every start is tuned on, with training seeds that are not reported. extend: how often it grows where the best
    is at its end; epochs: of a tuning, as a share of the training's."""

    lr: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    a_scale: tuple[float, ...] = (1.0, 3.0, 8.0)
    seeds: tuple[int, ...] = (1000,)
    epochs: float = 0.5
    extend: int = 1


@dataclass(frozen=True)
class Compare:
    """of: the start whose gain is asked for; controls: those it is held against, all others by default; margin: what would
    matter, by metric, in its own unit (nats for nll, a share for the others)."""

    of: str
    controls: tuple[str, ...] = ()
    level: float = 0.95
    margin: dict[str, float] = field(
        default_factory=lambda: {"nll": 0.02, "exact_match": 0.01, "choice": 0.01, "rouge_l": 0.01, "win_rate": 0.02}
    )


@dataclass(frozen=True)
class Study:
    """A study, resolved: files and folders as absolute paths or Hub names. seeds: of training; general: text beside every table."""

    student: str
    tasks: dict[str, Task]
    starts: dict[str, StartOptions]
    compare: Compare
    teachers: dict[str, str] = field(default_factory=dict)
    panels: dict[str, Panel] = field(default_factory=dict)
    training: Fitting = field(default_factory=Fitting)
    rates: Rates = field(default_factory=Rates)
    seeds: int | tuple[int, ...] = 5
    general: str | None = None
    study: str = "study"

    @property
    def training_seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def varied(self) -> dict[str, StartOptions]:
        """All starts by name: those that are named, and each variant of a panel ("panel=value")."""
        found = dict(self.starts)
        for name, panel in self.panels.items():
            for value in panel.over:
                found[f"{name}={value}"] = dataclasses.replace(self.starts[panel.of], **{panel.vary: value})  # type: ignore[arg-type]
        return found

    def seeds_of(self, task: str, start: StartOptions) -> str:
        """The task whose seeds a start is made of."""
        names = list(self.tasks)
        return names[(names.index(task) + 1) % len(names)] if start.seeds_of == NEXT else start.seeds_of or task

    def charged(self) -> Study:
        """With a plain LoRA that trains as much longer as `compare.of` costs, where nothing of the kind is there."""
        of = self.starts[self.compare.of]
        plain = [s for s in self.starts.values() if isinstance(s, PlainLora) and s.init == "default"]
        if (
            CHARGED in self.starts
            or isinstance(of, FolderStart)
            or any(s.extra_steps or not of.needs_seeds for s in plain)
        ):
            return self
        controls = self.compare.controls and (*self.compare.controls, CHARGED)
        starts = {**self.starts, CHARGED: PlainLora(extra_steps=COST)}
        return dataclasses.replace(self, starts=starts, compare=dataclasses.replace(self.compare, controls=controls))


def read_study(
    file: Path, given: Mapping[str, Any] | None = None, source: str | None = None, *, planned: bool = False
) -> Study:
    """The study in a YAML file; `given` fills its ${NAME} places. Raises `PktError`, with file, line and the nearest key.

    planned: only to be planned, so that places that are not given stay as they stand, and files need not be there.
    """
    placed = read_yaml(file)
    source = source or str(file)
    home = _Home(file.absolute().parent, source, dict(given or {}), planned)
    raw = home.filled(placed)
    starts = raw.value.get("starts")
    if isinstance(starts, Placed) and isinstance(starts.value, dict):
        raw.value["starts"] = Placed(_with_likes(starts.value, source), starts.line)
    study: Study = _dataclass(Study, raw, "", source)
    if "study" not in raw.value:
        study = dataclasses.replace(study, study=file.stem)
    _check(study, source, raw)
    return home.resolved(study).charged()


def _with_likes(starts: dict[str, Placed], source: str) -> dict[str, Placed]:
    """`like: other` copies a start's keys."""

    def keys(name: str, on_the_way: tuple[str, ...]) -> dict[str, Placed]:
        placed = starts[name]
        if not isinstance(placed.value, dict):
            raise PktError(f"{source}:{placed.line}: starts.{name} must be a mapping with a kind")
        own = dict(placed.value)
        like = own.pop("like", None)
        if like is None:
            return own
        if not isinstance(like.value, str) or like.value not in starts or like.value in (*on_the_way, name):
            raise PktError(
                f"{source}:{like.line}: like: {like.value} is no other start{_near(str(like.value), starts)}"
            )
        return {**keys(like.value, (*on_the_way, name)), **own}

    return {name: Placed(keys(name, ()), placed.line) for name, placed in starts.items()}


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, [str(k) for k in known], 1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(map(str, known))}"


def _dataclass(cls: Any, placed: Placed, path: str, source: str) -> Any:
    where = f"{source}:{placed.line}"
    if not isinstance(placed.value, dict):
        raise PktError(f"{where}: {path or 'the file'} must be a mapping, not {placed.plain()!r}")
    values = dict(placed.value)
    if cls is StartOptions:
        kind = values.pop("kind", None)
        if kind is None or not isinstance(kind.value, str) or kind.value not in KINDS:
            said = "has no kind" if kind is None else f"is of the unknown kind {kind.value!r}"
            raise PktError(f"{where}: {path} {said}; kinds are {', '.join(KINDS)}")
        cls = KINDS[kind.value]
    hints, known = get_type_hints(cls), {f.name: f for f in fields(cls)}
    for name, value in values.items():
        if name not in known:
            raise PktError(f"{source}:{value.line}: {_join(path, name)} is unknown{_near(name, known)}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise PktError(f"{where}: {_join(path, name)} is missing")
    return cls(**{name: _value(hints[name], value, _join(path, name), source) for name, value in values.items()})


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _value(kind: Any, placed: Placed, path: str, source: str) -> Any:
    """A placed value as the type of a field wants it. Raises `PktError` for another type."""
    origin, parts, value = get_origin(kind), get_args(kind), placed.value
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, placed, path, source)
    if origin is dict:
        if isinstance(value, dict):
            return {name: _value(parts[1], entry, _join(path, name), source) for name, entry in value.items()}
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_value(parts[0], entry, f"{path}[{i}]", source) for i, entry in enumerate(value))
    elif origin in (Union, types.UnionType):
        for part in parts:
            if _fits(part, value):
                return _value(part, placed, path, source)
    elif _fits(kind, value):
        return float(value) if kind is float else value
    raise PktError(f"{source}:{placed.line}: {path} must be {_spoken(kind)}, not {placed.plain()!r}")


def _fits(kind: Any, value: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts and not isinstance(value, bool)
    if origin in (dict, tuple) or dataclasses.is_dataclass(kind):
        return isinstance(value, list if origin is tuple else dict)
    if kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


def _spoken(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, types.UnionType):
        return " or ".join(_spoken(p) for p in parts if p is not type(None))
    if origin is tuple:
        return f"a list, each {_spoken(parts[0])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}
    return names.get(origin or kind, "a mapping")


_PLACE = re.compile(r"\$\{(\w+)(\?)?\}")


class _Home:
    """Where the names in a study lead: beside its file, into pkt's own assets (demo:NAME), or to the Hub."""

    def __init__(self, folder: Path, source: str, given: dict[str, Any], planned: bool) -> None:
        self.folder, self.source, self.given, self.planned = folder, source, given, planned

    def filled(self, placed: Placed) -> Placed:
        """${NAME} as given, and ${NAME?} where it need not be. Raises `PktError` for one that must be and is not."""
        value = placed.value
        if isinstance(value, dict):
            return Placed({name: self.filled(entry) for name, entry in value.items()}, placed.line)
        if isinstance(value, list):
            return Placed([self.filled(entry) for entry in value], placed.line)
        if not isinstance(value, str):
            return placed
        for name, optional in _PLACE.findall(value):
            if self.given.get(name) is None and not optional:
                if self.planned:
                    return placed
                raise PktError(f"{self.source} needs --{name.replace('_', '-')}")
        whole = _PLACE.fullmatch(value)
        if whole is not None:
            return Placed(self.given.get(whole[1]), placed.line)
        return Placed(_PLACE.sub(lambda found: str(self.given.get(found[1]) or ""), value), placed.line)

    def resolved(self, study: Study) -> Study:
        tasks = {
            name: dataclasses.replace(
                task,
                seeds=None if task.seeds is None else self.file(task.seeds),
                train=self.file(task.train),
                held_out=task.held_out if isinstance(task.held_out, int) else self.file(task.held_out),
                tests={n: self._test(t) for n, t in task.tests.items()},
            )
            for name, task in study.tasks.items()
        }
        starts = {name: self._start(start, study) for name, start in study.starts.items()}
        return dataclasses.replace(
            study,
            student=self.place(study.student),
            teachers={name: self.place(model) for name, model in study.teachers.items()},
            tasks=tasks,
            starts=starts,
            general=None if study.general is None else self.file(study.general),
        )

    def _test(self, test: Measurement) -> Measurement:
        """A win rate has its control beside it: the judge that prefers the longer answer."""
        metrics, judge, harness = test.metrics, test.judge, test.lm_eval
        if harness is not None:
            include = harness.include and self.place(harness.include)
            return dataclasses.replace(test, metrics=(HARNESS,), lm_eval=dataclasses.replace(harness, include=include))
        if "win_rate" in metrics and "longest_wins" not in metrics:
            metrics = (*metrics, "longest_wins")
        if judge is not None and judge.endpoint is None:
            judge = dataclasses.replace(judge, model=self.place(judge.model))
        return dataclasses.replace(test, data=self.file(test.data), metrics=metrics, judge=judge)

    def _start(self, start: StartOptions, study: Study) -> StartOptions:
        changes: dict[str, Any] = {}
        for name in ("base", "adapter", "kept", "path", "teacher_targets"):
            if getattr(start, name, None):
                changes[name] = self.place(getattr(start, name))
        if isinstance(start, (Transfer, Transplant)):
            changes["teacher"] = self.place(study.teachers[start.teacher])
        return dataclasses.replace(start, **changes)

    def place(self, name: str) -> str:
        """A model's or a folder's: a path where there is one, else as it stands."""
        if name.startswith("demo:"):
            return str(Path(__file__).parents[1] / "demo" / "assets" / name.removeprefix("demo:"))
        beside = self.folder / Path(name).expanduser()
        return str(beside) if beside.exists() else name

    def file(self, name: str) -> str:
        found = self.place(name)
        if not Path(found).is_file() and not self.planned:
            raise PktError(f"{self.source}: {name} is not a file (looked beside the study, in {self.folder})")
        return found


def _check(study: Study, source: str, raw: Placed) -> None:
    """What one value cannot tell by itself."""

    def line(*path: str) -> str:
        placed = raw
        for name in path:
            below = placed.value.get(name) if isinstance(placed.value, dict) else None
            placed = below if isinstance(below, Placed) else placed
        return f"{source}:{placed.line}"

    for name, task in study.tasks.items():
        _check_task(name, task, line("tasks", name))
    if not study.tasks or not study.starts:
        raise PktError(f"{source}: a study needs at least one task and two starts")
    for name, start in study.starts.items():
        at = line("starts", name)
        if start.needs_seeds and start.seeds_of is None and any(t.seeds is None for t in study.tasks.values()):
            raise PktError(f"{at}: starts.{name} is made of the tasks' seeds; give each task seeds")
        if start.seeds_of == NEXT and len(study.tasks) < 2:
            raise PktError(f"{at}: seeds_of: {NEXT} needs another task, and there is one")
        if start.seeds_of not in (None, NEXT) and start.seeds_of not in study.tasks:
            raise PktError(f"{at}: seeds_of: {start.seeds_of} is no task{_near(start.seeds_of, study.tasks)}")
        if isinstance(start, (Transfer, Transplant)) and start.teacher not in study.teachers:
            raise PktError(
                f"{at}: teacher: {start.teacher or 'none'} is not among teachers{_near(start.teacher, study.teachers)}"
            )
        if isinstance(start, Transplant) and start.kept is not None and not start.drawn:
            raise PktError(f"{at}: starts.{name}.kept is of a control at its α: wrong-units or noise")
        if start.teacher_targets is not None and not 0 <= start.mix <= 1:
            raise PktError(
                f"{at}: starts.{name}.mix={start.mix} must be from 0 (the rows alone) to 1 (the teacher alone)"
            )
        if isinstance(start, PlainLora):
            try:
                check_init(Lora(start.init, study.training.rank))
            except PktError as error:
                raise PktError(f"{at}: starts.{name}: {error}") from None
        if isinstance(start, FolderStart) and not start.path:
            raise PktError(f"{at}: starts.{name} needs the path of a folder")
    for name, panel in study.panels.items():
        of = study.starts.get(panel.of)
        options = [] if of is None else [f.name for f in fields(of)]
        if panel.vary not in options:
            what = f"of: {panel.of} is no start{_near(panel.of, study.starts)}"
            at = line("panels", name)
            raise PktError(
                f"{at}: {what if of is None else f'vary: {panel.vary} is no option{_near(panel.vary, options)}'}"
            )
        kind = get_type_hints(type(of))[panel.vary]
        for value in panel.over:
            _value(kind, Placed(value, raw.value["panels"].line), f"panels.{name}.over", source)
    ours = study.compare.of
    for name in (ours, *study.compare.controls):
        if name not in study.starts:
            raise PktError(f"{line('compare')}: {name} is no start{_near(name, study.starts)}")
    if len(study.starts) < 2:
        raise PktError(f"{line('starts')}: nothing to compare {ours} with; add a control, such as lora: {{kind: lora}}")
    _check_rates(study, line("rates"))
    if len(study.training_seeds) < 1 or len(set(study.training_seeds)) != len(study.training_seeds):
        raise PktError(f"{line('seeds')}: seeds must be a count of at least 1, or a list without doubles")


def _check_task(name: str, task: Task, at: str) -> None:
    metrics = [f"{n}.{metric}" for n, t in task.tests.items() for metric in ((HARNESS,) if t.lm_eval else t.metrics)]
    if task.decides not in metrics:
        raise PktError(
            f"{at}: tasks.{name}.decides: {task.decides} is measured by no test{_near(task.decides, metrics)}"
        )
    for test, spec in task.tests.items():
        if bool(spec.data) == (spec.lm_eval is not None):
            raise PktError(f"{at}: tasks.{name}.tests.{test} needs data, or a task of lm_eval, and not both")
        if ("win_rate" in spec.metrics) != (spec.judge is not None):
            raise PktError(f"{at}: tasks.{name}.tests.{test}: win_rate and judge belong together; give both or neither")
        endpoint = None if spec.judge is None else spec.judge.endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise PktError(
                f"{at}: tasks.{name}.tests.{test}: the endpoint {endpoint} must begin with http:// or https://"
            )
    if isinstance(task.held_out, int) and task.held_out < 1:
        raise PktError(
            f"{at}: tasks.{name}.held_out must be at least one row: rates are chosen by rows not learnt from"
        )


def _check_rates(study: Study, at: str) -> None:
    rates = study.rates
    if not rates.lr or not rates.a_scale or not rates.seeds:
        raise PktError(f"{at}: rates needs at least one lr, one a_scale and one seed")
    for name, values in (("lr", rates.lr), ("a_scale", rates.a_scale), ("epochs", (rates.epochs,))):
        if any(not 0 < v < float("inf") for v in values):
            raise PktError(f"{at}: rates.{name} must be positive")
    if list(rates.lr) != sorted(set(rates.lr)) or list(rates.a_scale) != sorted(set(rates.a_scale)):
        raise PktError(f"{at}: rates.lr and rates.a_scale must grow, without doubles")
    if set(rates.seeds) & set(study.training_seeds):
        raise PktError(f"{at}: rates.seeds and seeds share a value; what is tuned on must not be reported")
    if not 0.5 <= study.compare.level < 1:
        raise PktError(f"{at}: compare.level must be a share such as 0.95")
