"""Which layers of a teacher may feed which of a student: where layers differ in kind, one of the same kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pkt.errors import PktError
from pkt.models import ModelSpec, Runs, Target
from pkt.planning.regions import select_layers

# A student's matrix in a layer, and the roles of it that are fed.
Fed: TypeAlias = tuple[Target, tuple[tuple[str, Runs], ...]]


@dataclass(frozen=True)
class _Kind:
    """Student's layers of one kind, and the teacher's that may feed them, both ascending."""

    places: list[int]
    layers: list[int]


def _kinds_of(target: Target, roles: Sequence[tuple[str, Runs]]) -> set[str]:
    """What a layer with these roles of a matrix has: its mixer's one by one, an FFN, experts (which feed a dense FFN too)."""
    if target.group == "ffn":
        return {"experts"} if target.experts else {"ffn"}
    return {role for role, _ in roles if role} if target.group == "attention" else set()


class Layering:
    """The choice of a teacher's layer for each of a student's first `count` layers."""

    def __init__(
        self, teacher: ModelSpec, student: ModelSpec, fed: Sequence[Fed], count: int, choice: Any, seed: int
    ) -> None:
        self.teacher, self.count, self.choice, self.seed = teacher, count, choice, seed
        self.ranked = choice == "sensitivity" and count > 0
        self.kinds: list[_Kind] = []
        if count and isinstance(choice, str):
            self.kinds = self._kinds(student, fed)
        self._of = {place: (kind, i) for kind in self.kinds for i, place in enumerate(kind.places)}
        self.fixed = None if self.ranked else self.choose(None)

    def _kinds(self, student: ModelSpec, fed: Sequence[Fed]) -> list[_Kind]:
        needs: list[set[str]] = [set() for _ in range(self.count)]
        for target, roles in fed:
            if target.layer is not None and target.layer < self.count:
                needs[target.layer] |= _kinds_of(target, roles)
        wanted = set().union(*needs)
        has: list[set[str]] = [set() for _ in range(self.teacher.num_layers)]
        for source in self.teacher.targets:
            if source.layer is not None:
                found = _kinds_of(source, source.roles())
                has[source.layer] |= (found | {"ffn"} if "experts" in found else found) & wanted
        # What no layer of the teacher has is told matrix by matrix.
        known = set().union(*has)
        places: dict[frozenset[str], list[int]] = {}
        for place, need in enumerate(needs):
            places.setdefault(frozenset(need & known), []).append(place)
        return [_Kind(mine, self._layers(need, has, len(mine), student)) for need, mine in places.items()]

    def _layers(self, need: frozenset[str], has: Sequence[set[str]], count: int, student: ModelSpec) -> list[int]:
        alike = [layer for layer, found in enumerate(has) if found == need]
        if len(alike) < count:
            alike = [layer for layer, found in enumerate(has) if need <= found]
        if len(alike) < count:
            raise PktError(
                f"{count} of the student's layers have {', '.join(sorted(need))}, and only {len(alike)} of the teacher's "
                f"{self.teacher.num_layers} layers ({', '.join(map(str, alike)) or 'none'}) have those; name the teacher's layer "
                f"for each of the student's {student.num_layers} with layers= (--layers 0,2,5,...), one may feed several"
            )
        return alike

    def layers_for(self, place: int) -> Sequence[int]:
        """The teacher layers that may feed this layer of the student."""
        if self.fixed is not None:
            return [self.fixed[place]]
        kind, i = self._of[place]
        return kind.layers[i : len(kind.layers) - len(kind.places) + i + 1]

    def best(self, totals: Mapping[int, float]) -> dict[int, int]:
        """The student's layer -> the teacher's that feeds it, by the sums of S known so far."""
        found: dict[int, int] = {}
        for kind in self.kinds:
            scored = sorted((layer for layer in kind.layers if layer in totals), key=lambda n: (-totals[n], n))
            found |= dict(zip(kind.places, sorted(scored[: len(kind.places)]), strict=False))
        return found

    def choose(self, scores: Tensor | None) -> list[int]:
        """The teacher layer for each student layer that is fed."""
        if self.count == 0:
            return []
        total = self.teacher.num_layers
        if not isinstance(self.choice, str):
            return select_layers(self.choice, total, self.count, None)
        found: dict[int, int] = {}
        for kind in self.kinds:
            mine = None if scores is None else scores[torch.tensor(kind.layers)]
            picked = select_layers(self.choice, len(kind.layers), len(kind.places), mine, seed=self.seed)
            found |= {place: kind.layers[i] for place, i in zip(kind.places, picked, strict=True)}
        return [found[place] for place in range(self.count)]
