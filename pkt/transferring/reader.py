"""One reading of a teacher for a job: what will be taken, progress, checkpoints, and the scores that are kept."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from pkt import ops
from pkt.errors import PktWarning
from pkt.files import os_errors
from pkt.planning import TransferPlan
from pkt.progress import bar
from pkt.scoring import Sensitivity, score_seeds
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
from pkt.transferring.job import Result, ScoringJob

# Below this many flops a run takes a moment, and measuring the machine first would take longer.
_WORTH_MEASURING = 2e12

Losses: TypeAlias = list[list[float]]  # by task, in the samples' order
WeightsOf: TypeAlias = Callable[[Key], contextlib.AbstractContextManager[Callable[[str], Tensor]]]


@dataclass(frozen=True)
class Listeners:
    """Who is told of a reading's way: a bar on stderr, and the caller's functions."""

    progress: bool = True
    on_memory: Callable[[MemoryPlan], None] | None = None
    on_plan: Callable[[TransferPlan], None] | None = None
    on_tick: Callable[[Tick], None] | None = None
    # Of a task, part by part, as they are scored; gone after the call.
    on_scores: Callable[[str, Mapping[str, Tensor]], None] | None = None


class Reader:
    """Drives the engine for a job. folder: where checkpoints and kept scores go; extractors: what takes from the scores."""

    def __init__(
        self,
        job: ScoringJob,
        extractors: Mapping[Result, Extractor],
        folder: RunFolder | None,
        activations: Path,
        listeners: Listeners,
    ) -> None:
        self.job, self.extractors, self.folder = job, extractors, folder
        self.activations, self.listeners = activations, listeners

    @contextlib.contextmanager
    def reading(self) -> Iterator[tuple[Losses, WeightsOf]]:
        """Inside, every part has been scored, and may be read again. Raises `NotLayeredError` for what has to be scored whole."""
        job = self.job
        teacher = open_teacher(job.model, job.device, job.dtype)
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
                prefetch=job.limits.prefetch,
                resident=memory.resident and teacher.source is not None,
                measure=job.measure,
            )
            with contextlib.closing(engine):
                if resume is not None and resume.boundary < 0:
                    losses = resume.losses
                else:
                    losses = engine.run(
                        samples,
                        sizes,
                        lambda: Boundaries(job.device, memory.places, self.activations, behind=job.limits.prefetch),
                        where=job.where,
                        resume=resume,
                        on_sizes=self._resized,
                    )
                self._seal(losses)
                yield losses, engine.weights_of

    def _plan_memory(self, teacher: Teacher, samples: list[list[dict[str, Tensor]]]) -> MemoryPlan:
        job = self.job
        assert job.teacher.layers is not None
        taking = [(e.pairing.options.select, e.factorization.largest) for e in self.extractors.values()]
        memory = plan_memory(
            sizes_of(teacher, job.teacher.layers, job.teacher.num_layers),
            [[s["input_ids"].shape[1] for s in task] for task in samples],
            device=job.device,
            batch_size=job.batch_size,
            in_memory=teacher.source is None,
            choices=list(dict.fromkeys(taking)),
            scratch_free=shutil.disk_usage(self.activations).free,
            device_memory=job.device_memory,
            host_memory=job.host_memory,
        )
        if self.folder is not None:
            memory.folder = self._folder_bytes(teacher, memory)
            self.folder.check_space(sum(memory.folder.values()) + (0 if job.limits.scratch else memory.disk))
        if self.listeners.on_memory is not None:
            if memory.flops > _WORTH_MEASURING:
                dtype = teacher.dtype or next(teacher.model.parameters()).dtype
                memory.seconds = measured_seconds(memory.flops, dtype, job.device)
            self.listeners.on_memory(memory)
        return memory

    def _folder_bytes(self, teacher: Teacher, memory: MemoryPlan) -> dict[str, int]:
        scores = 0
        if self.job.keeps:
            side = self.job.tile or 1
            kept = sum(
                math.prod(-(-n // side) for n in p.shape[-2:]) * math.prod(p.shape[:-2])
                for p in teacher.model.parameters()
            )
            # While one task's parts are joined into its file, they are there twice.
            scores = 4 * kept * (len(self.job.seeds) + 1)
        pairs = sum(extractor.saved_bytes() for extractor in self.extractors.values())
        return {"pairs": pairs, "gradients": memory.checkpoint, "scores to keep": scores}

    def _part(self, task: int, key: Key, scores: dict[str, Tensor], weight: Callable[[str], Tensor]) -> None:
        name = list(self.job.seeds)[task]
        for (of, _), extractor in self.extractors.items():
            if of == name:
                extractor.take(key, scores, weight)
        if self.listeners.on_scores is not None:
            self.listeners.on_scores(name, scores)
        if self.job.keeps:
            assert self.folder is not None
            self.folder.keep_scores(task, scores, self.job.tile)

    def _commit(self, key: Key, progress: Progress) -> None:
        if self.folder is not None:
            self.folder.commit(key, progress, list(self.extractors.values()))

    def _resized(self, sizes: list[list[int]], why: str) -> None:
        if self.folder is not None:
            self.folder.resized(sizes, why)

    def _seal(self, losses: Losses) -> None:
        if self.job.keeps:
            assert self.folder is not None
            for task, own in enumerate(losses):
                self.folder.seal_scores(task, functools.partial(self.job.scores_metadata, task, own))

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Callable[[Tick], None]]:
        with contextlib.ExitStack() as stack:
            advance: Callable[[int], None] | None = None

            def tick(now: Tick) -> None:
                nonlocal advance
                if advance is None:
                    shown = self.listeners.progress
                    advance = stack.enter_context(bar(self.job.doing, now.total, unit="steps", shown=shown))
                advance(now.done)
                if self.listeners.on_tick is not None:
                    self.listeners.on_tick(now)

            yield tick


def score_whole(
    job: ScoringJob, folder: RunFolder | None, listeners: Listeners, why: str, *, tile: int | None = None
) -> Iterator[tuple[str, nn.Module, Sensitivity]]:
    """What a `Reader` cannot read part by part is scored in one piece: (task, the model, its scores, kept where they are)."""
    warnings.warn(f"{job.teacher.name} is scored whole, not layer by layer: {why}", PktWarning, stacklevel=5)
    model = job.model.load(dtype=job.dtype, device=job.device, dequantize=True)
    if job.dtype is None and job.model.module is None:
        model = model.to(ops.working_dtype(model.dtype, model.device))
    for task, (name, seeds) in enumerate(job.seeds.items()):
        sens = score_seeds(
            model,
            seeds,
            batch_size=job.batch_size,
            tile=tile,
            measure=job.measure,
            progress=listeners.progress,
            recorded=job.teacher,
        )
        if listeners.on_scores is not None:
            listeners.on_scores(name, sens)
        if job.keeps:
            assert folder is not None
            sens.save(folder.scores_file(task))
        yield name, model, sens


@contextlib.contextmanager
def working_folder(out: Path, job: ScoringJob, *, fresh: bool) -> Iterator[tuple[RunFolder, Path]]:
    """The run folder of `out`, bound to the job's inputs, and a folder for activations; SIGTERM ends it in order."""
    with RunFolder.locked(out, fresh=fresh) as folder, _stoppable():
        folder.bind(job.inputs())
        with activations_folder(job, folder.path) as activations:
            yield folder, activations


@contextlib.contextmanager
def activations_folder(job: ScoringJob, beside: Path | None = None) -> Iterator[Path]:
    """On the scratch disk that was named, else beside what is written, else where temporary files go."""
    scratch = job.limits.scratch
    if scratch is not None:
        with os_errors(f"making the folder {scratch}"):
            Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="activations-", dir=scratch or beside) as folder:
        yield Path(folder)


def _even(count: int, size: int) -> list[int]:
    return [min(size, count - first) for first in range(0, count, size)]


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
