"""The plan of a transfer: which part of which teacher matrix starts which student matrix. A plain value, checked first."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pkt import ops
from pkt.errors import PktError
from pkt.models import HEAD_COLUMNS, HEAD_ROWS, Kind, ModelSpec, Target, spec_of
from pkt.scoring import Sensitivity
from pkt.selection import LAYER_CHOICES, STRATEGIES, Region, Strategy, select_layers, select_region
from pkt.storage import atomic_file, read_json, write_json

GROUPS = ("all", "attention", "ffn", "embedding")
FORMAT = "pkt-plan-1"


@dataclass(frozen=True)
class Entry:
    """One student matrix (a module's name) and the part of a teacher's that feeds it.

    score: Σ of S in the region; share: of its source matrix's whole S.
    """

    source: str
    target: str
    region: Region
    score: float
    share: float
    kind: Kind  # of the target


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
        entries = [
            {
                "source": e.source,
                "target": e.target,
                "kind": e.kind,
                "score": e.score,
                "share": e.share,
                "region": e.region.to_json(),
            }
            for e in self.entries
        ]
        return {
            "format": FORMAT,
            "teacher": self.teacher,
            "student": self.student,
            "options": self.options,
            "layer_map": self.layer_map,
            "layer_scores": self.layer_scores,
            "layer_shares": self.layer_shares,
            "notes": self.notes,
            "entries": entries,
        }

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
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise PktError(f"{where} is not a plan of this version of pkt ({FORMAT}); make one with `pkt plan`")
        try:
            entries = [
                Entry(e["source"], e["target"], Region.from_json(e["region"]), e["score"], e["share"], e["kind"])
                for e in value["entries"]
            ]
            return cls(
                entries,
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
        lines = [(e.source, e.target, e.region.describe(), f"{100 * e.share:.1f}%") for e in self.entries]
        head = ("source", "target", "region", "share of S")
        widths = [max(len(row[i]) for row in [head, *lines]) for i in range(4)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [head, *lines]
        ]
        return "\n".join([*table, *self.summary()])

    def summary(self) -> list[str]:
        """What the plan does, in a few lines."""
        lines = [f"teacher layers {_spans(self.layer_map)} feed the student's {len(self.layer_map)} layers"]
        if self.layer_shares:
            caught = ", ".join(f"{100 * s:.0f}%" for s in self.layer_shares)
            lines.append(f"share of each layer's sensitivity caught: {caught}")
        return lines + self.notes


def _spans(layers: Sequence[int]) -> str:
    return ", ".join(str(i) for i in layers)


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
    seed: int = 0,
) -> TransferPlan:
    """Choose layers and regions (METHOD, sections 2 and 3) and check them against both models.

    teacher, student: a configuration, a model or a checkpoint directory. layers: sensitivity, first, last, random, or a list
    of teacher layers, one per student layer (`layer_map` is the same under the name people look for). select: window,
    rows_cols, weights, blocks or random. modules: all, attention, ffn, embedding, or a regular expression on the student's
    module names. align_heads: windows of q, k, v (rows) and o (columns) start at a head.

    Raises one `PktError` listing every module whose shape cannot be cut.
    """
    teacher_spec, student_spec = spec_of(teacher), spec_of(student)
    options = check_options(layers, select, modules, align_heads, layer_map, seed)
    pairs, notes = pair_targets(teacher_spec, student_spec, modules=modules, align_heads=align_heads)
    scores = None
    if layers == "sensitivity" and layer_map is None:
        scores = sens.layer_scores()
        if len(scores) != teacher_spec.num_layers:
            raise PktError(
                f"the scores are of {len(scores)} layers, {teacher_spec.name} has {teacher_spec.num_layers}; "
                "they were made from another model"
            )
    chosen = select_layers(
        layers if layer_map is None else layer_map, teacher_spec.num_layers, student_spec.num_layers, scores, seed=seed
    )
    entries = []
    by_module = teacher_spec.by_module()
    for template, target in pairs:
        source = (
            template if target.layer is None else by_module[_in_layer(teacher_spec, template, chosen[target.layer])]
        )
        score = _score_of(sens, source, teacher_spec)
        region = select_region(
            score,
            source.shape,
            target.shape,
            select,
            tile=sens.tile,
            steps=steps_of(source, target, teacher_spec) if align_heads else (1, 1),
            seed=seed,
            name=target.module,
        )
        caught, whole = caught_by(score, region, sens.tile), ops.double_sum(score).item()
        entries.append(
            Entry(source.module, target.module, region, caught, caught / whole if whole else 0.0, target.kind)
        )
    layer_scores = [] if sens.layers is None else sens.layer_scores().tolist()
    return TransferPlan(
        entries=entries,
        layer_map=chosen,
        teacher=teacher_spec.identity(),
        student=student_spec.identity(),
        options=options,
        layer_scores=layer_scores,
        layer_shares=layer_shares_of(entries, student_spec, chosen, layer_scores),
        notes=notes,
    )


def check_options(
    layers: str | Sequence[int],
    select: str,
    modules: str,
    align_heads: bool,
    layer_map: Sequence[int] | None,
    seed: int,
) -> dict[str, Any]:
    """Refuse an unknown option before anything slow starts; the options as they are recorded."""
    if select not in STRATEGIES:
        raise PktError(f"select={select!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    if isinstance(layers, str) and layers not in LAYER_CHOICES:
        raise PktError(f"layers={layers!r} is unknown; choose one of {', '.join(LAYER_CHOICES)}, or list the layers")
    if align_heads and select not in ("window", "random"):
        raise PktError(f"align_heads concerns windows; select={select!r} does not cut windows")
    if modules not in GROUPS:
        try:
            re.compile(modules)
        except re.error as error:
            raise PktError(
                f"modules={modules!r} is neither one of {', '.join(GROUPS)} nor a regular expression: {error}"
            ) from error
    given = layers if layer_map is None else layer_map
    return {
        "layers": given if isinstance(given, str) else [int(i) for i in given],
        "select": select,
        "modules": modules,
        "align_heads": align_heads,
        "seed": seed,
    }


def pair_targets(
    teacher: ModelSpec, student: ModelSpec, *, modules: str = "all", align_heads: bool = False
) -> tuple[list[tuple[Target, Target]], list[str]]:
    """(source, target) for every chosen student matrix, and notes on what is left out.

    The source of a decoder layer's matrix stands for that place in whichever teacher layer is chosen. Raises one `PktError`
    listing every module that has no source, or whose source is smaller than it in some direction.
    """
    notes: list[str] = []
    wanted = [t for t in student.targets if _chosen(t, modules)]
    if not wanted:
        raise PktError(
            f"modules={modules!r} chooses none of the student's matrices; their names are like {student.targets[0].module}"
        )
    if teacher.num_layers < student.num_layers:
        raise PktError(
            f"the teacher has {teacher.num_layers} layers, fewer than the student's {student.num_layers}; choose a deeper teacher"
        )
    same_vocabulary = teacher.vocab_size == student.vocab_size
    if not same_vocabulary and any(t.group == "embedding" for t in wanted):
        notes.append(
            f"embeddings and head are left out: the vocabularies differ ({teacher.vocab_size} and {student.vocab_size} tokens)"
        )
        wanted = [t for t in wanted if t.group != "embedding"]
    inside: dict[str, list[Target]] = {}
    outside: dict[str, Target] = {}
    for source in teacher.targets:
        if source.layer is None:
            outside[source.role if source.group == "embedding" else source.suffix] = source
        else:
            inside.setdefault(source.suffix, []).append(source)
    if teacher.tied and "embed" in outside:
        outside.setdefault("head", outside["embed"])
    pairs: list[tuple[Target, Target]] = []
    faults: list[str] = []
    for target in wanted:
        if target.layer is None:
            one = outside.get(target.role if target.group == "embedding" else target.suffix)
            sources = [] if one is None else [one]
        else:
            sources = inside.get(target.suffix, [])
        if not sources:
            faults.append(f"{target.module}: the teacher has no matrix in that place")
            continue
        for source in sources:
            small = [f"{a} < {b}" for a, b in zip(source.shape, target.shape, strict=True) if a < b]
            if small:
                faults.append(
                    f"{target.module} {list(target.shape)}: {source.module} is only {list(source.shape)} ({', '.join(small)})"
                )
                break
            step = steps_of(source, target, teacher)
            if align_heads and any(size % s for size, s in zip(target.shape, step, strict=True)):
                faults.append(
                    f"{target.module} {list(target.shape)}: not a whole number of the teacher's heads of {max(step)}"
                )
                break
        else:
            pairs.append((sources[0], target))
    if faults:
        listed = "\n  ".join(faults)
        raise PktError(
            f"{teacher.name} cannot feed {student.name} ({len(faults)} of {len(wanted)} matrices):\n  {listed}\n"
            "choose a teacher that is at least as large in every direction, or leave these out with modules="
        )
    if not pairs:
        raise PktError(f"modules={modules!r} leaves nothing to transfer: {'; '.join(notes)}")
    return pairs, notes


def _chosen(target: Target, modules: str) -> bool:
    if modules == "all":
        return target.group != "other" or target.layer is not None
    if modules in GROUPS:
        return target.group == modules
    return re.search(modules, target.module) is not None


def _in_layer(spec: ModelSpec, template: Target, layer: int) -> str:
    return f"{spec.layers}.{layer}.{template.suffix}"


def steps_of(source: Target, target: Target, teacher: ModelSpec) -> tuple[int, int]:
    """Offsets that never cut a head: rows of q, k and v and columns of o; an axis of equal length is not cut at all."""
    head = teacher.head_dim or 1
    rows = head if source.role in HEAD_ROWS and source.shape[0] != target.shape[0] else 1
    cols = head if source.role in HEAD_COLUMNS and source.shape[1] != target.shape[1] else 1
    return rows, cols


def _score_of(sens: Sensitivity, source: Target, teacher: ModelSpec) -> Tensor:
    name = source.parameter
    if name not in sens:
        raise PktError(f"the scores have no {name}; score the teacher with all its parameters (params=None)")
    matrix = source.shape if source.kind != "conv1d" else source.shape[::-1]
    if tuple(sens.shapes[name]) != tuple(matrix):
        raise PktError(
            f"{name} is {list(matrix)} in {teacher.name} but {list(sens.shapes[name])} in the scores of another model"
        )
    return source.oriented(sens[name])


def caught_by(score: Tensor, region: Region, tile: int | None) -> float:
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
