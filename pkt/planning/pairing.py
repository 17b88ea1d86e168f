"""Which matrices of a teacher feed which of a student, and where in them: all that is known before any score."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pkt.errors import PktError, short_list
from pkt.models import EXPERT_PARAMETERS, HEAD_COLUMNS, HEAD_ROWS, ModelSpec, Runs, Target
from pkt.options import PlanOptions
from pkt.planning.layering import Layering
from pkt.planning.options import Vocabulary, check_options, chosen_parts, dense_beside_experts
from pkt.planning.regions import Region, through


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
        self._check_layers_found(wanted)
        if any(t.layer is not None for t in wanted):
            self.count = min(student.num_layers, teacher.num_layers) if self.partial else student.num_layers
        else:
            self.count = 0
        if teacher.num_layers < self.count:
            raise PktError(
                f"the teacher has {teacher.num_layers} layers, fewer than the student's {student.num_layers}; "
                "choose a deeper teacher, or feed the first layers only with partial=True (--partial)"
            )
        self.wanted = self._leave_out(wanted)
        fed = [(t, self.parts[t.module]) for t in self.wanted]
        self.layering = Layering(teacher, student, fed, self.count, options.layers, options.seed)
        self.ranked, self.fixed = self.layering.ranked, self.layering.fixed
        self.targets = [t for t in self.wanted if t.layer is None or t.layer < self.count]
        self._check()

    # -- which matrices

    def _parts_of(self, target: Target) -> tuple[tuple[str, Runs], ...]:
        patterns = self.options.module_map
        if patterns is None:
            return chosen_parts(target, self.options.modules)
        named = any(_numbers(pattern, target.module) is not None for pattern in patterns)
        return ((target.role, ((0, target.shape[0]),)),) if named else ()

    def _check_layers_found(self, wanted: Sequence[Target]) -> None:
        """Refuse to feed a model by the numbers in its matrices' names, where no list of its modules is its layers."""
        for spec in (self.teacher, self.student):
            if spec.layers is None and self.options.module_map is None and any(t.group != "embedding" for t in wanted):
                raise PktError(
                    f"{spec.name}: none of its lists of modules can be told to be its decoder layers; name what feeds what with "
                    "module_map= (--map TEACHER=STUDENT)"
                )

    def _leave_out(self, wanted: list[Target]) -> list[Target]:
        """Without what a difference between the models excludes, noted in one line each."""
        if self.student.multimodal:
            self.notes.append(
                f"the student is multimodal ({self.student.multimodal}): the adapter is of that class, only the text decoder "
                f"({self.student.layers}) with its tables is fed"
            )
        crossing = _crossing(self.student)
        wanted = self._without(wanted, lambda target: target.unadaptable)
        wanted = self._without(wanted, lambda target: _NO_TEXT if target.module in crossing else "")
        if self.options.module_map is None:
            wanted = self._without(wanted, _in_another_list)
            wanted = self._without(wanted, self._in_doubt)
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
        for whose, spec in (("teacher", teacher), ("student", student)):
            if spec.unknown:
                self.notes.append(
                    f"the {whose}'s experts are left out: they lie in a form unknown to pkt ({', '.join(spec.unknown)})"
                )
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

    def _without(self, wanted: list[Target], why: Callable[[Target], str]) -> list[Target]:
        """Without the matrices that there is a reason to leave out, noted in one line for each kind of them."""
        kept: list[Target] = []
        left: dict[tuple[str, str], list[Target]] = {}
        for target in wanted:
            reason = why(target)
            if reason:
                left.setdefault((target.suffix, reason), []).append(target)
            else:
                kept.append(target)
        for (suffix, reason), targets in left.items():
            several = f" of {len(targets)} layers" if len(targets) > 1 else ""
            self.notes.append(f"{suffix}{several} is left out: {reason}")
        if not kept:
            raise PktError(f"modules={self.options.modules!r} leaves nothing to transfer: {'; '.join(self.notes)}")
        return kept

    def _in_doubt(self, target: Target) -> str:
        """Why a matrix cannot be cut for this one: the rows or axes of one of them cannot be told. The same shape is not cut."""
        alike = [
            s
            for s in self.teacher.targets
            if (s.layer is None) == (target.layer is None)
            and (s.suffix == target.suffix or (target.role and s.role == target.role))
        ]
        if alike and all(s.suffix == target.suffix and s.stored_shape == target.stored_shape for s in alike):
            return ""
        doubts = [s for s in alike if s.doubt]
        if alike and len(doubts) == len(alike):
            return f"the teacher's {doubts[0].suffix}: {doubts[0].doubt}"
        return target.doubt

    def choose_layers(self, scores: Tensor | None) -> list[int]:
        """The teacher layer for each student layer that is fed."""
        return self.layering.choose(scores)

    def layers_for(self, place: int) -> Sequence[int]:
        """The teacher layers that may feed this layer of the student."""
        return self.layering.layers_for(place)

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
                f"{self.teacher.name} cannot feed {self.student.name} ({count} of {len(self.targets)} matrices): {listed}; "
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
        comparable = same is not None and (same.role == target.role or target.group == "embedding")
        if same is not None and comparable and not same.parts and not target.parts:
            return same, ((0, same.shape[0]),)
        matches = [
            (source, rows)
            for source in (self.inside.get(layer, []) if layer is not None else [])
            for name, rows in source.roles()
            if role and name == role and not source.doubt
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
        step = steps_of(role, have, shape, source.head or self.teacher.head_dim)
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


def _in_another_list(target: Target) -> str:
    """Why a matrix with a number of its own is in none of the decoder layers: a second stack, whose layers are not chosen."""
    inside = target.group in ("attention", "ffn") and any(part.isdigit() for part in target.module.split("."))
    return (
        "it is in another list of modules than the decoder layers; feed it with --map"
        if inside and target.layer is None
        else ""
    )


_NO_TEXT = "it works on what cross-attention brings in, and the seeds are text"


def _crossing(spec: ModelSpec) -> set[str]:
    """The matrices of cross-attention, and all of the layers that have no other attention: text does not pass them."""
    roles: dict[int | None, set[str]] = {}
    for target in spec.targets:
        roles.setdefault(target.layer, set()).update(role for role, _ in target.roles())
    only = {
        layer
        for layer, found in roles.items()
        if layer is not None and any(r.startswith("cross_") for r in found) and not found & set(HEAD_ROWS)
    }
    return {t.module for t in spec.targets if t.layer in only or any(r.startswith("cross_") for r, _ in t.roles())}


def _example(model: ModelSpec) -> str:
    return model.targets[0].module if model.targets else "(it has none)"


def _numbers(pattern: str, name: str) -> list[str] | None:
    """What the stars of a pattern stand for in a name, or None."""
    match = re.fullmatch(r"(\d+)".join(map(re.escape, pattern.split("*"))), name)
    return None if match is None else list(match.groups())


def steps_of(role: str, have: tuple[int, int], need: tuple[int, int], head: int | None) -> tuple[int, int]:
    """Offsets that never cut a head: rows of q, k and v and columns of o; an axis of equal length is not cut at all."""
    head = head or 1
    rows = head if role in HEAD_ROWS and have[0] != need[0] else 1
    cols = head if role in HEAD_COLUMNS and have[1] != need[1] else 1
    return rows, cols
