"""The first half of the work in one call: seeds, sensitivity, plan and extraction, everything checked before it starts.

The teacher is scored part by part (`pkt.streaming.engine`). As soon as a part's scores are complete its regions are chosen and
factorized, and the scores are forgotten (`pkt.transferring.extractor`).

With an output folder, every finished part is a checkpoint in a hidden folder beside it (`.NAME.run`, see `checkpoints`), bound to
the inputs. The same command continues there after any interruption and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pkt import ops
from pkt.errors import PktError
from pkt.extraction import Extraction, extract, versions
from pkt.extraction.factorization import Split, check_rank
from pkt.files import (
    MANIFEST,
    check_output_folder,
    os_errors,
    sha256,
    sweep_scratch,
)
from pkt.models import (
    ModelSpec,
    check_checkpoint,
    check_quantization,
    check_tokenizer,
    checked_device,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    other_ids,
    skeleton,
    spec_of,
    with_roles,
)
from pkt.planning import ModuleMap, Pairing, TransferPlan, Vocabulary, check_options, read_vocabulary
from pkt.planning.regions import BLOCK, Strategy
from pkt.scoring import FORMAT as SCORES_FORMAT
from pkt.scoring import Sensitivity, sensitivity
from pkt.seeds import Seeds, collate, load_seeds
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
    parse_size,
    plan_memory,
    samples_of,
    sizes_of,
)
from pkt.transferring.checkpoints import RunFolder, run_path
from pkt.transferring.extractor import Harvest

KeepScores: TypeAlias = Literal["none", "tiles", "full"]
SCORES = "scores.safetensors"
# Below this many flops a run takes a moment, and measuring the machine first would take longer.
_WORTH_MEASURING = 2e12


def score_seeds(
    teacher: Any, seeds: Seeds, *, batch_size: int = 8, tile: int | None = None, progress: bool = True
) -> Sensitivity:
    """`pkt.sensitivity` of a model on seeds, with what the scores were made from recorded in them."""
    if batch_size < 1:
        raise PktError(f"batch_size={batch_size} must be at least 1")
    spec = spec_of(teacher)
    seeds.check_vocabulary(spec.vocab_size, spec.name)
    # Samples of like length share a batch, so that little is padding; S does not depend on it.
    order = sorted(range(len(seeds)), key=lambda i: -len(seeds[i].input_ids))
    ordered = Seeds([seeds[i] for i in order], seeds.source, seeds.pad_id)
    try:
        sens = sensitivity(teacher, ordered.batches(batch_size), tile=tile, progress=progress)
    except PktError as error:
        raise PktError(_in_file(str(error), seeds, order)) from error
    losses = [0.0] * len(seeds)
    for place, loss in zip(order, sens.losses, strict=True):
        losses[place] = loss
    sens.losses = losses
    sens.provenance = {"seeds": describe_seeds(seeds), "teacher": spec.identity()}
    return sens


def _in_file(message: str, seeds: Seeds, order: Sequence[int]) -> str:
    """Name the file and line of the sample an error speaks of."""

    def line(match: re.Match[str]) -> str:
        return f"{seeds.source}:{seeds[order[int(match[1])]].line}"

    return re.sub(r"\bsample (\d+)", line, message, count=1)


def describe_seeds(seeds: Seeds) -> dict[str, Any]:
    return {"source": seeds.source, "count": len(seeds), "tokens": seeds.tokens, "fingerprint": seeds.fingerprint}


def check_rank_fits(pairing: Pairing, rank: int, energy: float | None) -> None:
    """Refuse a rank that some matrix of the student does not have, before the teacher is loaded."""
    low = [f"{t.module} {list(t.shape)}" for t in pairing.targets if rank > min(t.shape)]
    if energy is None and low:
        raise PktError(
            f"rank {rank} is above the smaller side of {len(low)} matrices: {', '.join(low[:8])}; use a smaller rank"
        )


SeedsLike: TypeAlias = Seeds | str | Path


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


class Job:
    """The checked inputs of a transfer: both models' specs, the tasks' seeds, and every option."""

    def __init__(
        self,
        teacher: Any,
        student: Any,
        seeds: SeedsLike | Mapping[str, SeedsLike],
        tokenizer: Any,
        *,
        options: dict[str, Any],
        vocabulary: Vocabulary | None,
        roles: Any,
        factorization: dict[str, Any],
        loss: Literal["answer", "all"],
        max_length: int,
        batch_size: int,
        keep_scores: KeepScores,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        if batch_size < 1:
            raise PktError(f"batch_size={batch_size} must be at least 1")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise PktError(f"dtype={dtype!r} is not a torch.dtype; pass torch.float32, torch.bfloat16 or torch.float16")
        if keep_scores not in ("none", "tiles", "full"):
            raise PktError(f"keep_scores={keep_scores!r} is unknown; choose none, tiles or full")
        self.model, self.student_model, self.options, self.factorization = teacher, student, options, factorization
        self.batch_size, self.keep_scores, self.device, self.dtype = batch_size, keep_scores, device, dtype
        self.teacher, self.student = with_roles(spec_of(teacher), roles), with_roles(spec_of(student), roles)
        check_rank(*(factorization[k] for k in ("rank", "max_rank", "energy", "split")))
        if isinstance(teacher, (str, Path)):
            check_quantization(teacher)
        self.vocabulary = vocabulary
        self.pairing = Pairing(self.teacher, self.student, options, vocabulary)
        check_rank_fits(self.pairing, factorization["rank"], factorization["energy"])
        for given in (teacher, student):
            if isinstance(given, (str, Path)):
                check_checkpoint(given)
        self.several = isinstance(seeds, Mapping)
        named: Mapping[str, SeedsLike] = seeds if isinstance(seeds, Mapping) else {"": seeds}
        if not named:
            raise PktError("no seeds were given")
        for name in named:
            if self.several and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
                raise PktError(f"{name!r} cannot name a task's folder; use letters, digits, '-', '_' and '.'")
        if tokenizer is None and not all(isinstance(given, Seeds) for given in named.values()):
            if isinstance(teacher, nn.Module):
                raise PktError("a teacher in memory needs its tokenizer to read the seeds; pass tokenizer=")
            tokenizer = load_tokenizer(teacher)
        self.seeds: dict[str, Seeds] = {}
        for name, given in named.items():
            if not isinstance(given, Seeds):
                check_tokenizer(tokenizer, self.teacher)
                given = load_seeds(given, tokenizer, loss=loss, max_length=max_length)
            given.check_vocabulary(self.teacher.vocab_size, self.teacher.name)
            self.seeds[name] = given
        # Samples of like length share a micro-batch, so that little is padding; S does not depend on it.
        self.orders = [_longest_first(found) for found in self.seeds.values()]
        both = all(isinstance(m, (str, Path)) for m in (teacher, student))
        if both and vocabulary is None and any(t.group == "embedding" for t in self.pairing.targets):
            with contextlib.suppress(PktError):  # a student need not come with a tokenizer
                count = other_ids(load_tokenizer(teacher) if tokenizer is None else tokenizer, load_tokenizer(student))
                if count:
                    self.pairing.notes.append(
                        f"the student's tokenizer gives {count} tokens other ids than the teacher's, and the tables are fed "
                        "row by row as they are; feed them by tokens with --map-vocabulary, or leave them out with "
                        "--modules all,-embed,-head"
                    )

    def samples(self) -> list[list[dict[str, Tensor]]]:
        """Each task's samples, longest first, as batches of one."""
        return [
            samples_of([collate([seeds[i]], seeds.pad_id) for i in order])
            for seeds, order in zip(self.seeds.values(), self.orders, strict=True)
        ]

    def where(self, task: int, sample: int) -> str:
        seeds = list(self.seeds.values())[task]
        return f"{seeds.source}:{seeds[self.orders[task][sample]].line}"

    def losses(self, task: int, found: Sequence[float]) -> list[float]:
        """The losses in the order of the file."""
        placed = [0.0] * len(found)
        for place, value in zip(self.orders[task], found, strict=True):
            placed[place] = value
        return placed

    def inputs(self) -> dict[str, Any]:
        """All that a result depends on, by the names a refusal uses."""
        stamps = {}
        if not isinstance(self.model, nn.Module) and Path(self.model).is_dir():
            for file in sorted([*Path(self.model).glob("*.safetensors"), *Path(self.model).glob("*.gguf")]):
                stamps[file.name] = [file.stat().st_size, file.stat().st_mtime_ns]
        return {
            "teacher": self.teacher.identity(),
            "teacher's weights": [fingerprint(self.model), stamps],
            "student": self.student.identity(),
            **{f"seeds {name}".strip(): seeds.fingerprint for name, seeds in self.seeds.items()},
            **{f"option {name}": value for name, value in self.options.items()},
            **{f"factorization {name}": value for name, value in self.factorization.items()},
            **({} if self.vocabulary is None else {"vocabulary": sha256(json.dumps(self.vocabulary))}),
            "option keep_scores": self.keep_scores,
            "option batch_size": self.batch_size,
            "device": self.device.type,
            "dtype": str(self.dtype),
            "half types of this CPU": sorted(map(str, ops.native_halves())) if self.device.type == "cpu" else [],
            "versions": versions(),
        }

    def provenance(self, task: int, losses: Sequence[float]) -> dict[str, Any]:
        seeds = list(self.seeds.values())[task]
        return {
            "factorization": self.factorization,
            "teacher": {**self.teacher.identity(), "fingerprint": fingerprint(self.model)},
            "versions": versions(),
            "seeds": describe_seeds(seeds),
            "losses": self.losses(task, losses),
        }

    def scores_metadata(self, task: int, losses: Sequence[float], tile: int | None) -> dict[str, Any]:
        """What `pkt.Sensitivity.load` wants to know besides the scores."""
        model = self.model if isinstance(self.model, nn.Module) else skeleton(load_config(self.model))
        shapes = {n: list(p.shape) for n, p in model.named_parameters() if p.is_floating_point()}
        seeds = list(self.seeds.values())[task]
        return {
            "format": SCORES_FORMAT,
            "tile": tile,
            "layers": self.teacher.layers,
            "losses": self.losses(task, losses),
            "shapes": shapes,
            "provenance": {"seeds": describe_seeds(seeds), "teacher": self.teacher.identity()},
        }

    def finished(self, out: Path) -> dict[str, Extraction] | None:
        """The extractions already in `out`, when they are all there and of the same inputs."""
        found = {}
        for name, seeds in self.seeds.items():
            done = _finished(out / name, self.teacher, self.student, seeds, self.options, self.factorization)
            if done is None:
                return None
            found[name] = done
        run = run_path(out)
        for task, name in enumerate(self.seeds):
            target, left = out / name / SCORES, run / f"scores-{task}.safetensors"
            if self.keep_scores != "none" and not target.is_file():
                # Interrupted between the last two renames.
                if not left.is_file():
                    raise PktError(
                        f"{out} was made without keeping scores; name another folder, or replace it with --force"
                    )
                os.replace(left, target)
        shutil.rmtree(run, ignore_errors=True)
        return found

    def check_output(self, out: Path, *, force: bool) -> None:
        """Refuse an output that holds something else; tasks that an interrupted run already wrote are no such thing."""
        if not self.several or not out.is_dir() or {p.name for p in out.iterdir()} - set(self.seeds):
            check_output_folder(out, force=force)
            return
        for name in self.seeds:
            if force or not self.finished_one(out / name, name):
                check_output_folder(out / name, force=force)

    def result(self, extractions: dict[str, Extraction]) -> Extraction | dict[str, Extraction]:
        return extractions if self.several else extractions[""]

    def save(self, extractions: dict[str, Extraction], out: Path, folder: RunFolder, *, force: bool) -> None:
        """Write every task's folder; each appears whole or not at all."""
        if force and self.several and (out / MANIFEST).is_file():
            # A single extraction of pkt's, which `check_output` found and --force gives up.
            shutil.rmtree(out)
        for task, (name, extraction) in enumerate(extractions.items()):
            target = out / name if name else out
            if force or not self.several or not self.finished_one(target, name):
                sweep_scratch(target)
                extraction.save(target, force=force)
            if folder.scores_file(task).is_file():
                with os_errors(f"writing {target / SCORES}"):
                    os.replace(folder.scores_file(task), target / SCORES)

    def finished_one(self, target: Path, name: str) -> bool:
        done = _finished(target, self.teacher, self.student, self.seeds[name], self.options, self.factorization)
        return done is not None


# --- one run --------------------------------------------------------------------------------------------------------


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
            made = job.pairing.plan(sens)
            if self.on_plan is not None:
                self.on_plan(made)
            provenance = {"seeds": describe_seeds(seeds), "losses": sens.losses}
            found[name] = extract(model, made, **job.factorization, progress=self.progress, provenance=provenance)
            if job.keep_scores != "none":
                assert self.folder is not None
                sens.save(self.folder.scores_file(task))
        return found


def _longest_first(seeds: Seeds) -> list[int]:
    return sorted(range(len(seeds)), key=lambda i: -len(seeds[i].input_ids))


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


def _finished(
    out: str | Path,
    teacher: ModelSpec,
    student: ModelSpec,
    seeds: Seeds,
    options: dict[str, Any],
    factorization: dict[str, Any],
) -> Extraction | None:
    """The extraction already in `out`, when it is of the same inputs; another one's is refused with the difference named."""
    if not (Path(out) / "pkt.json").is_file():
        return None
    ext = Extraction.load(out)
    wanted = {
        "teacher": teacher.identity(),
        "student": student.identity(),
        "seeds": seeds.fingerprint,
        "options": options,
        "factorization": factorization,
    }
    recorded = {
        "teacher": ext.plan.teacher,
        "student": ext.plan.student,
        "seeds": ext.provenance.get("seeds", {}).get("fingerprint"),
        "options": ext.plan.options,
        "factorization": ext.provenance.get("factorization"),
    }
    different = [name for name in wanted if wanted[name] != recorded[name]]
    if different:
        raise PktError(
            f"{out} holds the result of another transfer (other {', '.join(different)}); name another, or replace it with --force"
        )
    return ext
