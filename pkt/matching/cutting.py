"""A teacher's matrix, or its change since its base, on the student's units: rows and columns gathered under a lineage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pkt.matching.lineage import Lineage
from pkt.matching.matrices import Matrices
from pkt.models import Runs, Target, layer_of

# What the rows and the columns of a role are units of.
_AXES = {
    "q": ("queries", "hidden"),
    "k": ("groups", "hidden"),
    "v": ("groups", "hidden"),
    "o": ("hidden", "queries"),
    "gate": ("neurons", "hidden"),
    "up": ("neurons", "hidden"),
    "down": ("hidden", "neurons"),
    "router": ("experts", "hidden"),
    "embed": ("tokens", "hidden"),
    "head": ("tokens", "hidden"),
    "positions": ("places", "hidden"),
}
# Axes whose units do not depend on the layer.
_EVERYWHERE = ("hidden", "tokens", "places")

# (role, teacher's layer, expert) -> a matrix of the teacher's shape
Source = Callable[[str, int | None, int | None], Tensor]


class Cutter:
    """Gathers what a student's matrices get from a teacher's. Units without a match are zero."""

    def __init__(self, found: Lineage, old: Matrices, new: Matrices) -> None:
        self.found, self.old, self.new = found, old, new

    def roles(self, target: Target) -> list[str]:
        """The roles of a student's matrix that the teacher has and whose units are matched."""
        layer = self._layer(target)
        if layer == -1 or target.doubt:
            return []
        return [
            role
            for role, _ in target.roles()
            if role in _AXES and self._given(role, layer, target) and self._matched(role, target.layer)
        ]

    def _layer(self, target: Target) -> int | None:
        """The teacher's layer of a student's matrix, -1 for none; None outside of the layers."""
        return None if target.layer is None else self.found.layers[target.layer]

    def _given(self, role: str, layer: int | None, target: Target) -> bool:
        source = self.old.index.get((role, layer))
        return source is not None and bool(source[0].experts) == bool(target.experts)

    def _matched(self, role: str, layer: int | None) -> bool:
        units = [getattr(self.found, axis) for axis in _AXES[role] if axis not in _EVERYWHERE]
        return all(found and found[layer or 0] for found in units)

    def matrix(self, target: Target, source: Source) -> Tensor:
        """[out, in] fp32 for one of the student's matrices, [experts, out, in] for its experts; zeros where nothing matches.

        Roles of a fused matrix lie where its rows do.
        """
        if not target.experts:
            return self._one(target, source, None, None)
        theirs = self.found.experts[target.layer or 0] if self.roles(target) else [-1] * target.experts
        return torch.stack(
            [
                self._one(target, source, *pair) if pair[1] >= 0 else torch.zeros(target.shape)
                for pair in enumerate(theirs)
            ]
        )

    def _one(self, target: Target, source: Source, expert: int | None, theirs: int | None) -> Tensor:
        whole = torch.zeros(target.shape)
        wanted, layer = self.roles(target), self._layer(target)
        for role, rows in target.roles():
            if role in wanted:
                indices = [self._index(axis, target, expert) for axis in _AXES[role]]
                piece = _take(_take(source(role, layer, theirs), indices[0]).t(), indices[1]).t()
                whole[_places(rows)] = piece
        return whole

    def factors(
        self, target: Target, role: str, a: Tensor, b: Tensor, expert: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of a teacher's matrix of this role on the student's units: their product, cut."""
        rows, cols = (self._index(axis, target, expert) for axis in _AXES[role])
        return _take(a.t(), cols).t(), _take(b, rows)

    def vector(self, name: str, source: Callable[[str], Tensor]) -> Tensor | None:
        """A norm's gain or a bias [units] of the student's by its name; None where the teacher has no such vector.

        source: the teacher's vector by its name.
        """
        layer = layer_of(name, self.new.spec.layers)
        theirs = name
        if layer is not None:
            suffix = name[len(f"{self.new.spec.layers}.{layer}.") :]
            theirs = f"{self.old.spec.layers}.{self.found.layers[layer]}.{suffix}"
        size, whole = self.new.shapes[name][0], self.old.shapes.get(theirs)
        if whole is None or len(whole) != 1:
            return None
        owner = self.new.spec.by_module().get(name.rpartition(".")[0])
        if name.endswith(".bias") and owner is not None:
            every = len(self.roles(owner)) == len(owner.roles())
            return self._bias(owner, source(theirs)) if every else None
        if size == self.new.hidden and whole[0] == self.old.hidden:
            return _take(source(theirs)[:, None], _singles(self.found.hidden))[:, 0]
        return source(theirs).float() if whole[0] == size else None

    def _bias(self, owner: Target, theirs: Tensor) -> Tensor:
        """The bias of a student's matrix, whose rows are units as the matrix's are."""
        whole = torch.zeros(owner.shape[0])
        for role, rows in owner.roles():
            given = theirs[_places(self.old.index[role, self._layer(owner)][1])]
            whole[_places(rows)] = _take(given[:, None], self._index(_AXES[role][0], owner))[:, 0]
        return whole

    def _index(self, axis: str, target: Target, expert: int | None = None) -> list[list[int]]:
        """For each of the student's rows (or columns) those of the teacher's that it is the mean of."""
        if axis == "hidden":
            return _singles(self.found.hidden)
        layer = target.layer or 0
        if axis == "tokens":
            return self._tokens(target.shape[0])
        if axis == "places":
            theirs = self.old.index["positions", None][0].shape[0]
            return [[i] if i < theirs else [] for i in range(target.shape[0])]
        if axis == "experts":
            return _singles(self.found.experts[layer])
        if axis == "neurons":
            every = self.found.neurons[layer]
            each = len(every) // max(1, target.experts)
            return _singles(every if expert is None else every[expert * each : (expert + 1) * each])
        size = self.new.spec.head_dim or 1
        heads = self.found.groups[layer] if axis == "groups" else _singles(self.found.queries[layer])
        return [[head * size + i for head in members] for members in heads for i in range(size)]

    def _tokens(self, count: int) -> list[list[int]]:
        if self.found.tokens is None:
            theirs = self.old.index["embed", None][0].shape[0]
            return [[i] if i < theirs else [] for i in range(count)]
        index: list[list[int]] = [[] for _ in range(count)]
        for teacher, student in self.found.tokens:
            index[student] = [teacher]
        return index


def _places(rows: Runs) -> Tensor:
    return torch.cat([torch.arange(a, b) for a, b in rows])


def _singles(found: Sequence[int]) -> list[list[int]]:
    return [[i] if i >= 0 else [] for i in found]


def _take(matrix: Tensor, index: list[list[int]]) -> Tensor:
    """Rows of `matrix` in fp32, each the mean of its members; zeros where it has none."""
    if max(map(len, index)) <= 1:
        first = torch.tensor([members[0] if members else -1 for members in index])
        taken = matrix[first.clamp_min(0)].float()
        taken[first < 0] = 0
        return taken
    rows = [matrix[m].float().mean(0) if m else torch.zeros(matrix.shape[1]) for m in index]
    return torch.stack(rows)
