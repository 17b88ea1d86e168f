"""The checked inputs of a transfer, what its results are known by, and which of them are there already."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor, nn

from pkt import ops
from pkt.errors import PktError
from pkt.extraction import Extraction
from pkt.files import MANIFEST, check_output_folder, os_errors, sha256, sweep_scratch
from pkt.manifest import difference, versions
from pkt.models import (
    ModelSpec,
    check_checkpoint,
    check_quantization,
    check_tokenizer,
    checked_device,
    fingerprint,
    load_config,
    load_tokenizer,
    other_ids,
    skeleton,
    spec_of,
    with_roles,
)
from pkt.options import Execution, Factorization, KeepScores, Limits, PlanOptions, Reading
from pkt.planning import Pairing, Vocabulary
from pkt.scoring import FORMAT as SCORES_FORMAT
from pkt.scoring import in_order_of, longest_first
from pkt.seeds import Seeds, collate, load_seeds
from pkt.streaming import samples_of
from pkt.streaming.memory import parse_size
from pkt.transferring.checkpoints import RunFolder, run_path

SeedsLike: TypeAlias = Seeds | str | Path
SCORES = "scores.safetensors"


class Job:
    """The checked inputs of a transfer: both models' specs, the tasks' seeds, and every option."""

    def __init__(
        self,
        teacher: Any,
        student: Any,
        seeds: SeedsLike | Mapping[str, SeedsLike],
        tokenizer: Any,
        *,
        options: PlanOptions,
        vocabulary: Vocabulary | None,
        factorization: Factorization,
        reading: Reading,
        execution: Execution,
        limits: Limits,
        keep_scores: KeepScores,
    ) -> None:
        self.model, self.options, self.vocabulary, self.factorization = teacher, options, vocabulary, factorization
        if keep_scores not in get_args(KeepScores):
            raise PktError(f"keep_scores={keep_scores!r} is unknown; choose none, tiles or full")
        self.batch_size, self.dtype, self.limits, self.keep_scores = (
            execution.batch_size,
            execution.dtype,
            limits,
            keep_scores,
        )
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise PktError(
                f"dtype={self.dtype!r} is not a torch.dtype; pass torch.float32, torch.bfloat16 or torch.float16"
            )
        self.device = _device_of(teacher) if execution.device is None else checked_device(execution.device)
        self.device_memory, self.host_memory = parse_size(limits.device_memory), parse_size(limits.host_memory)
        self.teacher, self.student = (with_roles(spec_of(model), options.roles) for model in (teacher, student))
        if isinstance(teacher, (str, Path)):
            check_quantization(teacher)
        self.pairing = Pairing(self.teacher, self.student, options, vocabulary)
        check_rank_fits(self.pairing, factorization)
        for given in (teacher, student):
            if isinstance(given, (str, Path)):
                check_checkpoint(given)
        self.several = isinstance(seeds, Mapping)
        self.seeds = self._read_seeds(seeds if isinstance(seeds, Mapping) else {"": seeds}, tokenizer, reading)
        self.orders = [longest_first(found) for found in self.seeds.values()]
        self._note_other_ids(student, tokenizer)

    def _read_seeds(self, named: Mapping[str, SeedsLike], tokenizer: Any, reading: Reading) -> dict[str, Seeds]:
        if not named:
            raise PktError("no seeds were given")
        for name in named:
            if self.several and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
                raise PktError(f"{name!r} cannot name a task's folder; use letters, digits, '-', '_' and '.'")
        if tokenizer is None and not all(isinstance(given, Seeds) for given in named.values()):
            if isinstance(self.model, nn.Module):
                raise PktError("a teacher in memory needs its tokenizer to read the seeds; pass tokenizer=")
            tokenizer = load_tokenizer(self.model)
        found: dict[str, Seeds] = {}
        for name, given in named.items():
            if not isinstance(given, Seeds):
                check_tokenizer(tokenizer, self.teacher)
                given = load_seeds(given, tokenizer, loss=reading.loss, max_length=reading.max_length)
            given.check_vocabulary(self.teacher.vocab_size, self.teacher.name)
            found[name] = given
        return found

    def _note_other_ids(self, student: Any, tokenizer: Any) -> None:
        """Say in the plan where tables are fed row by row though the two tokenizers number their tokens differently."""
        stored = all(isinstance(m, (str, Path)) for m in (self.model, student))
        if not stored or self.vocabulary is not None or all(t.group != "embedding" for t in self.pairing.targets):
            return
        with contextlib.suppress(PktError):  # a student need not come with a tokenizer
            count = other_ids(load_tokenizer(self.model) if tokenizer is None else tokenizer, load_tokenizer(student))
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
        return seeds.where(self.orders[task][sample])

    def losses(self, task: int, found: Sequence[float]) -> list[float]:
        """The losses in the order of the file."""
        return in_order_of(found, self.orders[task])

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
            **{f"option {name}": value for name, value in self.options.as_dict().items()},
            **{f"factorization {name}": value for name, value in self.factorization.as_dict().items()},
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
            "factorization": self.factorization.as_dict(),
            "teacher": {**self.teacher.identity(), "fingerprint": fingerprint(self.model)},
            "versions": versions(),
            "seeds": seeds.describe(),
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
            "provenance": {"seeds": seeds.describe(), "teacher": self.teacher.identity()},
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


def check_rank_fits(pairing: Pairing, options: Factorization) -> None:
    """Refuse a rank that some matrix of the student does not have, before the teacher is loaded."""
    low = [f"{t.module} {list(t.shape)}" for t in pairing.targets if options.rank > min(t.shape)]
    if options.energy is None and low:
        raise PktError(
            f"rank {options.rank} is above the smaller side of {len(low)} matrices: {', '.join(low[:8])}; use a smaller rank"
        )


def _finished(
    out: str | Path,
    teacher: ModelSpec,
    student: ModelSpec,
    seeds: Seeds,
    options: PlanOptions,
    factorization: Factorization,
) -> Extraction | None:
    """The extraction already in `out`, when it is of the same inputs; another one's is refused with the difference named."""
    if not (Path(out) / "pkt.json").is_file():
        return None
    ext = Extraction.load(out)
    wanted = {
        "teacher": teacher.identity(),
        "student": student.identity(),
        "seeds": seeds.fingerprint,
        "options": options.as_dict(),
        "factorization": factorization.as_dict(),
    }
    recorded = {
        "teacher": ext.plan.teacher,
        "student": ext.plan.student,
        "seeds": ext.provenance.get("seeds", {}).get("fingerprint"),
        "options": ext.plan.options,
        "factorization": ext.provenance.get("factorization"),
    }
    different = difference(recorded, wanted)
    if different:
        raise PktError(
            f"{out} holds the result of another transfer ({', '.join(different)}); name another, or replace it with --force"
        )
    return ext


def _device_of(teacher: Any) -> torch.device:
    if isinstance(teacher, nn.Module):
        return next((p.device for p in teacher.parameters()), torch.device("cpu"))
    return torch.device("cpu")
