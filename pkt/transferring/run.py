"""The first half of the work in one call: seeds, sensitivity, plan and extraction, everything checked before it starts.

The teacher is scored part by part (`pkt.streaming.engine`). As soon as a part's scores are complete its regions are chosen and
factorized, and the scores are forgotten (`pkt.transferring.extractor`).

With an output folder, every finished part is a checkpoint in a hidden folder beside it (`.NAME.run`, see `checkpoints`), bound to
the inputs. The same command continues there after any interruption and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pkt.errors import PktError
from pkt.extraction import Extraction, extract
from pkt.extraction.factorization import Split
from pkt.models import checked_device, load_model
from pkt.planning import Chooser, ModuleMap, TransferPlan, check_options, read_vocabulary
from pkt.planning.regions import BLOCK, Strategy
from pkt.scoring import score_seeds
from pkt.streaming import Boundaries, Engine, Key, Progress, Tick
from pkt.streaming.loader import NotLayeredError, Teacher, open_teacher
from pkt.streaming.memory import MemoryPlan, measured_seconds, parse_size, plan_memory, sizes_of
from pkt.transferring.checkpoints import RunFolder
from pkt.transferring.extractor import Harvest
from pkt.transferring.job import Job, KeepScores, SeedsLike

# Below this many flops a run takes a moment, and measuring the machine first would take longer.
_WORTH_MEASURING = 2e12


def transfer(
    teacher: Any,
    student: Any,
    seeds: SeedsLike | Mapping[str, SeedsLike],
    *,
    out: str | Path | None = None,
    resume: bool = True,
    tokenizer: Any = None,
    layers: str | Sequence[int] = "sensitivity",
    select: Strategy = "window",
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
    loss: Literal["answer", "all"] = "answer",
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
    job = Job(
        teacher,
        student,
        seeds,
        tokenizer,
        options=check_options(
            layers, select, modules, align_heads, None, seed, module_map, partial, map_vocabulary is not False, roles
        ),
        vocabulary=read_vocabulary(map_vocabulary, teacher, student),
        roles=roles,
        factorization={"rank": rank, "max_rank": max_rank, "energy": energy, "split": split, "seed": seed},
        loss=loss,
        max_length=max_length,
        batch_size=batch_size,
        keep_scores=keep_scores,
        device=_device_of(teacher) if device is None else checked_device(device),
        dtype=dtype,
    )
    if scratch is not None and not Path(scratch).is_dir():
        raise PktError(f"scratch={str(scratch)!r} is not a folder; name one that exists")
    if keep_scores != "none" and out is None:
        raise PktError(f"keep_scores={keep_scores!r} needs an output folder to keep them in; pass out=")
    limits = {"device_memory": parse_size(device_memory), "host_memory": parse_size(host_memory)}
    if out is None:
        with tempfile.TemporaryDirectory(prefix="pkt-", dir=scratch) as folder:
            runner = Runner(job, None, Path(folder), limits, prefetch, progress, on_memory, on_plan, on_tick)
            return job.result(runner.run())
    finished = job.finished(Path(out)) if resume and not force else None
    if finished is not None:
        return job.result(finished)
    job.check_output(Path(out), force=force)
    with RunFolder.locked(Path(out), fresh=force or not resume) as folder, _stoppable():
        folder.bind(job.inputs())
        with tempfile.TemporaryDirectory(prefix="activations-", dir=scratch or folder.path) as activations:
            runner = Runner(job, folder, Path(activations), limits, prefetch, progress, on_memory, on_plan, on_tick)
            extractions = runner.run()
        job.save(extractions, Path(out), folder, force=force)
    return job.result(extractions)


def _device_of(teacher: Any) -> torch.device:
    if isinstance(teacher, nn.Module):
        return next((p.device for p in teacher.parameters()), torch.device("cpu"))
    return torch.device("cpu")


class Runner:
    """Drives the engine for a job: memory plan, progress, checkpoints, and the extractions at the end."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder | None,
        activations: Path,
        limits: dict[str, int | None],
        prefetch: bool,
        progress: bool,
        on_memory: Callable[[MemoryPlan], None] | None,
        on_plan: Callable[[TransferPlan], None] | None,
        on_tick: Callable[[Tick], None] | None,
    ) -> None:
        self.job, self.folder, self.activations, self.limits = job, folder, activations, limits
        self.prefetch, self.progress = prefetch, progress
        self.on_memory, self.on_plan, self.on_tick = on_memory, on_plan, on_tick
        self.harvests = [Harvest(job.pairing, job.factorization) for _ in job.seeds]

    def run(self) -> dict[str, Extraction]:
        teacher = open_teacher(self.job.model, self.job.device, self.job.dtype)
        try:
            return self._streamed(teacher)
        except NotLayeredError as error:
            return self._whole(teacher, str(error))

    def _streamed(self, teacher: Teacher) -> dict[str, Extraction]:
        job = self.job
        if job.teacher.layers is None or job.teacher.num_layers == 0:
            raise NotLayeredError("it has no list of decoder layers")
        samples = job.samples()
        memory = self._plan_memory(teacher, samples)
        sizes = [_even(len(task), memory.micro_batch) for task in samples]
        resume = None
        if self.folder is not None:
            sizes = self.folder.execution(sizes, memory)
            resume = self.folder.resume(self.harvests)
        with self._bar() as tick:
            engine = Engine(
                teacher,
                device=job.device,
                num_layers=job.teacher.num_layers,
                layers=job.teacher.layers,
                on_part=self._part,
                on_commit=self._commit,
                on_tick=tick,
                prefetch=self.prefetch,
                resident=memory.resident and teacher.source is not None,
            )
            try:
                if resume is not None and resume.boundary < 0:
                    losses = resume.losses
                else:
                    losses = engine.run(
                        samples,
                        sizes,
                        lambda: Boundaries(job.device, memory.places, self.activations, behind=self.prefetch),
                        where=job.where,
                        resume=resume,
                        on_sizes=self._resized,
                    )
                    # Names of parts outside the layers are known only once the engine has run.
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
            select=job.options["select"],
            rank=job.factorization["rank" if job.factorization["energy"] is None else "max_rank"],
            scratch_free=shutil.disk_usage(self.activations).free,
            device_memory=self.limits["device_memory"],
            host_memory=self.limits["host_memory"],
        )
        if self.on_memory is not None:
            if memory.flops > _WORTH_MEASURING:
                dtype = teacher.dtype or next(teacher.model.parameters()).dtype
                memory.seconds = measured_seconds(memory.flops, dtype, job.device)
            self.on_memory(memory)
        return memory

    def _part(self, task: int, key: Key, scores: dict[str, Tensor], weight: Callable[[str], Tensor]) -> None:
        self.harvests[task].take(key, scores, weight)
        if self.job.keep_scores != "none":
            assert self.folder is not None
            self.folder.keep_scores(task, scores, self.tile)

    @property
    def tile(self) -> int | None:
        return _tile(self.job) if self.job.keep_scores == "tiles" else None

    def _commit(self, key: Key, progress: Progress) -> None:
        if self.folder is not None:
            self.folder.commit(key, progress, self.harvests)

    def _resized(self, sizes: list[list[int]], why: str) -> None:
        if self.folder is not None:
            self.folder.resized(sizes, why)

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Callable[[Tick], None]]:
        from pkt.progress import bar

        with contextlib.ExitStack() as stack:
            advance: Callable[[int], None] | None = None

            def tick(now: Tick) -> None:
                nonlocal advance
                if self.progress:
                    if advance is None:
                        advance = stack.enter_context(bar("transferring", now.total, unit="steps"))
                    advance(now.done)
                if self.on_tick is not None:
                    self.on_tick(now)

            yield tick

    def _gather(
        self,
        losses: list[list[float]],
        weights_of: Callable[[Key], contextlib.AbstractContextManager[Callable[[str], Tensor]]],
    ) -> dict[str, Extraction]:
        found = {}
        for task, (name, harvest) in enumerate(zip(self.job.seeds, self.harvests, strict=True)):
            made, pairs, energies = harvest.finish(weights_of)
            if self.on_plan is not None:
                self.on_plan(made)
            found[name] = Extraction(pairs, energies, made, self.job.provenance(task, losses[task]))
            if self.job.keep_scores != "none":
                assert self.folder is not None
                described = functools.partial(self.job.scores_metadata, task, losses[task], self.tile)
                self.folder.seal_scores(task, described)
        return found

    def _whole(self, teacher: Teacher, why: str) -> dict[str, Extraction]:
        """A model that is no chain of layers is scored in one piece."""
        import warnings

        from pkt.errors import PktWarning

        job = self.job
        warnings.warn(f"{job.teacher.name} is scored whole, not layer by layer: {why}", PktWarning, stacklevel=4)
        model = (
            job.model if isinstance(job.model, nn.Module) else load_model(job.model, dtype=job.dtype, dequantize=True)
        )
        if not isinstance(job.model, nn.Module):
            model = model.to(job.device)
        found = {}
        for task, (name, seeds) in enumerate(job.seeds.items()):
            sens = score_seeds(model, seeds, batch_size=job.batch_size, progress=self.progress)
            made = Chooser(job.pairing).plan(sens)
            if self.on_plan is not None:
                self.on_plan(made)
            provenance = {"seeds": seeds.describe(), "losses": sens.losses}
            found[name] = extract(model, made, **job.factorization, progress=self.progress, provenance=provenance)
            if job.keep_scores != "none":
                assert self.folder is not None
                sens.save(self.folder.scores_file(task))
        return found


def _even(count: int, size: int) -> list[int]:
    return [min(size, count - first) for first in range(0, count, size)]


def _tile(job: Job) -> int:
    """The largest power of two up to 64 that divides every side the student cuts, and every row where a role begins."""
    sides = {BLOCK}
    for target in job.pairing.targets:
        for layer in [None] if target.layer is None else job.pairing.layers_for(target.layer):
            for feed in job.pairing.feeds(target, layer):
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
