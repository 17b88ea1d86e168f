"""Which matrices of a teacher feed which of a student, and where in them: all that is known before any score."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pkt.errors import PktError, short_list
from pkt.models import EXPERT_PARAMETERS, HEAD_COLUMNS, HEAD_ROWS, ModelSpec, Runs, Target
from pkt.options import PlanOptions
from pkt.planning.options import Vocabulary, check_options, chosen_parts, dense_beside_experts
from pkt.planning.regions import Region, select_layers, through


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
        self, teacher: ModelSpec, student: ModelSpec, options: PlanOptions, vocabulary: Vocabulary | None = None
    ) -> None:
        check_options(options)
        self.teacher, self.student, self.options, self.vocabulary = teacher, student, options, vocabulary
        self.partial = options.partial
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
        for pattern in options.module_map or ():
            if all(_numbers(pattern, t.module) is None for t in student.targets):
                raise PktError(
                    f"module_map (--map) names {pattern}, no matrix of the student's; its names are like {_example(student)}"
                )
        if not wanted:
            raise PktError(
                f"modules={options.modules!r} chooses none of the student's matrices; their names are like "
                f"{_example(student)}"
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
        self.ranked = options.layers == "sensitivity" and self.count > 0
        self.fixed: list[int] | None = None
        if not self.ranked:
            self.fixed = self.choose_layers(None)
        self.wanted = self._leave_out(wanted)
        self.targets = [t for t in self.wanted if t.layer is None or t.layer < self.count]
        self._check()

    # -- which matrices

    def _parts_of(self, target: Target) -> tuple[tuple[str, Runs], ...]:
        patterns = self.options.module_map
        if patterns is None:
            return chosen_parts(target, self.options.modules)
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
                "; map_vocabulary= (--map-vocabulary) feeds them by the tokens that both have"
            )
            wanted = [t for t in wanted if t not in tables]
        if any(t.experts for t in wanted) and not any(t.experts for t in teacher.targets):
            self.notes.append("the student's experts are left out: the teacher has none")
            wanted = [t for t in wanted if not t.experts]
        dense = dense_beside_experts(student, wanted)
        if dense:
            self.notes.append(
                f"the student's FFNs beside its experts are left out ({dense[0].suffix}, ...): PEFT takes their names for the "
                "experts'"
            )
            wanted = [t for t in wanted if t not in dense]
        if not wanted:
            raise PktError(f"modules={self.options.modules!r} leaves nothing to transfer: {'; '.join(self.notes)}")
        return wanted

    def choose_layers(self, scores: Tensor | None) -> list[int]:
        """The teacher layer for each student layer that is fed."""
        if self.count == 0:
            return []
        given = self.options.layers
        return select_layers(given, self.teacher.num_layers, self.count, scores, seed=self.options.seed)

    def layers_for(self, place: int) -> Sequence[int]:
        """The teacher layers that may feed this layer of the student."""
        if self.fixed is not None:
            return [self.fixed[place]]
        return range(place, self.teacher.num_layers - self.count + place + 1)

    def _check(self) -> None:
        faults: dict[tuple[str, str], list[str]] = {}  # (what kind of matrix, why in any layer) -> which
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
                    alike = re.sub(r"\.\d+\.", ".*.", fault)
                    faults.setdefault((target.suffix, alike), []).append(f"{target.module} {fault}")
                    break
        if faults:
            lines = [found[0] + (f" (and {len(found) - 1} like it)" if found[1:] else "") for found in faults.values()]
            listed, count = short_list(lines), sum(map(len, faults.values()))
            raise PktError(
                f"{self.teacher.name} cannot feed {self.student.name} ({count} of {len(self.targets)} matrices):\n"
                f"  {listed}\n"
                "choose a teacher that is at least as large in every direction, leave these out with modules= (--modules "
                "all,-k,-v), or feed what fits with partial=True (--partial)"
            )

    # -- where a matrix comes from

    def possible_feeds(self) -> Iterator[Feed]:
        """Whatever may feed a matrix while the ranking of the layers is open."""
        for target in self.targets:
            for layer in [None] if target.layer is None else self.layers_for(target.layer):
                yield from self.feeds(target, layer)

    def feeds(self, target: Target, layer: int | None) -> list[Feed]:
        """What feeds a student's matrix when teacher layer `layer` does (None outside the layers)."""
        if self.options.module_map is not None:
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
        for pattern, source in (self.options.module_map or {}).items():
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
        if self.options.align_heads and any(size % s for size, s in zip(shape, step, strict=True)):
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


def _example(model: ModelSpec) -> str:
    return model.targets[0].module if model.targets else "(it has none)"


def _numbers(pattern: str, name: str) -> list[str] | None:
    """What the stars of a pattern stand for in a name, or None."""
    match = re.fullmatch(r"(\d+)".join(map(re.escape, pattern.split("*"))), name)
    return None if match is None else list(match.groups())


def steps_of(role: str, have: tuple[int, int], need: tuple[int, int], teacher: ModelSpec) -> tuple[int, int]:
    """Offsets that never cut a head: rows of q, k and v and columns of o; an axis of equal length is not cut at all."""
    head = teacher.head_dim or 1
    rows = head if role in HEAD_ROWS and have[0] != need[0] else 1
    cols = head if role in HEAD_COLUMNS and have[1] != need[1] else 1
    return rows, cols
