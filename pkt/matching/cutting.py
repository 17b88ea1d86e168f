"""A teacher's matrix, or its change since its base, on the student's units: rows and columns gathered under a lineage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pkt.matching.lineage import Lineage
from pkt.matching.matrices import Matrices
from pkt.models import Target

# What the rows and the columns of a role are units of.
_AXES = {
    "q": ("queries", "hidden"),
    "k": ("groups", "hidden"),
    "v": ("groups", "hidden"),
    "o": ("hidden", "queries"),
    "gate": ("neurons", "hidden"),
    "up": ("neurons", "hidden"),
    "down": ("hidden", "neurons"),
    "embed": ("tokens", "hidden"),
    "head": ("tokens", "hidden"),
}

# (role, teacher's layer, expert) -> a matrix of the teacher's shape
Source = Callable[[str, int | None, int | None], Tensor]


class Cutter:
    """Gathers what a student's matrices get from a teacher's. Units without a match are zero."""

    def __init__(self, found: Lineage, old: Matrices, new: Matrices) -> None:
        self.found, self.old, self.new = found, old, new

    def roles(self, target: Target) -> list[str]:
        """The roles of a student's matrix that the teacher has and whose units are matched."""
        layer = None if target.layer is None else self.found.layers[target.layer]
        return [
            role
            for role, _ in target.roles()
            if role in _AXES and not target.experts and self.old.has(role, layer) and self._matched(role, target.layer)
        ]

    def _matched(self, role: str, layer: int | None) -> bool:
        return all(axis in ("hidden", "tokens") or bool(getattr(self.found, axis)[layer or 0]) for axis in _AXES[role])

    def matrix(self, target: Target, source: Source) -> Tensor:
        """[out, in] fp32 for one of the student's matrices; roles of a fused one lie where its rows do."""
        whole = torch.zeros(target.shape)
        wanted = self.roles(target)
        layer = None if target.layer is None else self.found.layers[target.layer]
        for role, rows in target.roles():
            if role not in wanted:
                continue
            piece = self._gather(source(role, layer, None), role, target)
            place = torch.cat([torch.arange(a, b) for a, b in rows])
            whole[place] = piece
        return whole

    def factors(self, target: Target, role: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of a teacher's matrix of this role on the student's units: their product, cut."""
        rows, cols = (self._index(axis, target) for axis in _AXES[role])
        return _take(a.t(), cols).t(), _take(b, rows)

    def vector(self, name: str, source: Callable[[str], Tensor]) -> Tensor | None:
        """A norm's gain or a bias [units] of the student's by its name; None where the teacher has no such vector.

        source: the teacher's vector by its name.
        """
        layers = f"{self.new.spec.layers}."
        layer = int(name[len(layers) :].split(".")[0]) if name.startswith(layers) else None
        theirs = name
        if layer is not None:
            suffix = name[len(f"{layers}{layer}.") :]
            theirs = f"{self.old.spec.layers}.{self.found.layers[layer]}.{suffix}"
        size, whole = self.new.shapes[name][0], self.old.shapes.get(theirs)
        if whole is None or len(whole) != 1:
            return None
        owner = self.new.spec.by_module().get(name.rpartition(".")[0])
        if name.endswith(".bias") and owner is not None:
            return self._bias(owner, layer, source(theirs))
        if size == self.new.hidden and whole[0] == self.old.hidden:
            return _take(source(theirs)[:, None], _singles(self.found.hidden))[:, 0]
        return source(theirs).float() if whole[0] == size else None

    def _bias(self, owner: Target, layer: int | None, bias: Tensor) -> Tensor | None:
        """A matrix's bias; None where the teacher has not all of its roles."""
        layer = None if layer is None else self.found.layers[layer]
        if len(self.roles(owner)) != len(owner.roles()):
            return None
        whole = torch.zeros(owner.shape[0])
        for role, rows in owner.roles():
            theirs, ours = (
                torch.cat([torch.arange(a, b) for a, b in r]) for r in (self.old.index[role, layer][1], rows)
            )
            whole[ours] = _take(bias[theirs][:, None], self._index(_AXES[role][0], owner))[:, 0]
        return whole

    def _gather(self, matrix: Tensor, role: str, target: Target) -> Tensor:
        rows, cols = (self._index(axis, target) for axis in _AXES[role])
        return _take(_take(matrix, rows).t(), cols).t()

    def _index(self, axis: str, target: Target) -> list[list[int]]:
        """For each of the student's rows (or columns) those of the teacher's that it is the mean of."""
        if axis == "hidden":
            return _singles(self.found.hidden)
        layer = target.layer or 0
        if axis == "tokens":
            return self._tokens(target.shape[0])
        if axis == "neurons":
            return _singles(self.found.neurons[layer])
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
