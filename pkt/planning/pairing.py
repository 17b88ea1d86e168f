"""The plan of a transfer: which part of which teacher matrix starts which student matrix. A plain value, checked first."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pkt import ops
from pkt.errors import PktError
from pkt.files import atomic_file, read_json, write_json
from pkt.models import (
    EXPERT_PARAMETERS,
    FUSED,
    HEAD_COLUMNS,
    HEAD_ROWS,
    ROLES,
    Kind,
    ModelSpec,
    Runs,
    Target,
    check_identity,
    load_tokenizer,
    read_roles,
    shared_vocabulary,
    spec_of,
    with_roles,
)
from pkt.planning.regions import (
    LAYER_CHOICES,
    STRATEGIES,
    Region,
    Strategy,
    runs,
    select_experts,
    select_layers,
    select_region,
    through,
)
from pkt.scoring import Sensitivity

# Spans of experts that a line names.
_FEW = 6
GROUPS = ("all", "attention", "ffn", "embedding")
FORMAT = "pkt-plan-2"
READABLE = ("pkt-plan-1", FORMAT)  # 1 had one entry for each target
_ROLES = {role for role, _ in ROLES.values()} | {r for f in FUSED.values() for r in f.roles} | {"embed", "head"}


ModuleMap: TypeAlias = Mapping[str, str] | Sequence[str]
Vocabulary: TypeAlias = tuple[Runs, Runs]  # rows of the teacher's tables, and the student's rows they feed


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
    experts = _spans([e.expert for e in entries if e.expert is not None])
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


def assemble(entries: Sequence[Entry], matrix_of: Callable[[Entry], Tensor]) -> Tensor:
    """A matrix [out, in] of a target from all its entries; a view of the teacher's for a single window that is all of it."""
    first = entries[0]
    if len(entries) == 1 and first.place is None:
        return first.region.cut(matrix_of(first))
    whole: Tensor | None = None
    for entry in entries:
        piece = entry.region.cut(matrix_of(entry))
        if whole is None:
            whole = torch.zeros(entry.target_shape, dtype=piece.dtype, device=piece.device)
        if entry.place is None:
            whole.copy_(piece)
        else:
            entry.place.put(whole, piece)
    assert whole is not None
    return whole


def lora_matrix(entries: Sequence[Entry], matrix_of: Callable[[Entry], Tensor]) -> Tensor:
    """What B A of a target's pair stands for: its matrix; LoRA writes an embedding [vocabulary, d] as (B A)ᵀ."""
    matrix = assemble(entries, matrix_of)
    return matrix.t() if entries[0].kind == "embedding" else matrix


def source_names(entries: Sequence[Entry]) -> str:
    """The teacher's matrices behind a target, as errors name them."""
    return ", ".join(dict.fromkeys(e.source for e in entries))


@dataclass
class TransferPlan:
    """A list of entries with the models and options they were made for; prints as a table."""

    entries: list[Entry]
    layer_map: list[int]
    teacher: dict[str, Any]
    student: dict[str, Any]
    options: dict[str, Any]
    layer_scores: list[float] = field(default_factory=list)
    layer_shares: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
            return cls(
                [Entry.from_json(e) for e in value["entries"]],
                *(
                    value[k]
                    for k in ("layer_map", "teacher", "student", "options", "layer_scores", "layer_shares", "notes")
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PktError(
                f"{where} is incomplete ({type(error).__name__}: {error}); make it again with `pkt plan`"
            ) from error

    def __str__(self) -> str:
        lines = [describe(row) for row in self.rows()]
        head = ("source", "target", "region", "share of S")
        widths = [max(len(row[i]) for row in [head, *lines]) for i in range(4)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [head, *lines]
        ]
        return "\n".join([*table, *self.summary()])

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


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers in a few words: 0-3, 7, 9-12, ..."""
    spans = [f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in runs(numbers)]
    return ", ".join(spans if len(spans) <= _FEW else [*spans[:_FEW], "..."])


def plan(
    sens: Sensitivity,
    teacher: Any,
    student: Any,
    *,
    layers: str | Sequence[int] = "sensitivity",
    select: Strategy = "window",
    modules: str = "all",
    align_heads: bool = False,
    layer_map: Sequence[int] | None = None,
    module_map: ModuleMap | None = None,
    partial: bool = False,
    map_vocabulary: bool | tuple[Any, Any] = False,
    roles: Any = None,
    seed: int = 0,
) -> TransferPlan:
    """Choose layers and regions (METHOD, sections 2 and 3) and check them against both models.

    teacher, student: a configuration, a model or a checkpoint directory. layers: sensitivity, first, last, random, or a list
    of teacher layers, one per student layer (`layer_map` is the same under the name people look for). select: window,
    rows_cols, weights, blocks or random. modules: groups and roles, separated by commas, "-" in front of what is left out
    (all, attention, ffn, embedding, q, k, v, o, gate, up, down: "all,-k,-v"), or a regular expression on the student's module
    names. align_heads: windows of q, k, v (rows) and o (columns) start at a head.

    Matrices feed each other by role: fused projections are cut into their roles and put together again; the most sensitive
    expert of a layer feeds a dense FFN, the most sensitive ones the student's experts, in their order. module_map: instead,
    exactly these pairs, {"teacher.*.fc1": "student.*.up"}, `*` standing for a number (for the layer's, the chosen teacher
    layer). roles: more lines for `pkt.models.ROLES`, or a JSON file with them. map_vocabulary: feed embeddings and head by
    shared token strings; True reads both directories' tokenizers, or pass (teacher's, student's). partial: where the teacher
    is smaller, feed what fits and leave zeros.

    Raises one `PktError` listing every module whose shape cannot be cut.
    """
    teacher_spec, student_spec = with_roles(spec_of(teacher), roles), with_roles(spec_of(student), roles)
    vocabulary = read_vocabulary(map_vocabulary, teacher, student)
    options = check_options(
        layers, select, modules, align_heads, layer_map, seed, module_map, partial, vocabulary is not None, roles
    )
    check_identity(sens.provenance.get("teacher"), teacher_spec, "the scores")
    return Pairing(teacher_spec, student_spec, options, vocabulary).plan(sens)


def read_vocabulary(wanted: bool | tuple[Any, Any], teacher: Any, student: Any) -> Vocabulary | None:
    """The rows that the two tokenizers share, or None when they are not wanted."""
    if wanted is False:
        return None
    if wanted is True:
        if not all(isinstance(m, (str, Path)) for m in (teacher, student)):
            raise PktError("map_vocabulary=True reads the tokenizers of two directories; pass (teacher's, student's)")
        wanted = load_tokenizer(teacher), load_tokenizer(student)
    shared = shared_vocabulary(*wanted)
    if not shared:
        raise PktError("the two tokenizers share no token, so nothing can be mapped; leave map_vocabulary out")
    return runs([t for t, _ in shared]), runs([s for _, s in shared])


def check_options(
    layers: str | Sequence[int],
    select: str,
    modules: str,
    align_heads: bool,
    layer_map: Sequence[int] | None,
    seed: int,
    module_map: ModuleMap | None = None,
    partial: bool = False,
    map_vocabulary: bool = False,
    roles: Any = None,
) -> dict[str, Any]:
    """Refuse an unknown option before anything slow starts; the options as they are recorded."""
    if select not in STRATEGIES:
        raise PktError(f"select={select!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    if isinstance(layers, str) and layers not in LAYER_CHOICES:
        raise PktError(f"layers={layers!r} is unknown; choose one of {', '.join(LAYER_CHOICES)}, or list the layers")
    if align_heads and select not in ("window", "random"):
        raise PktError(f"align_heads concerns windows; select={select!r} does not cut windows")
    if map_vocabulary and select == "weights":
        raise PktError(
            "select='weights' lays single weights out in the teacher's order, which a mapped vocabulary changes"
        )
    if not isinstance(modules, str):
        raise PktError(f"modules={modules!r} must be a string, such as 'attention,-v' or a regular expression")
    if _role_list(modules) is None:
        try:
            re.compile(modules)
        except re.error as error:
            raise PktError(
                f"modules={modules!r} is neither a list of {', '.join(GROUPS)} and roles ({', '.join(sorted(_ROLES))}) "
                f"nor a regular expression: {error}"
            ) from error
    given = layers if layer_map is None else layer_map
    whole = (int, np.integer)
    if not isinstance(given, str) and (not isinstance(given, Sequence) or not all(isinstance(i, whole) for i in given)):
        raise PktError(f"layers={given!r}: give one of {', '.join(LAYER_CHOICES)}, or a list of the teacher's layers")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise PktError(f"seed={seed!r} must be a whole number from 0 to 2**63 - 1")
    options: dict[str, Any] = {
        "layers": given if isinstance(given, str) else [int(i) for i in given],
        "select": select,
        "modules": modules,
        "align_heads": align_heads,
        "seed": seed,
    }
    # Recorded only when used, so that results made without them stay what they were.
    if module_map is not None:
        options["module_map"] = _read_map(module_map)
    if partial:
        options["partial"] = True
    if map_vocabulary:
        options["map_vocabulary"] = True
    if roles is not None:
        options["roles"] = {name: list(line) for name, line in sorted(read_roles(roles).items())}
    return options


def _read_map(given: ModuleMap) -> dict[str, str]:
    """Teacher's pattern by student's pattern."""
    if isinstance(given, str):
        given = [given]
    pairs = []
    for text in given.items() if isinstance(given, Mapping) else given:
        source, equals, target = text.partition("=") if isinstance(text, str) else (text[0], "=", text[1])
        if not source or not equals or not target or source.count("*") != target.count("*"):
            raise PktError(
                f"module_map: {text!r}; write TEACHER=STUDENT with as many * on each side: 'a.*.fc1=b.*.mlp.up'"
            )
        pairs.append((target.strip(), source.strip()))
    if not pairs:
        raise PktError("module_map names no pair; write TEACHER=STUDENT: 'a.*.fc1=b.*.mlp.up'")
    return dict(pairs)


def _role_list(modules: str) -> tuple[set[str], set[str]] | None:
    """(chosen, left out) groups and roles, or None for a regular expression."""
    chosen: set[str] = set()
    out: set[str] = set()
    for word in modules.split(","):
        name = word.strip().removeprefix("-")
        if name not in GROUPS and name not in _ROLES:
            return None
        named = set(FUSED[name].roles) if name in FUSED else {name}
        (out if word.strip().startswith("-") else chosen).update(named)
    return chosen or {"all"}, out


def _chosen_parts(target: Target, modules: str) -> tuple[tuple[str, Runs], ...]:
    """The roles of a matrix that `modules` chooses, with their rows."""
    listed = _role_list(modules)
    if target.group == "router":
        # Its rows are the teacher's experts, most of which may not be there.
        return ()
    if listed is None:
        return target.roles() if re.search(modules, target.module) else ()
    chosen, out = listed
    whole = target.group != "other" or target.layer is not None

    def wanted(role: str) -> bool:
        names = {role, target.group} | ({"all"} if whole else set())
        return bool(names & chosen) and not names & out

    return tuple((role, rows) for role, rows in target.roles() if wanted(role))


@dataclass(frozen=True)
class Feed:
    """A part of a student's matrix, and the rows of a teacher's that its region is chosen from."""

    source: Target
    target: Target
    role: str
    rows: Runs  # of the source
    shape: tuple[int, int]  # of the region
    place: Region | None  # in the target; None: all of it


class _UnfedError(Exception):
    """Why a matrix of the student cannot be fed."""


class Pairing:
    """Which matrices of a teacher feed which of a student, and where in them: all that is known before any score.

    targets: the student's matrices that are fed; notes: what is left out. Raises one `PktError` listing every module that has
    no source, or whose source is smaller than it in some direction.
    """

    def __init__(
        self, teacher: ModelSpec, student: ModelSpec, options: Mapping[str, Any], vocabulary: Vocabulary | None = None
    ) -> None:
        self.teacher, self.student, self.options, self.vocabulary = teacher, student, options, vocabulary
        self.partial = bool(options.get("partial"))
        self.notes: list[str] = []
        self.by_module = teacher.by_module()
        self.inside: dict[int, list[Target]] = {}
        self.outside: dict[str, Target] = {}
        for source in teacher.targets:
            if source.layer is None:
                self.outside[source.role if source.group == "embedding" else source.suffix] = source
            else:
                self.inside.setdefault(source.layer, []).append(source)
        if teacher.tied and "embed" in self.outside:
            self.outside.setdefault("head", self.outside["embed"])
        self.parts = {t.module: p for t in student.targets if (p := self._parts_of(t))}
        wanted = [t for t in student.targets if t.module in self.parts]
        if not wanted:
            raise PktError(
                f"modules={options['modules']!r} chooses none of the student's matrices; their names are like "
                f"{student.targets[0].module if student.targets else '(it has none)'}"
            )
        if any(t.layer is not None for t in wanted):
            self.count = min(student.num_layers, teacher.num_layers) if self.partial else student.num_layers
        else:
            self.count = 0
        if teacher.num_layers < self.count:
            raise PktError(
                f"the teacher has {teacher.num_layers} layers, fewer than the student's {student.num_layers}; "
                "choose a deeper teacher, or feed the first layers only with partial=True (--partial)"
            )
        self.ranked = options["layers"] == "sensitivity" and self.count > 0
        self.fixed: list[int] | None = None
        if not self.ranked:
            self.fixed = self.choose_layers(None)
        self.wanted = self._leave_out(wanted)
        self.targets = [t for t in self.wanted if t.layer is None or t.layer < self.count]
        self._check()

    # -- which matrices

    def _parts_of(self, target: Target) -> tuple[tuple[str, Runs], ...]:
        patterns = self.options.get("module_map")
        if patterns is None:
            return _chosen_parts(target, self.options["modules"])
        named = any(_numbers(pattern, target.module) is not None for pattern in patterns)
        return ((target.role, ((0, target.shape[0]),)),) if named else ()

    def _leave_out(self, wanted: list[Target]) -> list[Target]:
        """Without what a difference between the models excludes, noted in one line each."""
        teacher, student = self.teacher, self.student
        tables = [t for t in wanted if t.group == "embedding"]
        if self.vocabulary is not None and tables:
            count = sum(b - a for a, b in self.vocabulary[1])
            self.notes.append(
                f"embeddings and head are mapped by {count} shared tokens ({teacher.vocab_size} and {student.vocab_size} tokens)"
            )
        elif teacher.vocab_size != student.vocab_size and tables:
            self.notes.append(
                f"embeddings and head are left out: the vocabularies differ ({teacher.vocab_size} and {student.vocab_size} tokens)"
            )
            wanted = [t for t in wanted if t not in tables]
        if any(t.experts for t in wanted) and not any(t.experts for t in teacher.targets):
            self.notes.append("the student's experts are left out: the teacher has none")
            wanted = [t for t in wanted if not t.experts]
        dense = [t for t in wanted if t.group == "ffn" and not t.experts]
        if dense and any(t.experts for t in student.targets):
            # PEFT reads gate_proj, up_proj and down_proj of a model with experts as names of old for these.
            self.notes.append(
                f"the student's FFNs beside its experts are left out ({dense[0].suffix}, ...): PEFT takes their names for the "
                "experts'"
            )
            wanted = [t for t in wanted if t not in dense]
        if not wanted:
            raise PktError(f"modules={self.options['modules']!r} leaves nothing to transfer: {'; '.join(self.notes)}")
        return wanted

    def choose_layers(self, scores: Tensor | None) -> list[int]:
        """The teacher layer for each student layer that is fed."""
        if self.count == 0:
            return []
        given = self.options["layers"]
        return select_layers(given, self.teacher.num_layers, self.count, scores, seed=self.options["seed"])

    def layers_for(self, place: int) -> Sequence[int]:
        """The teacher layers that may feed this layer of the student."""
        if self.fixed is not None:
            return [self.fixed[place]]
        return range(place, self.teacher.num_layers - self.count + place + 1)

    def _check(self) -> None:
        faults: list[str] = []
        known: dict[tuple[Any, ...], str | None] = {}
        for target in self.targets:
            for layer in [None] if target.layer is None else self.layers_for(target.layer):
                key = target.suffix, target.stored_shape, self.parts[target.module], layer
                if key not in known:
                    try:
                        self.feeds(target, layer)
                        known[key] = None
                    except _UnfedError as error:
                        known[key] = str(error)
                fault = known[key]
                if fault is not None:
                    faults.append(f"{target.module} {fault}")
                    break
        if faults:
            listed = "\n  ".join(faults)
            raise PktError(
                f"{self.teacher.name} cannot feed {self.student.name} ({len(faults)} of {len(self.targets)} matrices):\n"
                f"  {listed}\n"
                "choose a teacher that is at least as large in every direction, leave these out with modules= (--modules "
                "all,-k,-v), or feed what fits with partial=True (--partial)"
            )

    # -- where a matrix comes from

    def feeds(self, target: Target, layer: int | None) -> list[Feed]:
        """What feeds a student's matrix when teacher layer `layer` does (None outside the layers)."""
        if "module_map" in self.options:
            return [self._feed(self._mapped(target, layer), target, *self.parts[target.module][0])]
        same = self._same_place(target, layer)
        if same is not None and same.shape == target.shape and same.parts == target.parts == self.parts[target.module]:
            return [self._feed(same, target, target.role, ((0, target.shape[0]),))]
        found = []
        for role, rows in self.parts[target.module]:
            try:
                source, source_rows = self._source(target, role, layer, same)
                found.append(self._feed(source, target, role, rows, source_rows))
            except _UnfedError:
                if not self.partial:
                    raise
        return found

    def _same_place(self, target: Target, layer: int | None) -> Target | None:
        if layer is None:
            return self.outside.get(target.role if target.group == "embedding" else target.suffix)
        found = self.by_module.get(f"{self.teacher.layers}.{layer}.{target.suffix}" if self.teacher.layers else "")
        return None if found is None or bool(found.experts) != bool(target.experts) else found

    def _source(self, target: Target, role: str, layer: int | None, same: Target | None) -> tuple[Target, Runs]:
        if same is not None and not same.parts and not target.parts:
            return same, ((0, same.shape[0]),)
        matches = [
            (source, rows)
            for source in (self.inside.get(layer, []) if layer is not None else [])
            for name, rows in source.roles()
            if role and name == role
        ]
        # An FFN that is there comes before one of several experts; experts are fed by experts.
        alike = [m for m in matches if bool(m[0].experts) == bool(target.experts)]
        best = alike if alike or target.experts else matches
        if len(best) == 1:
            return best[0]
        if target.experts and not any(s.experts for s in self.inside.get(-1 if layer is None else layer, ())):
            raise _UnfedError(
                f"{list(target.stored_shape)}: teacher layer {layer} has no experts; name the layers that do with layers= "
                "(--layers 1,2,3)"
            )
        name = f"its {role}" if target.parts else f"the role {role!r}" if role else "pkt does not know its role"
        if best:
            raise _UnfedError(
                f"{list(target.shape)}: {name} could come from {', '.join(s.module for s, _ in best)}; name one with "
                "module_map= (--map TEACHER=STUDENT)"
            )
        raise _UnfedError(
            f"{list(target.shape)}: the teacher has no matrix in that place ({name}); name one with module_map= "
            "(--map 'teacher.*.x=student.*.y'), or teach pkt both names with roles= (--roles FILE.json)"
        )

    def _mapped(self, target: Target, layer: int | None) -> Target:
        for pattern, source in self.options["module_map"].items():
            numbers = _numbers(pattern, target.module)
            if numbers is None:
                continue
            prefix = f"{self.student.layers}.*."
            if layer is not None:
                if not pattern.startswith(prefix) or not source.startswith(f"{self.teacher.layers}.*."):
                    raise _UnfedError(
                        f"is in a layer: write the map as {self.teacher.layers}.*.…={prefix}… (layers= chooses the layer)"
                    )
                numbers = [str(layer), *numbers[1:]]
            name = "".join(a + b for a, b in zip(source.split("*"), [*numbers, ""], strict=True))
            found = self.by_module.get(name)
            if found is None or (found.layer is None) != (layer is None):
                raise _UnfedError(f"is mapped from {name}, which is no matrix of the teacher's in that place")
            return found
        raise AssertionError(target.module)

    def _feed(self, source: Target, target: Target, role: str, rows: Runs, source_rows: Runs | None = None) -> Feed:
        """rows: of the target; source_rows: of the source, default all."""
        source_rows = source_rows or ((0, source.shape[0]),)
        if target.group == "embedding" and self.vocabulary is not None:
            source_rows, rows = self.vocabulary
            for table, used in ((source, source_rows), (target, rows)):
                last = max(b for _, b in used)
                if last > table.shape[0]:
                    raise _UnfedError(f"{list(table.shape)}: its tokenizer has the id {last - 1}; use the model's own")
        if target.experts:
            self._check_experts(source, target)
        have = sum(b - a for a, b in source_rows), source.shape[1]
        need = sum(b - a for a, b in rows), target.shape[1]
        small = [f"{a} < {b}" for a, b in zip(have, need, strict=True) if a < b]
        part = f" for its {role}" if target.parts else ""
        if small and not self.partial:
            raise _UnfedError(
                f"{list(target.shape)}: {source.module} is only {list(source.shape)} ({', '.join(small)}{part})"
            )
        shape = min(have[0], need[0]), min(have[1], need[1])
        step = steps_of(role, have, shape, self.teacher)
        if self.options["align_heads"] and any(size % s for size, s in zip(shape, step, strict=True)):
            raise _UnfedError(f"{list(target.shape)}: not a whole number of the teacher's heads of {max(step)}{part}")
        whole = shape == target.shape and rows == ((0, target.shape[0]),)
        place = Region(shape, through(rows, ((0, shape[0]),)), ((0, shape[1]),), source_shape=target.shape)
        return Feed(source, target, role, source_rows, shape, None if whole else place)

    def _check_experts(self, source: Target, target: Target) -> None:
        if target.module.rpartition(".")[2] not in EXPERT_PARAMETERS:
            raise _UnfedError(
                f"is a parameter of experts that PEFT's files cannot name; known: {', '.join(EXPERT_PARAMETERS)}"
            )
        if not source.experts:
            raise _UnfedError(f"{list(target.stored_shape)}: {source.module} has no experts")
        if source.experts < target.experts and not self.partial:
            raise _UnfedError(
                f"{list(target.stored_shape)}: {source.module} has fewer experts ({source.experts} < {target.experts})"
            )

    # -- once there are scores

    def plan(self, sens: Sensitivity) -> TransferPlan:
        """The plan that these scores give."""
        scores = sens.layer_scores() if self.ranked else None
        if scores is not None and len(scores) != self.teacher.num_layers:
            raise PktError(
                f"the scores are of {len(scores)} layers, {self.teacher.name} has {self.teacher.num_layers}; "
                "they were made from another model"
            )
        chosen = self.choose_layers(scores)

        def score_of(source: Target) -> Tensor:
            return _score_of(sens, source, self.teacher)

        entries = []
        choosers = {layer: self.expert_chooser(layer, score_of) for layer in [None, *chosen]}
        for target in self.targets:
            layer = None if target.layer is None else chosen[target.layer]
            for feed in self.feeds(target, layer):
                entries += self.entries(feed, score_of, choosers[layer], sens.tile)
        return self.finish(entries, chosen, [] if sens.layers is None else sens.layer_scores().tolist())

    def expert_chooser(self, layer: int | None, score_of: Callable[[Target], Tensor]) -> Callable[[int], list[int]]:
        """The most sensitive experts of a teacher layer, by Σ S over all an expert's matrices; summed when first asked for."""
        found: list[Tensor] = []

        def best(count: int) -> list[int]:
            if not found:
                sources = [t for t in self.inside[layer if layer is not None else -1] if t.experts]
                sums = [ops.double_sum(score_of(t).flatten(1), 1).cpu() for t in sources]
                found.append(torch.stack(sums).sum(0))
            return select_experts(found[0], count)

        return best

    def entries(
        self,
        feed: Feed,
        score_of: Callable[[Target], Tensor],
        experts_of: Callable[[int], list[int]],
        tile: int | None = None,
        whole: float | None = None,
    ) -> list[Entry]:
        """The region of a feed, of each expert where the student has experts. whole: Σ S of its source, when that is known."""
        source, target = feed.source, feed.target
        if not source.experts:
            return [self._entry(feed, score_of, None, None, tile, whole)]
        if not target.experts:
            return [self._entry(feed, score_of, experts_of(1)[0], None, tile, None)]
        kept = experts_of(min(source.experts, target.experts))
        return [self._entry(feed, score_of, e, (i, target.experts), tile, None) for i, e in enumerate(kept)]

    def _entry(
        self,
        feed: Feed,
        score_of: Callable[[Target], Tensor],
        expert: int | None,
        slot: tuple[int, int] | None,
        tile: int | None,
        whole: float | None,
    ) -> Entry:
        source, target, options = feed.source, feed.target, self.options
        name = f"{target.module} {feed.role}" if target.parts else target.module
        score = source.oriented(score_of(source), expert)
        part, shape = _rows_of(score, feed, tile)
        region = select_region(
            part,
            shape,
            feed.shape,
            options["select"],
            tile=tile,
            steps=steps_of(feed.role, shape, feed.shape, self.teacher) if options["align_heads"] else (1, 1),
            seed=options["seed"],
            name=name if slot is None else f"{name} of expert {slot[0]}",
        )
        inside = caught_by(part, region, tile)
        if whole is None:
            whole = ops.double_sum(score).item()
        return Entry(
            source.module,
            target.module,
            region.inside(feed.rows, source.shape),
            inside,
            inside / whole if whole else 0.0,
            target.kind,
            expert,
            feed.place,
            slot,
        )

    def finish(self, entries: list[Entry], chosen: list[int], layer_scores: list[float]) -> TransferPlan:
        """The plan of these entries, with what is to be said about them."""
        return TransferPlan(
            entries=entries,
            layer_map=chosen,
            teacher=self.teacher.identity(),
            student=self.student.identity(),
            options=dict(self.options),
            layer_scores=layer_scores,
            layer_shares=layer_shares_of(entries, self.student, chosen, layer_scores),
            notes=[*self.notes, *self._expert_note(entries), *self._partial_note(entries)],
        )

    def _expert_note(self, entries: Iterable[Entry]) -> list[str]:
        one: dict[int, int] = {}
        kept: dict[int, set[int]] = {}
        counts: dict[int, int] = {}
        for e in entries:
            source = self.by_module[e.source]
            if e.expert is None or source.layer is None:
                continue
            counts[source.layer] = source.experts
            if e.target_expert is None:
                one[source.layer] = e.expert
            else:
                kept.setdefault(source.layer, set()).add(e.expert)
        notes = []
        if one:
            listed = ", ".join(f"{layer}: {expert}" for layer, expert in sorted(one.items()))
            notes.append(f"the most sensitive expert of each teacher layer feeds the FFN (layer: expert {listed})")
        if kept and all(len(experts) == counts[layer] for layer, experts in kept.items()):
            notes.append("every expert of the teacher feeds the student's of the same number")
        elif kept:
            listed = "; ".join(f"{layer}: {_spans(sorted(kept[layer]))}" for layer in sorted(kept))
            notes.append(
                f"the most sensitive experts feed the student's, in their order (teacher layer: experts {listed})"
            )
        return notes

    def _partial_note(self, entries: Iterable[Entry]) -> list[str]:
        if not self.partial:
            return []
        entries = list(entries)
        fed = sum(math.prod(e.region.shape) for e in entries)
        total = sum(math.prod(t.stored_shape) for t in self.wanted)
        names = {e.target for e in entries}
        none = [t.module for t in self.wanted if t.module not in names]
        rest = f"; nothing feeds {len(none)} of its {len(self.wanted)} matrices ({none[0]}, ...)" if none else ""
        return [
            f"partial: {100 * fed / total:.0f}% of the student's chosen weights are fed, the others start at zero{rest}"
        ]


def _numbers(pattern: str, name: str) -> list[str] | None:
    """What the stars of a pattern stand for in a name, or None."""
    match = re.fullmatch(r"(\d+)".join(map(re.escape, pattern.split("*"))), name)
    return None if match is None else list(match.groups())


def _rows_of(score: Tensor, feed: Feed, tile: int | None) -> tuple[Tensor, tuple[int, int]]:
    """The scores of a feed's rows and what shape of weights they stand for."""
    count = sum(b - a for a, b in feed.rows)
    shape = count, feed.source.shape[1]
    if feed.rows == ((0, feed.source.shape[0]),):
        return score, shape
    rows = feed.rows
    if tile is not None:
        if any(a % tile or b % tile for a, b in rows):
            raise PktError(
                f"{feed.source.module}: the rows for {feed.target.module} ({feed.role}) do not lie on {tile} x {tile} tiles; "
                "keep the scores themselves (no tile)"
            )
        rows = tuple((a // tile, b // tile) for a, b in rows)
        count //= tile
    return Region((count, score.shape[1]), rows, ((0, score.shape[1]),)).cut(score), shape


def steps_of(role: str, have: tuple[int, int], need: tuple[int, int], teacher: ModelSpec) -> tuple[int, int]:
    """Offsets that never cut a head: rows of q, k and v and columns of o; an axis of equal length is not cut at all."""
    head = teacher.head_dim or 1
    rows = head if role in HEAD_ROWS and have[0] != need[0] else 1
    cols = head if role in HEAD_COLUMNS and have[1] != need[1] else 1
    return rows, cols


def _score_of(sens: Sensitivity, source: Target, teacher: ModelSpec) -> Tensor:
    name = source.parameter
    if name not in sens:
        raise PktError(f"the scores have no {name}; score the teacher with all its parameters (params=None)")
    if tuple(sens.shapes[name]) != source.stored_shape:
        raise PktError(
            f"{name} is {list(source.stored_shape)} in {teacher.name} but {list(sens.shapes[name])} in the scores of "
            "another model"
        )
    return sens[name]


def caught_by(score: Tensor, region: Region, tile: int | None) -> float:
    """Σ of S in the region; of whole tiles when the scores are tile sums."""
    if tile is None:
        return ops.double_sum(region.cut(score)).item()
    rows, cols = (tuple((a // tile, -(-b // tile)) for a, b in axis) for axis in (region.rows, region.cols))
    return ops.double_sum(Region(region.shape, rows, cols).cut(score)).item()


def layer_shares_of(entries: list[Entry], student: ModelSpec, chosen: list[int], scores: list[float]) -> list[float]:
    """Of each chosen teacher layer's whole sensitivity, the share inside the regions."""
    if not scores:
        return []
    place = student.by_module()
    caught = [0.0] * len(chosen)
    for entry in entries:
        layer = place[entry.target].layer
        if layer is not None:
            caught[layer] += entry.score
    return [c / scores[i] if scores[i] else 0.0 for c, i in zip(caught, chosen, strict=True)]
