"""One reading of a teacher for a job: what will be taken, progress, checkpoints, and the scores that are kept."""

from __future__ import annotations

import contextlib
import dataclasses
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

import torch
from torch import Tensor, nn

from pkt import ops
from pkt.errors import PktError, PktWarning
from pkt.files import os_errors, run_path
from pkt.manifest import difference
from pkt.planning import TransferPlan
from pkt.progress import bar
from pkt.ranks import ALONE, Ranks, shared_out
from pkt.scoring import PROBE_TOKENS, Sensitivity, score_seeds
from pkt.streaming import (
    Boundaries,
    Engine,
    Key,
    MemoryPlan,
    NotLayeredError,
    Progress,
    SharedReading,
    Sizes,
    Teacher,
    Tick,
    free_memory,
    measured_seconds,
    open_teacher,
    plan_memory,
    sizes_of,
)
from pkt.transferring.checkpoints import RunFolder, joined_progress, parted
from pkt.transferring.extractor import Choice, Extractor
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
    """Drives the engine for a job. folder: where checkpoints and kept scores go; extractors: what takes from the scores.

    Of ranks each reads the teacher for its share of the samples; the first one has the folder.
    """

    def __init__(
        self,
        job: ScoringJob,
        extractors: Mapping[Result, Extractor],
        folder: RunFolder | None,
        activations: Path,
        listeners: Listeners,
        ranks: Ranks = ALONE,
    ) -> None:
        self.job, self.extractors, self.folder, self.ranks = job, extractors, folder, ranks
        self.activations, self.listeners = activations, listeners
        self.saving = ranks.first_of(lambda: folder is not None)

    @contextlib.contextmanager
    def reading(self) -> Iterator[tuple[Losses, WeightsOf]]:
        """Inside, every part has been scored, and may be read again. Raises `NotLayeredError` for what has to be scored whole."""
        with self.ranks.together(NotLayeredError), self._reading() as found:
            yield found

    @contextlib.contextmanager
    def _reading(self) -> Iterator[tuple[Losses, WeightsOf]]:
        job = self.job
        teacher = open_teacher(job.model, job.device, job.dtype)
        if job.teacher.layers is None or job.teacher.num_layers == 0:
            raise NotLayeredError("it has no list of decoder layers")
        everything = job.samples()
        self.shares = shared_out([[_tokens(s) for s in task] for task in everything], self.ranks.world)
        share = self.shares[self.ranks.rank]
        samples = [[task[i] for i in mine] for task, mine in zip(everything, share, strict=True)]
        memory = self._plan_memory(teacher, samples)
        sizes = [_even(len(task), memory.micro_batch) for task in samples]
        resume = None
        if self.saving:
            sizes, resume = self._go_on(sizes, memory)
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
                ranks=self.ranks,
                probe=None if self.ranks.alone else _probe(everything),
                spread=bool(self.extractors),
            )
            with contextlib.closing(engine):
                if resume is not None and resume.boundary < 0:
                    losses = resume.losses
                else:
                    losses = engine.run(
                        samples,
                        sizes,
                        lambda: Boundaries(job.device, memory.places, self.activations, behind=job.limits.prefetch),
                        where=lambda task, sample: job.where(task, share[task][sample]),
                        resume=resume,
                        on_sizes=self._resized,
                    )
                losses = self._in_order(losses)
                self._seal(losses)
                yield losses, engine.weights_of

    def _go_on(self, sizes: list[list[int]], memory: MemoryPlan) -> tuple[list[list[int]], Progress | None]:
        """This rank's micro-batches as they are recorded, and where an unfinished run stands."""
        tasks, all_sizes = len(sizes), self.ranks.all_of(sizes)
        extractors = list(self.extractors.values())
        found: list[tuple[list[list[int]], Progress | None]] | None = None
        if self.folder is not None:
            flat = self.folder.execution([task for each in all_sizes for task in each], memory)
            whole = self.folder.resume(extractors, len(flat))
            parts = [None] * self.ranks.world if whole is None else parted(whole, self.ranks.world)
            found = [(flat[r * tasks : (r + 1) * tasks], part) for r, part in enumerate(parts)]
        mine, resume = self.ranks.scattered(found)
        if resume is not None and not self.ranks.alone:
            # Without the pairs, which are the first rank's.
            told = self.ranks.first_of(lambda: [_without_pairs(e.choices) for e in extractors])
            for extractor, choices in zip(extractors, told, strict=True):
                if not self.ranks.first:
                    extractor.restore(choices)
        return mine, resume

    def _in_order(self, losses: Losses) -> Losses:
        """The losses of all ranks' samples, as the job has the samples."""
        if self.ranks.alone:
            return losses
        found = [[0.0] * len(order) for order in self.job.orders]
        for share, theirs in zip(self.shares, self.ranks.all_of(losses), strict=True):
            for task, (places, values) in enumerate(zip(share, theirs, strict=True)):
                for place, value in zip(places, values, strict=True):
                    found[task][place] = value
        return found

    def _plan_memory(self, teacher: Teacher, samples: list[list[dict[str, Tensor]]]) -> MemoryPlan:
        job = self.job
        assert job.teacher.layers is not None
        taking = [(e.pairing.options.select, e.factorization.largest) for e in self.extractors.values()]
        sizes, neighbours = sizes_of(teacher, job.teacher.layers, job.teacher.num_layers), len(self.ranks.beside)
        memory = plan_memory(
            sizes,
            [[_tokens(s) for s in task] or [1] for task in samples],
            device=job.device,
            batch_size=job.batch_size,
            in_memory=teacher.source is None,
            choices=list(dict.fromkeys(taking)),
            scratch_free=shutil.disk_usage(self.activations).free // neighbours,
            device_memory=job.device_memory,
            host_memory=job.host_memory,
            neighbours=neighbours,
        )
        if not self.ranks.alone:
            memory.shared = self._shared(sizes, memory)
        memory.checkpoint = sum(self.ranks.all_of(memory.checkpoint))
        if self.folder is not None:
            memory.folder = self._folder_bytes(teacher, memory)
            self.folder.check_space(sum(memory.folder.values()) + (0 if job.limits.scratch else memory.disk))
        if self.listeners.on_memory is not None:
            if memory.flops > _WORTH_MEASURING:
                dtype = teacher.dtype or next(teacher.model.parameters()).dtype
                memory.seconds = measured_seconds(memory.flops, dtype, job.device)
            self.listeners.on_memory(memory)
        return memory

    def _shared(self, sizes: Sizes, memory: MemoryPlan) -> SharedReading:
        """What every rank holds, and what that leaves to the page cache of the machine that has least."""
        ranks, on_cpu = self.ranks, self.job.device.type == "cpu"
        # Files of activations go through the page cache too.
        own = memory.host + memory.disk + (memory.device_total if on_cpu else 0)
        device, host, taken = zip(*ranks.all_of((memory.device_total, memory.host, own)), strict=True)
        left = ranks.all_of(max(0, free_memory() - sum(taken[rank] for rank in ranks.beside)))
        return SharedReading(
            device, host, min(left), sizes.checkpoint if memory.read else 0, sizes.part, 1 if memory.resident else 2
        )

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
            self._keep(task, scores)

    def _keep(self, task: int, scores: dict[str, Tensor]) -> None:
        """Scores of all ranks, a parameter at a time, into the first one's folder."""
        tile = self.job.tile
        if not self.ranks.alone:
            kept = {n: (s if tile is None else ops.tile_sums(s, tile)).cpu() for n, s in scores.items()}
            names = sorted(name for part in self.ranks.all_of(list(kept)) for name in part)
            scores, tile = {}, None
            for name in names:
                for part in self.ranks.gathered({name: kept[name]} if name in kept else {}) or []:
                    scores |= part
        if self.folder is not None:
            self.folder.keep_scores(task, scores, tile)

    def _commit(self, key: Key, progress: Progress) -> None:
        if not self.saving:
            return
        if not self.ranks.alone:
            carried = progress.carried if key == "head" else [{} for _ in progress.carried]
            grads = [] if key == "front" else [grad.cpu() for grad in progress.grads]
            of_all = self.ranks.gathered(dataclasses.replace(progress, grads=grads, carried=carried))
            progress = progress if of_all is None else joined_progress(of_all)
        if self.folder is not None:
            self.folder.commit(key, progress, list(self.extractors.values()))

    def _resized(self, sizes: list[list[int]], why: str) -> None:
        flat = [task for each in self.ranks.all_of(sizes) for task in each]
        if self.folder is not None:
            self.folder.resized(flat, why)

    def _seal(self, losses: Losses) -> None:
        if self.job.keeps and self.folder is not None:
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
    job: ScoringJob,
    folder: RunFolder | None,
    listeners: Listeners,
    why: str,
    *,
    tile: int | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[str, nn.Module, Sensitivity]]:
    """What a `Reader` cannot read part by part is scored in one piece: (task, the model, its scores, kept where they are)."""
    if ranks.first:
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
            group=None if ranks.alone else ranks,
        )
        if listeners.on_scores is not None:
            listeners.on_scores(name, sens)
        if job.keeps and folder is not None:
            sens.save(folder.scores_file(task))
        yield name, model, sens


@contextlib.contextmanager
def working_folder(
    out: Path, job: ScoringJob, *, fresh: bool, ranks: Ranks = ALONE
) -> Iterator[tuple[RunFolder | None, Path]]:
    """The run folder of `out`, bound to the job's inputs, and a folder for activations; SIGTERM ends it in order.

    Of ranks the first one has the run folder, and the others there only what lies beside it.
    """
    held = RunFolder.locked(out, fresh=fresh) if ranks.first else contextlib.nullcontext()
    with held as folder, _stoppable():
        if folder is not None:
            folder.bind({**job.inputs(), **({} if ranks.alone else {"ranks": ranks.world})})
        ranks.all_of(None)
        beside = run_path(out)
        with activations_folder(job, beside if beside.is_dir() else None) as activations:
            yield folder, activations


def identify(job: ScoringJob, ranks: Ranks, *, progress: bool) -> None:
    """Hash what the job reads, once on each machine. Raises `PktError` where a rank reads something else than the first one."""
    for turn in (True, False):
        if turn == (ranks.here == 0):
            job.identify(progress=progress)
        ranks.all_of(None)
    first, *others = ranks.all_of({} if ranks.alone else job.inputs())
    for rank, inputs in enumerate(others, 1):
        different = difference(first, inputs)
        if different:
            raise PktError(
                f"rank {rank} has other inputs than rank 0 ({', '.join(different)}); give every rank the same files and packages"
            )


@contextlib.contextmanager
def activations_folder(job: ScoringJob, beside: Path | None = None) -> Iterator[Path]:
    """On the scratch disk that was named, else beside what is written, else where temporary files go."""
    scratch = job.limits.scratch
    if scratch is not None:
        with os_errors(f"making the folder {scratch}"):
            Path(scratch).mkdir(parents=True, exist_ok=True)
    # Of several ranks one may have removed what lies beside the output.
    with tempfile.TemporaryDirectory(
        prefix="activations-", dir=scratch or beside, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def _tokens(sample: Mapping[str, Tensor]) -> int:
    return int(sample["input_ids"].shape[1])


def _probe(tasks: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Two of the samples at most, as long as the shorter one, for what every rank has to find alike."""
    few = [sample for task in tasks for sample in task][:2]
    width = min(PROBE_TOKENS, *map(_tokens, few))
    return {"input_ids": torch.cat([sample["input_ids"][:, :width] for sample in few])}


def _without_pairs(choices: Mapping[Key, Choice]) -> dict[Key, Choice]:
    return {key: dataclasses.replace(choice, pairs={}) for key, choice in choices.items()}


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
