"""The plan of a transfer, a plain value, and its file: which part of which teacher matrix starts which student matrix."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pkt.errors import PktError
from pkt.files import atomic_file, read_json, write_json
from pkt.models import Kind
from pkt.planning.regions import Region, runs
from pkt.tables import Tabular

# Spans of experts that a line names.
_FEW = 6
FORMAT = "pkt-plan-2"
READABLE = ("pkt-plan-1", FORMAT)  # 1 had one entry for each target


@dataclass(frozen=True)
class Entry:
    """One student matrix (a module's name), or a part of it, and the part of a teacher's that feeds it.

    score: Σ of S in the region; share: of its source matrix's whole S. expert: of a source [experts, out, in]. place: where
    in the target the region goes; None: it is all of it. target_expert: (which, of how many) of a target [experts, out, in].
    What no entry of a target feeds is zero.
    """

    source: str
    target: str
    region: Region
    score: float
    share: float
    kind: Kind  # of the target
    expert: int | None = None
    place: Region | None = None
    target_expert: tuple[int, int] | None = None

    @property
    def target_shape(self) -> tuple[int, int]:
        shape = None if self.place is None else self.place.source_shape
        return shape or self.region.shape

    def to_json(self) -> dict[str, Any]:
        value = {
            "source": self.source,
            "target": self.target,
            "kind": self.kind,
            "score": self.score,
            "share": self.share,
            "region": self.region.to_json(),
        }
        if self.expert is not None:
            value["expert"] = self.expert
        if self.target_expert is not None:
            value["target_expert"] = self.target_expert
        return value if self.place is None else {**value, "place": self.place.to_json()}

    @classmethod
    def from_json(cls, e: Mapping[str, Any]) -> Entry:
        place = None if e.get("place") is None else Region.from_json(e["place"])
        region = Region.from_json(e["region"])
        slot = None if e.get("target_expert") is None else (int(e["target_expert"][0]), int(e["target_expert"][1]))
        return cls(e["source"], e["target"], region, e["score"], e["share"], e["kind"], e.get("expert"), place, slot)


def describe(entries: Sequence[Entry]) -> tuple[str, str, str, str]:
    """A line of the plan's table: an entry, or one for each expert of a target's."""
    first = entries[0]
    experts = spans([e.expert for e in entries if e.expert is not None])
    source = f"{first.source}[{experts}]" if experts else first.source
    slot = "" if first.target_expert is None else f"[{len(entries)} of {first.target_expert[1]} experts]"
    target = first.target + slot if first.place is None else f"{first.target}{slot} {first.place.describe()}"
    same = all(e.region == first.region for e in entries)
    rows, cols = first.region.shape
    region = first.region.describe() if same else f"{len(entries)} regions of {rows} x {cols}"
    share = sum(e.share for e in entries) / len(entries)
    return source, target, region, f"{100 * share:.1f}%"


def by_expert(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    """The entries of each expert of a target, which are made into a matrix each; all of them where it has no experts."""
    found: dict[int, list[Entry]] = {}
    for entry in entries:
        found.setdefault(0 if entry.target_expert is None else entry.target_expert[0], []).append(entry)
    return found


def source_names(entries: Sequence[Entry]) -> str:
    """The teacher's matrices behind a target, as errors name them."""
    return ", ".join(dict.fromkeys(e.source for e in entries))


@dataclass(repr=False)
class TransferPlan(Tabular):
    """A list of entries with the models and options they were made for; prints as a table."""

    entries: list[Entry]
    layer_map: list[int]
    teacher: dict[str, Any]
    student: dict[str, Any]
    options: dict[str, Any]
    layer_scores: list[float] = field(default_factory=list)
    layer_shares: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seeds: dict[str, Any] = field(default_factory=dict)  # what the scores were made on, where they say so

    def check(self) -> None:
        """Raises `TypeError`, `KeyError` or `ValueError` for entries that no plan of pkt's has: a file may hold anything."""
        for model in (self.teacher, self.student):
            _ = model["name"].strip()
        _ = self.options["select"], self.options["modules"], sum(self.layer_map), [*self.notes]
        for entry in self.entries:
            if entry.kind not in get_args(Kind):
                raise ValueError(f"{entry.kind!r} is no kind of matrix")
            _ = entry.share + entry.score

    def to_json(self, path: str | Path | None = None) -> str:
        """The plan as JSON text; also written to `path`, atomically, when one is given."""
        value = self.as_dict()
        if path is not None:
            with atomic_file(path) as scratch:
                write_json(scratch, value)
        return json.dumps(value, indent=2)

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "teacher": self.teacher,
            "student": self.student,
            "options": self.options,
            "layer_map": self.layer_map,
            "layer_scores": self.layer_scores,
            "layer_shares": self.layer_shares,
            "notes": self.notes,
            **({"seeds": self.seeds} if self.seeds else {}),
            "entries": [e.to_json() for e in self.entries],
        }

    def by_target(self) -> dict[str, list[Entry]]:
        """The entries of each student matrix."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.target, []).append(entry)
        return found

    def rows(self) -> list[list[Entry]]:
        """The entries of each line of the table: one, or those of a target's experts that differ in nothing else."""
        found: dict[tuple[Any, ...], list[Entry]] = {}
        for i, e in enumerate(self.entries):
            key = (i,) if e.target_expert is None else (e.source, e.target, e.place)
            found.setdefault(key, []).append(e)
        return list(found.values())

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> TransferPlan:
        """Read a plan from a file, from JSON text or from the value in it."""
        where = "the plan"
        if isinstance(source, dict):
            value = source
        elif isinstance(source, str) and source.lstrip().startswith("{"):
            try:
                value = json.loads(source)
            except json.JSONDecodeError as error:
                raise PktError(f"the plan is not valid JSON (line {error.lineno}: {error.msg})") from error
        else:
            value, where = read_json(source), str(source)
        if not isinstance(value, dict) or value.get("format") not in READABLE:
            raise PktError(f"{where} is not a plan of this version of pkt ({FORMAT}); make one with `pkt plan`")
        try:
            made = cls(
                [Entry.from_json(e) for e in value["entries"]],
                *(
                    value[k]
                    for k in ("layer_map", "teacher", "student", "options", "layer_scores", "layer_shares", "notes")
                ),
            )
            made.seeds = dict(value.get("seeds", {}))
            made.check()
            return made
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise PktError(
                f"{where} is incomplete ({type(error).__name__}: {error}); make it again with `pkt plan`"
            ) from error

    def table(self) -> list[tuple[str, ...]]:
        return [("source", "target", "region", "share of S"), *(describe(row) for row in self.rows())]

    def __repr__(self) -> str:
        names = (str(model.get("name")) for model in (self.teacher, self.student))
        return f"TransferPlan({len(self.entries)} regions for {len(self.by_target())} matrices, {' -> '.join(names)})"

    def summary(self) -> list[str]:
        """What the plan does, in a few lines."""
        lines = []
        if self.layer_map:
            total = self.student.get("num_layers", len(self.layer_map))
            which = (
                f"{total} layers" if total == len(self.layer_map) else f"first {len(self.layer_map)} of {total} layers"
            )
            listed = ", ".join(str(i) for i in self.layer_map)
            lines.append(f"teacher layers {listed} feed the student's {which}")
        if self.layer_shares:
            caught = ", ".join(f"{100 * s:.0f}%" for s in self.layer_shares)
            lines.append(f"share of each layer's sensitivity caught: {caught}")
        return lines + self.notes


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers in a few words: 0-3, 7, 9-12, ..."""
    spans = [f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in runs(numbers)]
    return ", ".join(spans if len(spans) <= _FEW else [*spans[:_FEW], "..."])
