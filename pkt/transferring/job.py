"""The checked inputs of a transfer, what its results are known by, and which of them are there already."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor

from pkt import ops
from pkt.errors import PktError
from pkt.extraction import Extraction
from pkt.files import MANIFEST, check_output_folder, os_errors, run_path, sha256, sweep_scratch
from pkt.manifest import difference, recorded_day, versions
from pkt.models import Model, checked_device, content_kind, other_ids, with_roles
from pkt.options import Execution, Factorization, KeepScores, Limits, PlanOptions, Reading
from pkt.planning import BLOCK, Pairing, read_vocabulary
from pkt.scoring import FORMAT as SCORES_FORMAT
from pkt.scoring import KEPT as SCORES
from pkt.scoring import check_measure, check_tile, in_order_of, longest_first
from pkt.seeds import Seeds, collate, load_seeds
from pkt.streaming import parse_size, samples_of
from pkt.transferring.checkpoints import RunFolder

SeedsLike: TypeAlias = Seeds | str | Path


@dataclass(frozen=True)
class Recipe:
    """How an extraction is made of the scores of a task: which regions, at what rank."""

    options: PlanOptions
    factorization: Factorization

    def identity(self, name: str) -> dict[str, Any]:
        """What is compared when a result by this recipe is used again."""
        found = _of_options(self.options.as_dict(), self.factorization.as_dict())
        return {f"{entry} of {name}": value for entry, value in found.items()} if name else found


Result: TypeAlias = tuple[str, str]  # (task, recipe), of which one that stands alone has no name


def folder_of(out: Path, result: Result) -> Path:
    return out.joinpath(*filter(None, result))


class ScoringJob:
    """The checked inputs of one reading of a teacher: its spec, the tasks' seeds, how it is computed, which scores are kept.

    keeps: whether scores are kept, as sums over `tile` x `tile` blocks where that is given.
    """

    doing = "scoring"

    def __init__(
        self,
        teacher: Model,
        seeds: Mapping[str, SeedsLike],
        tokenizer: Any,
        *,
        reading: Reading,
        execution: Execution,
        limits: Limits,
        measure: str = "theta_grad",
        tile: int | None = None,
        today: datetime.date | None = None,
    ) -> None:
        self.today = today
        self.model, self.limits, self.measure, self.tile, self.keeps = teacher, limits, measure, tile, True
        self.batch_size, self.dtype = execution.batch_size, execution.dtype
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise PktError(
                f"dtype={self.dtype!r} is not a torch.dtype; pass torch.float32, torch.bfloat16 or torch.float16"
            )
        check_measure(measure)
        self.device = _device_of(teacher) if execution.device is None else checked_device(execution.device)
        self.device_memory, self.host_memory = parse_size(limits.device_memory), parse_size(limits.host_memory)
        teacher.check_dequantized()
        teacher.check()
        self.teacher = teacher.spec
        if tile is not None:
            check_tile(tile, teacher.shapes.values())
        self.seeds = self._read_seeds(seeds, tokenizer, reading)
        self.orders = [longest_first(found) for found in self.seeds.values()]

    def _read_seeds(self, named: Mapping[str, SeedsLike], tokenizer: Any, reading: Reading) -> dict[str, Seeds]:
        check_names(named, "seeds", "a task")
        if tokenizer is None and not all(isinstance(given, Seeds) for given in named.values()):
            if not self.model.is_named:
                raise PktError("a teacher in memory needs its tokenizer to read the seeds; pass tokenizer=")
            tokenizer = self.model.tokenizer
        found: dict[str, Seeds] = {}
        for name, given in named.items():
            if not isinstance(given, Seeds):
                given = load_seeds(given, tokenizer, loss=reading.loss, max_length=reading.max_length, today=self.today)
            given.check_fits(self.teacher.vocab_size, self.teacher.positions, self.teacher.name)
            found[name] = given
        return found

    def identify(self, *, progress: bool) -> None:
        """Hash the teacher's content into what it is known by, once all that is quick has been checked."""
        known = self.model.identified(progress=progress)
        self.teacher = dataclasses.replace(self.teacher, content=known.content)

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

    def made_of(self) -> dict[str, Any]:
        """What the results are of, by the names a refusal uses."""
        return {
            **_of_models(self.teacher.identity(), None),
            **_of_seeds(self.seeds),
            "option measure": self.measure,
            "option tile": self.tile,
            "dtype": str(self.dtype),
        }

    def inputs(self) -> dict[str, Any]:
        """All that the bytes of an unfinished run depend on: what the results are of, and how they are computed."""
        return {
            **self.made_of(),
            "option batch_size": self.batch_size,
            **self._day(),
            "device": self.device.type,
            "half types of this CPU": sorted(map(str, ops.native_halves())) if self.device.type == "cpu" else [],
            "versions": versions(),
        }

    def _day(self) -> dict[str, Any]:
        days = [seeds.today.isoformat() for seeds in self.seeds.values() if seeds.today is not None]
        return {"today": days[0]} if days else {}

    def scores_metadata(self, task: int, losses: Sequence[float]) -> dict[str, Any]:
        """What `pkt.Sensitivity.load` wants to know besides the scores."""
        seeds = list(self.seeds.values())[task]
        return {
            "format": SCORES_FORMAT,
            "tile": self.tile,
            "layers": self.teacher.layers,
            "losses": self.losses(task, losses),
            "shapes": {name: list(shape) for name, shape in self.model.shapes.items()},
            "provenance": {"seeds": seeds.describe(), "teacher": self.teacher.identity()},
            # Absent, as in files of before there were others, it is the method's own.
            **({} if self.measure == "theta_grad" else {"measure": self.measure}),
        }


class TransferJob(ScoringJob):
    """Those of a transfer: the student too, and the recipes of what is made for each task."""

    doing = "transferring"

    def __init__(
        self,
        teacher: Model,
        student: Model,
        seeds: Mapping[str, SeedsLike],
        recipes: Mapping[str, Recipe],
        tokenizer: Any,
        *,
        map_vocabulary: bool | tuple[Any, Any],
        reading: Reading,
        execution: Execution,
        limits: Limits,
        keep_scores: KeepScores,
        only: Collection[Result] | None = None,
        today: datetime.date | None = None,
    ) -> None:
        if keep_scores not in get_args(KeepScores):
            raise PktError(f"keep_scores={keep_scores!r} is unknown; choose none, tiles or full")
        check_names(recipes, "recipes", "a recipe")
        super().__init__(teacher, seeds, tokenizer, reading=reading, execution=execution, limits=limits, today=today)
        if not student.on_hub:
            student.check()  # a Hub student's weights are not needed yet
        self.recipes, self.student = dict(recipes), student.spec
        wanted = any(recipe.options.map_vocabulary for recipe in self.recipes.values())
        self.vocabulary = read_vocabulary(map_vocabulary if wanted else False, teacher, student)
        self.pairings = {name: self._pairing(recipe) for name, recipe in self.recipes.items()}
        every = [(task, recipe) for task in self.seeds for recipe in self.recipes]
        self.results: list[Result] = [result for result in every if only is None or result in only]
        self.partial = len(self.results) < len(every)
        self.keep_scores, self.keeps = keep_scores, keep_scores != "none"
        self.tile = _tile(self.pairings.values()) if keep_scores == "tiles" else None
        self._note_other_ids(student, tokenizer)

    def _pairing(self, recipe: Recipe) -> Pairing:
        options = recipe.options
        teacher, student = (with_roles(spec, options.roles) for spec in (self.teacher, self.student))
        pairing = Pairing(teacher, student, options, self.vocabulary if options.map_vocabulary else None)
        check_rank_fits(pairing, recipe.factorization)
        return pairing

    def _note_other_ids(self, student: Model, tokenizer: Any) -> None:
        """Say in the plan where tables are fed row by row though the two tokenizers number their tokens differently."""
        by_row = [
            p for p in self.pairings.values() if p.vocabulary is None and any(t.group == "embedding" for t in p.targets)
        ]
        if not by_row or not (self.model.is_named and student.is_named):
            return
        with contextlib.suppress(PktError):  # a student need not come with a tokenizer
            count = other_ids(self.model.tokenizer if tokenizer is None else tokenizer, student.tokenizer)
            for pairing in by_row if count else ():
                pairing.notes.append(
                    f"the student's tokenizer gives {count} tokens other ids than the teacher's, and the tables are fed "
                    "row by row as they are; feed them by tokens with --map-vocabulary, or leave them out with "
                    "--modules all,-embed,-head"
                )

    def identify(self, *, progress: bool) -> None:
        super().identify(progress=progress)
        for pairing in self.pairings.values():
            pairing.teacher = dataclasses.replace(pairing.teacher, content=self.teacher.content)

    def made_of(self) -> dict[str, Any]:
        only = {"option only": [list(result) for result in self.results]} if self.partial else {}
        return {**self._made_of(self.seeds, self.recipes), "option keep_scores": self.keep_scores, **only}

    def _made_of(self, seeds: Mapping[str, Seeds], recipes: Mapping[str, Recipe]) -> dict[str, Any]:
        return {
            **_of_models(self.teacher.identity(), self.student.identity()),
            **_of_seeds(seeds),
            **{k: v for name, recipe in recipes.items() for k, v in recipe.identity(name).items()},
            **self._choices(recipes),
        }

    def _choices(self, recipes: Mapping[str, Recipe]) -> dict[str, Any]:
        mapped = self.vocabulary is not None and any(recipe.options.map_vocabulary for recipe in recipes.values())
        return {**({"vocabulary": sha256(json.dumps(self.vocabulary))} if mapped else {}), "dtype": str(self.dtype)}

    def provenance(self, result: Result) -> dict[str, Any]:
        task, recipe = result
        return {
            "factorization": self.recipes[recipe].factorization.as_dict(),
            "teacher": self.teacher.identity(),
            "versions": versions(),
            "seeds": self.seeds[task].describe(),
            **self._choices({recipe: self.recipes[recipe]}),
        }

    def finished(self, out: Path) -> dict[Result, Extraction] | None:
        """The extractions already in `out`, when they are all there and of the same inputs."""
        found = {}
        for result in self.results:
            done = self._finished_one(folder_of(out, result), result)
            if done is None:
                return None
            found[result] = done
        run = RunFolder(run_path(out))
        for i, task in enumerate(self.seeds):
            target, left = out / task / SCORES, run.scores_file(i)
            if self.keep_scores != "none" and not target.is_file():
                # Interrupted between the last two renames.
                if not left.is_file():
                    raise PktError(
                        f"{out} was made without keeping scores; name another folder, or replace it with --force"
                    )
                run.check(self.inputs())
                os.replace(left, target)
        shutil.rmtree(run.path, ignore_errors=True)
        return found

    def _finished_one(self, folder: Path, result: Result) -> Extraction | None:
        task, recipe = result
        return _finished(folder, self._made_of({"": self.seeds[task]}, {"": self.recipes[recipe]}))

    def check_output(self, out: Path, *, force: bool) -> None:
        """Refuse an output that holds something else; results that an interrupted run already wrote are no such thing."""
        folders = {folder_of(out, result): result for result in self.results}
        above = {out, *(out / task for task in self.seeds)} - folders.keys()
        for folder in filter(Path.is_dir, above):
            sweep_scratch(folder)
        ours = {*folders, *above, *(out / task / SCORES for task in self.seeds)}
        if not out.is_dir() or not above or any(set(f.iterdir()) - ours for f in above if f.is_dir()):
            check_output_folder(out, force=force)
            return
        for folder, result in folders.items():
            if force or self._finished_one(folder, result) is None:
                check_output_folder(folder, force=force)

    def save(self, extractions: Mapping[Result, Extraction], out: Path, folder: RunFolder, *, force: bool) -> None:
        """Write every result's folder; each appears whole or not at all."""
        several = ("", "") not in extractions
        if force and several and (out / MANIFEST).is_file():
            # A single extraction of pkt's, which `check_output` found and --force gives up.
            shutil.rmtree(out)
        for result, extraction in extractions.items():
            target = folder_of(out, result)
            if force or not several or self._finished_one(target, result) is None:
                extraction.save(target, force=force)
        for i, task in enumerate(self.seeds):
            if folder.scores_file(i).is_file():
                with os_errors(f"writing {out / task / SCORES}"):
                    os.replace(folder.scores_file(i), out / task / SCORES)


def check_names(named: Mapping[str, Any], what: str, one: str) -> None:
    """One alone may have no name."""
    if not named:
        raise PktError(f"no {what} were given")
    for name in named:
        if (name or len(named) > 1) and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise PktError(f"{name!r} cannot name {one}'s folder; use letters, digits, '-', '_' and '.'")


def day_of(out: Path, results: Iterable[Result] = ()) -> datetime.date | None:
    """The day that an unfinished or finished run to `out` read its seeds on, where their chat template prints it."""
    files = [run_path(out) / "run.json", *(folder_of(out, result) / MANIFEST for result in results)]
    return next(filter(None, map(recorded_day, files)), None)


def check_rank_fits(pairing: Pairing, options: Factorization) -> None:
    """Refuse a rank that some matrix of the student does not have, before the teacher is loaded."""
    low = [f"{t.module} {list(t.shape)}" for t in pairing.targets if options.rank > min(t.shape)]
    if options.energy is None and low:
        raise PktError(
            f"rank {options.rank} is above the smaller side of {len(low)} matrices: {', '.join(low[:8])}; use a smaller rank"
        )


def _finished(out: Path, wanted: dict[str, Any]) -> Extraction | None:
    """The extraction already in `out`, when it is of the same inputs; another one's is refused with the difference named."""
    if not (out / MANIFEST).is_file():
        return None
    ext = Extraction.load(out)
    then = ext.provenance
    recorded: dict[str, Any] = {
        **_of_models(ext.plan.teacher, ext.plan.student),
        "seeds": then.get("seeds", {}).get("fingerprint"),
        **_of_options(ext.plan.options, then.get("factorization", {})),
        **{name: then[name] for name in ("vocabulary", "dtype") if name in then},
    }
    # Older results do not record these.
    unknown = {"teacher's weights", "teacher's config.json", "vocabulary", "dtype"} - set(recorded)
    different = difference(recorded, {name: value for name, value in wanted.items() if name not in unknown})
    if different:
        raise PktError(
            f"{out} holds the result of another transfer ({', '.join(different)}); name another, or replace it with --force"
        )
    return ext


def _of_models(teacher: Mapping[str, Any], student: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entries of an identity that say which models it is of."""
    apart = ("fingerprint", "configuration", "revision")
    found: dict[str, Any] = {"teacher": {k: v for k, v in teacher.items() if k not in apart}}
    if student is not None:
        found["student"] = dict(student)
    if content_kind(teacher):
        found |= {"teacher's weights": teacher["fingerprint"], "teacher's config.json": teacher["configuration"]}
    return found


def _of_seeds(seeds: Mapping[str, Seeds]) -> dict[str, Any]:
    return {f"seeds {name}".strip(): found.fingerprint for name, found in seeds.items()}


def _of_options(planned: Mapping[str, Any], factorization: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an identity that say what was asked for."""
    return {
        **{f"option {name}": value for name, value in planned.items()},
        **{f"factorization {name}": value for name, value in factorization.items()},
    }


def _tile(pairings: Iterable[Pairing]) -> int:
    """The largest power of two up to 64 that divides every side the student cuts, and every row where a role begins."""
    sides = {BLOCK}
    for pairing in pairings:
        for feed in pairing.possible_feeds():
            have = sum(b - a for a, b in feed.rows), feed.source.shape[1]
            sides |= {b for a, b in zip(have, feed.shape, strict=True) if a != b}
            if have[0] != feed.source.shape[0]:
                sides |= {side for run in feed.rows for side in run if side}
    return math.gcd(BLOCK, *sides)


def _device_of(teacher: Model) -> torch.device:
    parameters = () if teacher.module is None else teacher.module.parameters()
    return next((p.device for p in parameters), torch.device("cpu"))
