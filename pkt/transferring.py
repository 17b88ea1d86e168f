"""The first half of the work in one call: seeds, sensitivity, plan and extraction, everything checked before it starts.

The teacher is scored part by part (`pkt.streaming`). As soon as a part's scores are complete its regions are chosen and
factorized, and the scores are forgotten; a layer that is no longer among the best loses its factors too. What cannot be
decided then waits: with students whose layers differ in shape, or random windows (which depend on the student's layer), the
regions of every place a layer may take are chosen at once and the chosen layers' weights are read a third time at the end.

With an output folder, every finished part is a checkpoint in a hidden folder beside it (`.NAME.run`), bound to the inputs.
The same command continues there after any interruption and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pkt import ops
from pkt.adapters import Pair
from pkt.budgeting import MemoryPlan, measured_seconds, parse_size, plan_memory, sizes_of
from pkt.errors import PktError
from pkt.extraction import Extraction, extract, factorize_targets, versions
from pkt.factorization import Split, check_rank
from pkt.loading import NotLayeredError, Teacher, open_teacher
from pkt.models import (
    ModelSpec,
    Target,
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
from pkt.planning import (
    Entry,
    Feed,
    ModuleMap,
    Pairing,
    TransferPlan,
    Vocabulary,
    check_options,
    read_vocabulary,
)
from pkt.scoring import FORMAT as SCORES_FORMAT
from pkt.scoring import Sensitivity, sensitivity
from pkt.seeds import Seeds, collate, load_seeds
from pkt.selection import BLOCK, Strategy
from pkt.storage import (
    LOCK,
    MANIFEST,
    atomic_file,
    check_output_folder,
    lock_folder,
    os_errors,
    read_json,
    sha256,
    sweep_scratch,
    write_json,
    write_tensors,
)
from pkt.streaming import Boundaries, Engine, Key, Progress, Tick, samples_of

KeepScores: TypeAlias = Literal["none", "tiles", "full"]
SCORES = "scores.safetensors"
RUN_FORMAT = "pkt-run-2"
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


# --- regions and factors as scores arrive ---------------------------------------------------------------------------


class Harvest:
    """Regions and factors of one task, taken from each part's scores as soon as they are complete.

    A record is one teacher part's choice: each target's entries by (signature, suffix), JSON, and its factors by the same key.
    Places of the student that a teacher layer may take have one signature when the same regions and factors serve them.
    """

    def __init__(self, pairing: Pairing, factorization: dict[str, Any]) -> None:
        self.pairing, self.factorization = pairing, factorization
        self.teacher, self.student, self.options = pairing.teacher, pairing.student, pairing.options
        self.records: dict[Key, dict[str, Any]] = {}
        self.factors: dict[Key, dict[str, tuple[Tensor, Tensor]]] = {}
        self.ranked = pairing.ranked

    def places(self, layer: int) -> list[int]:
        """The student's layers that this teacher layer feeds, or may feed while the ranking is open."""
        return [place for place in range(self.pairing.count) if layer in self.pairing.layers_for(place)]

    def signature(self, place: int) -> str:
        mine = [
            [t.suffix, *(t.stored_shape if t.experts else t.shape)] for t in self.pairing.targets if t.layer == place
        ]
        # A random window is drawn from the target's name.
        drawn = place if self.options["select"] == "random" else ""
        return sha256(json.dumps([mine, drawn]))[:12]

    def take(self, key: Key, scores: dict[str, Tensor], weight: Callable[[str], Tensor]) -> None:
        """Choose and factorize what this part gives to the student."""
        sums = {name: ops.double_sum(score).item() for name, score in scores.items()}
        record: dict[str, Any] = {"total": sum(sums.values()), "entries": {}}
        wanted = self._wanted(key, scores)
        groups = {group for group, _, _ in wanted}

        def score_of(source: Target) -> Tensor:
            return scores[source.parameter]

        experts_of = self.pairing.expert_chooser(key if isinstance(key, int) else None, score_of)
        for group, target, feeds in wanted:
            name = f"{group}/{target.suffix}"
            entries = [
                e for f in feeds for e in self.pairing.entries(f, score_of, experts_of, whole=sums[f.source.parameter])
            ]
            record["entries"][name] = {"entries": [e.to_json() for e in entries]}
        at_once = len(groups) == 1 or not self.ranked
        factors = self._factorize(record["entries"], weight) if at_once else {}
        self.records[key], self.factors[key] = record, factors
        if isinstance(key, int) and self.ranked:
            self._forget_losers()

    def _wanted(self, key: Key, scores: dict[str, Tensor]) -> list[tuple[str, Target, list[Feed]]]:
        """(signature, target, what feeds it) for everything this part's scores decide."""
        wanted: list[tuple[str, Target, list[Feed]]] = []
        if not isinstance(key, int):
            outside = [(t, self.pairing.feeds(t, None)) for t in self.pairing.targets if t.layer is None]
            return [("", t, feeds) for t, feeds in outside if feeds and feeds[0].source.parameter in scores]
        seen: set[str] = set()
        for place in self.places(key):
            group = self.signature(place)
            if group in seen:
                continue
            seen.add(group)
            mine = [(t, self.pairing.feeds(t, key)) for t in self.pairing.targets if t.layer == place]
            wanted += [(group, target, feeds) for target, feeds in mine if feeds]
        return wanted

    def _factorize(
        self, targets: dict[str, dict[str, Any]], weight: Callable[[str], Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B for each target of one part, whose energies are filled in."""

        def matrix_of(entry: Entry) -> Tensor:
            source = self.pairing.by_module[entry.source]
            return source.oriented(weight(source.parameter), entry.expert)

        entries = {name: [Entry.from_json(e) for e in target["entries"]] for name, target in targets.items()}
        found = factorize_targets(entries, matrix_of, **self.factorization)
        for name, (_, energy) in found.items():
            targets[name]["energy"] = energy
        return {name: (pair.A.cpu(), pair.B.cpu()) for name, (pair, _) in found.items()}

    def _best(self) -> list[int]:
        scored = sorted(
            (key for key in self.records if isinstance(key, int)), key=lambda k: (-self.records[k]["total"], k)
        )
        return scored[: self.pairing.count]

    def _forget_losers(self) -> None:
        best = set(self._best())
        for key in list(self.factors):
            if isinstance(key, int) and key not in best:
                self.factors[key] = {}

    def layer_map(self) -> list[int]:
        return sorted(self._best()) if self.pairing.fixed is None else self.pairing.fixed

    def finish(
        self, weights_of: Callable[[Key], contextlib.AbstractContextManager[Callable[[str], Tensor]]]
    ) -> tuple[TransferPlan, dict[str, Pair], dict[str, float]]:
        """The plan, and a pair and its energy for each target. Reads a layer again where its factors had to wait."""
        chosen = self.layer_map()
        place_of: dict[str, tuple[Key, str]] = {}
        keys: list[Key]
        for target in self.pairing.targets:
            if target.layer is None:
                name, keys = f"/{target.suffix}", [k for k in self.records if not isinstance(k, int)]
            else:
                name, keys = f"{self.signature(target.layer)}/{target.suffix}", [chosen[target.layer]]
            # A partial transfer has targets that nothing feeds.
            for k in keys:
                if name in self.records[k]["entries"]:
                    place_of[target.module] = k, name
        for key in dict.fromkeys(k for k, _ in place_of.values() if isinstance(k, int)):
            late = sorted({n for k, n in place_of.values() if k == key and n not in self.factors[key]})
            if late:
                with weights_of(key) as weight:
                    waiting = {name: self.records[key]["entries"][name] for name in late}
                    self.factors[key].update(self._factorize(waiting, weight))
        entries, pairs, energies = [], {}, {}
        for module, (part, name) in place_of.items():
            found, (A, B) = self.records[part]["entries"][name], self.factors[part][name]
            mine = [Entry.from_json({**e, "target": module}) for e in found["entries"]]
            entries += mine
            pairs[module] = Pair(A, B, mine[0].kind)
            energies[module] = found["energy"]
        layer_scores = [self.records[i]["total"] for i in range(self.teacher.num_layers)]
        return self.pairing.finish(entries, chosen, layer_scores), pairs, energies


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
                self.folder.seal_scores(task, self.job, losses[task], self.tile)
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


# --- the run folder -------------------------------------------------------------------------------------------------


def run_path(out: Path) -> Path:
    """Where an unfinished transfer to `out` keeps its checkpoints."""
    return out.absolute().parent / f".{out.name}.run"


class RunFolder:
    """Checkpoints of an unfinished transfer: one file a part, written whole, checksummed, bound to the inputs.

    run.json holds the inputs and the execution plan; step-NNN the records and factors of a part; grad-NNN what the next
    part starts from. grad is written before step, and the one before is removed after it: a part is finished when its step
    is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.value: dict[str, Any] = {}
        self.steps: list[str] = []

    @staticmethod
    @contextlib.contextmanager
    def locked(out: Path, *, fresh: bool) -> Iterator[RunFolder]:
        """The run folder of `out`, held against a second run; removed when the work is done or nothing of it is."""
        path = run_path(out)
        with lock_folder(path, out):
            folder = RunFolder(path)
            try:
                if fresh:
                    folder.clear()
                yield folder
                shutil.rmtree(path, ignore_errors=True)
            except BaseException:
                if not folder.steps:
                    shutil.rmtree(path, ignore_errors=True)
                raise

    def clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != LOCK:
                entry.unlink()

    def bind(self, inputs: dict[str, Any]) -> None:
        """Refuse to continue a run of other inputs, naming what differs; sweep away what an interrupted write left."""
        inputs = json.loads(json.dumps(inputs))
        file = self.path / "run.json"
        if file.is_file():
            # Known first: a folder that holds finished parts is kept, whatever is wrong with the rest.
            self.steps = sorted(p.name for p in self.path.glob("step-*.safetensors"))
            try:
                self.value = read_json(file)
            except PktError as error:
                raise PktError(f"{error}; start over with --force, or delete {self.path}") from error
            recorded = self.value.get("inputs", {}) if isinstance(self.value, dict) else {}
            if recorded and self.value.get("format") == "pkt-run-1":
                raise PktError(
                    f"{self.path} holds an unfinished run of an older pkt; start over with --force, or delete it"
                )
            if not recorded or self.value.get("format") != RUN_FORMAT:
                raise PktError(f"{file} is damaged; start over with --force, or delete {self.path}")
            different = sorted(k for k in {*inputs, *recorded} if inputs.get(k) != recorded.get(k))
            if different:
                raise PktError(
                    f"{self.path} holds an unfinished run of other inputs ({', '.join(map(_difference, different))} "
                    "changed); finish it with the old ones, or start over with --force"
                )
        else:
            self.clear()
            self.value = {"format": RUN_FORMAT, "inputs": inputs}
            self._write()
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name.endswith(".tmp"):
                entry.unlink()

    def _write(self) -> None:
        with atomic_file(self.path / "run.json") as scratch:
            write_json(scratch, self.value)

    def execution(self, sizes: list[list[int]], memory: MemoryPlan) -> list[list[int]]:
        """The recorded micro-batches, or these, recorded: they are part of what makes the bytes."""
        recorded = self.value.get("execution")
        if recorded is None:
            recorded = self.value["execution"] = {
                "micro_batches": sizes,
                "halvings": [],
                "places": memory.places,
                "resident": memory.resident,
                "threads": torch.get_num_threads(),
            }
            self._write()
        found: list[list[int]] = recorded["micro_batches"]
        return found

    def resized(self, sizes: list[list[int]], why: str) -> None:
        self.value["execution"]["micro_batches"] = sizes
        self.value["execution"]["halvings"].append({"why": why, "after": len(self.steps)})
        self._write()

    def commit(self, key: Key, progress: Progress, harvests: list[Harvest]) -> None:
        """A part of every task is finished."""
        number = len(self.steps)
        tensors = {f"grad.{i}": grad for i, grad in enumerate(progress.grads)}
        state = {"boundary": progress.boundary, "losses": progress.losses, "sizes": progress.sizes}
        if key == "front":
            # Nothing is left to compute from gradients.
            tensors, state["boundary"] = {}, -1
        self._save(f"grad-{number:04d}.safetensors", state, tensors)
        if key == "head" and any(progress.carried):
            carried = {f"{i}.{k}": t for i, task in enumerate(progress.carried) for k, t in task.items()}
            self._save("tied.safetensors", {}, carried)
        factors = {}
        for task, harvest in enumerate(harvests):
            for name, (A, B) in harvest.factors[key].items():
                factors[f"{task}.A.{name}"], factors[f"{task}.B.{name}"] = A, B
        self._save(
            f"step-{number:04d}.safetensors", {"key": key, "records": [h.records[key] for h in harvests]}, factors
        )
        self.steps.append(f"step-{number:04d}.safetensors")
        if number:
            (self.path / f"grad-{number - 1:04d}.safetensors").unlink(missing_ok=True)

    def resume(self, harvests: list[Harvest]) -> Progress | None:
        """Put finished parts back into the harvests; where the run stands, or None at its beginning."""
        for number, name in enumerate(self.steps):
            if name != f"step-{number:04d}.safetensors":
                raise PktError(f"{self.path} lacks step {number}; start over with --force")
            step, factors = self._load(name)
            key: Key = step["key"]
            for task, harvest in enumerate(harvests):
                harvest.records[key] = step["records"][task]
                names = [n for n in step["records"][task]["entries"] if f"{task}.A.{n}" in factors]
                harvest.factors[key] = {n: (factors[f"{task}.A.{n}"], factors[f"{task}.B.{n}"]) for n in names}
        if not self.steps:
            return None
        for harvest in harvests:
            if harvest.ranked:
                harvest._forget_losers()
        state, grads = self._load(f"grad-{len(self.steps) - 1:04d}.safetensors")
        carried: list[dict[str, Tensor]] = [{} for _ in harvests]
        if (self.path / "tied.safetensors").is_file():
            _, tied = self._load("tied.safetensors")
            for label, tensor in tied.items():
                owner, _, rest = label.partition(".")
                carried[int(owner)][rest] = tensor
        return Progress(
            state["boundary"], [grads[f"grad.{i}"] for i in range(len(grads))], state["losses"], carried, state["sizes"]
        )

    def _save(self, name: str, value: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
        text = json.dumps(value)
        with atomic_file(self.path / name) as scratch:
            write_tensors(scratch, tensors, ("pkt", json.dumps([_digest(text, tensors), text])))
            with open(scratch, "rb") as file:
                os.fsync(file.fileno())

    def _load(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        from safetensors import SafetensorError, safe_open

        path = self.path / name
        try:
            with safe_open(path, framework="pt") as file:
                digest, text = json.loads(file.metadata()["pkt"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if digest != _digest(text, tensors):
                raise ValueError
            value = json.loads(text)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise PktError(
                f"{path} is damaged, so this run cannot continue from it; start over with --force, or delete {self.path}"
            ) from error
        return value, tensors

    # -- scores kept for later plans

    def scores_file(self, task: int) -> Path:
        return self.path / f"scores-{task}.safetensors"

    def keep_scores(self, task: int, scores: dict[str, Tensor], tile: int | None) -> None:
        """Append a part's scores; parts computed twice because of an interruption are written twice, the last one counts."""
        kept = {n: s if tile is None else ops.tile_sums(s, tile) for n, s in scores.items()}
        if kept:
            part = sha256(*sorted(kept))[:16]
            with atomic_file(self.path / f"part-{task}-{part}.safetensors") as scratch:
                write_tensors(scratch, kept)

    def seal_scores(self, task: int, job: Job, losses: Sequence[float], tile: int | None) -> None:
        """One file of all parts that `pkt.Sensitivity.load` reads, copied part by part; once it is there it is whole."""
        files = sorted(self.path.glob(f"part-{task}-*.safetensors"))
        if files and not self.scores_file(task).is_file():
            self._join_parts(files, self.scores_file(task), job.scores_metadata(task, losses, tile))
        for file in files:
            file.unlink()

    def _join_parts(self, files: list[Path], out: Path, meta: dict[str, Any]) -> None:
        from safetensors import safe_open

        header: dict[str, Any] = {"__metadata__": {"pkt": json.dumps(meta)}}
        places: dict[str, Path] = {}
        offset = 0
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    shape = list(opened.get_slice(name).get_shape())
                    size = 4 * math.prod(shape)
                    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
                    places[name], offset = file, offset + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with atomic_file(out) as scratch, open(scratch, "wb") as into:
            into.write(struct.pack("<Q", len(text)) + text)
            for name, file in places.items():
                with safe_open(file, framework="pt") as opened:
                    into.write(opened.get_tensor(name).contiguous().numpy().data)


def _difference(name: str) -> str:
    return name.removeprefix("option ")


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
