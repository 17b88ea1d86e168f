"""The first half of the work in one call: seeds, sensitivity, plan and extraction, everything checked before it starts.

The teacher is scored part by part (`pkt.streaming.engine`). As soon as a part's scores are complete its regions are chosen and
factorized, and the scores are forgotten (`pkt.transferring.extractor`).

With an output folder, every finished part is a checkpoint in a hidden folder beside it (`.NAME.run`, see `checkpoints`), bound to
the inputs. The same command continues there after any interruption and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkt.errors import PktError
from pkt.extraction import Extraction, extract
from pkt.files import os_errors
from pkt.models import Model, read_roles
from pkt.options import Execution, Factorization, KeepScores, Limits, Loss, PlanOptions, Reading, Select, Split, Svd
from pkt.planning import Chooser, ModuleMap, TransferPlan, read_map
from pkt.planning.regions import BLOCK
from pkt.progress import bar
from pkt.scoring import score_seeds
from pkt.streaming import (
    Boundaries,
    Engine,
    Key,
    MemoryPlan,
    NotLayeredError,
    Progress,
    Teacher,
    Tick,
    measured_seconds,
    open_teacher,
    plan_memory,
    sizes_of,
)
from pkt.transferring.checkpoints import RunFolder
from pkt.transferring.extractor import Extractor
from pkt.transferring.job import Job, Recipe, Result, SeedsLike, day_of

# Below this many flops a run takes a moment, and measuring the machine first would take longer.
_WORTH_MEASURING = 2e12


@dataclass(frozen=True)
class Listeners:
    """Who is told of a transfer's way: a bar on stderr, and the caller's functions."""

    progress: bool = True
    on_memory: Callable[[MemoryPlan], None] | None = None
    on_plan: Callable[[TransferPlan], None] | None = None
    on_tick: Callable[[Tick], None] | None = None
    on_scores: Callable[[str, Mapping[str, Tensor]], None] | None = None  # of a task, part by part; gone after the call


def transfer(
    teacher: Any,
    student: Any,
    seeds: SeedsLike | Mapping[str, SeedsLike],
    *,
    out: str | Path | None = None,
    resume: bool = True,
    tokenizer: Any = None,
    layers: str | Sequence[int] = "sensitivity",
    select: Select = "window",
    modules: str = "all",
    align_heads: bool = False,
    module_map: ModuleMap | None = None,
    partial: bool = False,
    map_vocabulary: bool | tuple[Any, Any] = False,
    roles: Any = None,
    rank: int = 16,
    max_rank: int = 64,
    energy: float | None = None,
    split: Split = "b",
    svd: Svd = "fast",
    loss: Loss = "answer",
    max_length: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
    force: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    scratch: str | Path | None = None,
    keep_scores: KeepScores = "none",
    prefetch: bool = True,
    progress: bool = True,
    on_memory: Callable[[MemoryPlan], None] | None = None,
    on_plan: Callable[[TransferPlan], None] | None = None,
    on_tick: Callable[[Tick], None] | None = None,
) -> Any:
    """Score the teacher on the seeds one layer at a time, plan, extract; write the extraction folder to `out` if given.

    teacher: a checkpoint directory or a model (then pass its tokenizer); student: a directory, configuration or model;
    seeds: a JSONL file or `Seeds`; or several by task name, and then a dictionary of extractions is returned and each is
    written to `out`/name, all from one reading of the teacher. With `resume`, an unfinished run of the same inputs and
    options continues, and a finished `out` is returned as it is. device_memory, host_memory: limits in bytes or as "16GB"
    (default: what is free); scratch: a folder for activations that fit in neither. keep_scores: also write the scores, or
    their tile sums, to `out`/scores.safetensors, for `pkt.plan` with other options. batch_size: samples at once, at most.
    map_vocabulary: True, or both tokenizers (teacher's, student's). The other arguments are those of `pkt.load_seeds`,
    `pkt.plan` and `pkt.extract`.

    on_memory is told what will be used before any weight is read; on_tick of each finished layer; on_plan of each plan.
    Raises one `PktError` for anything that can be known to fail before the teacher's weights are read.
    """
    options = PlanOptions(
        layers=layers,
        select=select,
        modules=modules,
        align_heads=align_heads,
        module_map=read_map(module_map),
        partial=partial,
        map_vocabulary=map_vocabulary is not False,
        roles=None if roles is None else read_roles(roles),
        seed=seed,
    )
    several = isinstance(seeds, Mapping)
    found = transfer_recipes(
        teacher,
        student,
        seeds if isinstance(seeds, Mapping) else {"": seeds},
        {"": Recipe(options, Factorization(rank, max_rank, energy, split, seed, svd))},
        out=out,
        resume=resume,
        force=force,
        tokenizer=tokenizer,
        map_vocabulary=map_vocabulary,
        reading=Reading(loss, max_length),
        execution=Execution(batch_size, device, dtype),
        limits=Limits(device_memory, host_memory, scratch, prefetch),
        keep_scores=keep_scores,
        listeners=Listeners(progress, on_memory, on_plan, on_tick),
    )
    return {task: ext for (task, _), ext in found.items()} if several else found["", ""]


def transfer_recipes(
    teacher: Any,
    student: Any,
    seeds: Mapping[str, SeedsLike],
    recipes: Mapping[str, Recipe],
    *,
    out: str | Path | None = None,
    resume: bool = True,
    force: bool = False,
    tokenizer: Any = None,
    map_vocabulary: bool | tuple[Any, Any] = False,
    reading: Reading = Reading(),  # noqa: B008  # frozen
    execution: Execution = Execution(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
    keep_scores: KeepScores = "none",
    listeners: Listeners = Listeners(),
) -> dict[Result, Extraction]:
    """`transfer` of several tasks by several recipes, all from one reading of the teacher: the extraction of each (task, recipe).

    Each has the bytes it has alone. They are written to `out`/task/recipe; one task or one recipe alone may be named "" and then
    has no folder of its own. Scores that are kept lie in `out`/task. map_vocabulary: True, or both tokenizers, for the
    recipes whose options say so.
    """
    out = None if out is None else Path(out)
    today = day_of(out, itertools.product(seeds, recipes)) if out is not None and resume and not force else None
    job = Job(
        Model.of(teacher, "a teacher (a model, or the path of its checkpoint)"),
        Model.of(student, "a student (a model, or the path of its checkpoint)"),
        seeds,
        recipes,
        tokenizer,
        map_vocabulary=map_vocabulary,
        reading=reading,
        execution=execution,
        limits=limits,
        keep_scores=keep_scores,
        today=today,
    )
    job.identify(progress=listeners.progress)
    if limits.scratch is not None:
        with os_errors(f"making the folder {limits.scratch}"):
            Path(limits.scratch).mkdir(parents=True, exist_ok=True)
    if out is not None:
        return _into(out, job, listeners, resume=resume, force=force)
    if keep_scores != "none":
        raise PktError(f"keep_scores={keep_scores!r} needs an output folder to keep them in; pass out=")
    with tempfile.TemporaryDirectory(prefix="pkt-", dir=limits.scratch) as folder:
        return Runner(job, None, Path(folder), listeners).run()


def _into(out: Path, job: Job, listeners: Listeners, *, resume: bool, force: bool) -> dict[Result, Extraction]:
    """The extractions of a job in its folder: those that are there already, or made, going on from an unfinished run."""
    finished = job.finished(out) if resume and not force else None
    if finished is not None:
        return finished
    job.check_output(out, force=force)
    with RunFolder.locked(out, fresh=force or not resume) as folder, _stoppable():
        folder.bind(job.inputs())
        scratch = job.limits.scratch or folder.path
        with tempfile.TemporaryDirectory(prefix="activations-", dir=scratch) as activations:
            extractions = Runner(job, folder, Path(activations), listeners).run()
        job.save(extractions, out, folder, force=force)
    return extractions


class Runner:
    """Drives the engine for a job: memory plan, progress, checkpoints, and the extractions at the end."""

    def __init__(self, job: Job, folder: RunFolder | None, activations: Path, listeners: Listeners) -> None:
        self.job, self.folder, self.activations, self.listeners = job, folder, activations, listeners
        self.extractors = {
            (task, recipe): Extractor(job.pairings[recipe], job.recipes[recipe].factorization)
            for task, recipe in job.results
        }

    def run(self) -> dict[Result, Extraction]:
        teacher = open_teacher(self.job.model, self.job.device, self.job.dtype)
        try:
            return self._streamed(teacher)
        except NotLayeredError as error:
            return self._whole(teacher, str(error))

    def _streamed(self, teacher: Teacher) -> dict[Result, Extraction]:
        job = self.job
        if job.teacher.layers is None or job.teacher.num_layers == 0:
            raise NotLayeredError("it has no list of decoder layers")
        samples = job.samples()
        memory = self._plan_memory(teacher, samples)
        sizes = [_even(len(task), memory.micro_batch) for task in samples]
        resume = None
        if self.folder is not None:
            sizes = self.folder.execution(sizes, memory)
            resume = self.folder.resume(list(self.extractors.values()), len(job.seeds))
        with self._bar() as tick:
            engine = Engine(
                teacher,
                device=job.device,
                num_layers=job.teacher.num_layers,
                layers=job.teacher.layers,
                on_part=self._part,
                on_commit=self._commit,
                on_tick=tick,
                prefetch=self.job.limits.prefetch,
                resident=memory.resident and teacher.source is not None,
            )
            try:
                if resume is not None and resume.boundary < 0:
                    losses = resume.losses
                else:
                    losses = engine.run(
                        samples,
                        sizes,
                        lambda: Boundaries(
                            job.device, memory.places, self.activations, behind=self.job.limits.prefetch
                        ),
                        where=job.where,
                        resume=resume,
                        on_sizes=self._resized,
                    )
                return self._gather(losses, engine.weights_of)
            finally:
                engine.close()

    def _plan_memory(self, teacher: Teacher, samples: list[list[dict[str, Tensor]]]) -> MemoryPlan:
        job = self.job
        assert job.teacher.layers is not None
        memory = plan_memory(
            sizes_of(teacher, job.teacher.layers, job.teacher.num_layers),
            [[s["input_ids"].shape[1] for s in task] for task in samples],
            device=job.device,
            batch_size=job.batch_size,
            in_memory=teacher.source is None,
            choices=[(r.options.select, r.factorization.largest) for r in job.recipes.values()],
            scratch_free=shutil.disk_usage(self.activations).free,
            device_memory=job.device_memory,
            host_memory=job.host_memory,
        )
        if self.listeners.on_memory is not None:
            if memory.flops > _WORTH_MEASURING:
                dtype = teacher.dtype or next(teacher.model.parameters()).dtype
                memory.seconds = measured_seconds(memory.flops, dtype, job.device)
            self.listeners.on_memory(memory)
        return memory

    def _part(self, task: int, key: Key, scores: dict[str, Tensor], weight: Callable[[str], Tensor]) -> None:
        name = list(self.job.seeds)[task]
        for recipe in self.job.recipes:
            self.extractors[name, recipe].take(key, scores, weight)
        if self.listeners.on_scores is not None:
            self.listeners.on_scores(name, scores)
        if self.job.keep_scores != "none":
            assert self.folder is not None
            self.folder.keep_scores(task, scores, self.tile)

    @property
    def tile(self) -> int | None:
        return _tile(self.job) if self.job.keep_scores == "tiles" else None

    def _commit(self, key: Key, progress: Progress) -> None:
        if self.folder is not None:
            self.folder.commit(key, progress, list(self.extractors.values()))

    def _resized(self, sizes: list[list[int]], why: str) -> None:
        if self.folder is not None:
            self.folder.resized(sizes, why)

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Callable[[Tick], None]]:
        with contextlib.ExitStack() as stack:
            advance: Callable[[int], None] | None = None

            def tick(now: Tick) -> None:
                nonlocal advance
                if advance is None:
                    shown = self.listeners.progress
                    advance = stack.enter_context(bar("transferring", now.total, unit="steps", shown=shown))
                advance(now.done)
                if self.listeners.on_tick is not None:
                    self.listeners.on_tick(now)

            yield tick

    def _gather(
        self,
        losses: list[list[float]],
        weights_of: Callable[[Key], contextlib.AbstractContextManager[Callable[[str], Tensor]]],
    ) -> dict[Result, Extraction]:
        found = {}
        tasks = list(self.job.seeds)
        for result, extractor in self.extractors.items():
            made, pairs, energies = extractor.finish(weights_of)
            if self.listeners.on_plan is not None:
                self.listeners.on_plan(made)
            task = tasks.index(result[0])
            provenance = {**self.job.provenance(result), "losses": self.job.losses(task, losses[task])}
            if extractor.unsettled:
                provenance["unsettled"] = extractor.unsettled
            found[result] = Extraction(pairs, energies, made, provenance)
        if self.job.keep_scores != "none":
            assert self.folder is not None
            for task, own in enumerate(losses):
                self.folder.seal_scores(task, functools.partial(self.job.scores_metadata, task, own, self.tile))
        return found

    def _whole(self, teacher: Teacher, why: str) -> dict[Result, Extraction]:
        """A model that is no chain of layers is scored in one piece."""
        import warnings

        from pkt.errors import PktWarning

        job = self.job
        warnings.warn(f"{job.teacher.name} is scored whole, not layer by layer: {why}", PktWarning, stacklevel=4)
        model = job.model.load(dtype=job.dtype, device=job.device, dequantize=True)
        found = {}
        for task, (name, seeds) in enumerate(job.seeds.items()):
            sens = score_seeds(
                model, seeds, batch_size=job.batch_size, progress=self.listeners.progress, recorded=job.teacher
            )
            if self.listeners.on_scores is not None:
                self.listeners.on_scores(name, sens)
            for recipe, how in job.recipes.items():
                made = Chooser(job.pairings[recipe]).plan(sens)
                if self.listeners.on_plan is not None:
                    self.listeners.on_plan(made)
                # sens.losses stand in the file's order already.
                provenance = {**job.provenance((name, recipe)), "losses": sens.losses}
                found[name, recipe] = extract(
                    model, made, **how.factorization.as_dict(), progress=self.listeners.progress, provenance=provenance
                )
            if job.keep_scores != "none":
                assert self.folder is not None
                sens.save(self.folder.scores_file(task))
        return found


def _even(count: int, size: int) -> list[int]:
    return [min(size, count - first) for first in range(0, count, size)]


def _tile(job: Job) -> int:
    """The largest power of two up to 64 that divides every side the student cuts, and every row where a role begins."""
    sides = {BLOCK}
    for pairing in job.pairings.values():
        for feed in pairing.possible_feeds():
            have = sum(b - a for a, b in feed.rows), feed.source.shape[1]
            sides |= {b for a, b in zip(have, feed.shape, strict=True) if a != b}
            if have[0] != feed.source.shape[0]:
                sides |= {side for run in feed.rows for side in run if side}
    return math.gcd(BLOCK, *sides)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM leaves like Ctrl-C does: through every `finally`, with what is finished on disk."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
