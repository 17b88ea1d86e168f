"""What is taken from the teacher: its change since its base, its own LoRA, or its difference to the student."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pkt.adapters import Pair, read_adapter, split_tied
from pkt.errors import PktError
from pkt.extraction.factorization import Factors, factorize_all
from pkt.matching import Cutter, Matrices, cut_factors
from pkt.models import Kind, Target
from pkt.options import Factorization

Rank: TypeAlias = int | Literal["full"]


class Difference:
    """W_teacher on the student's units minus W_student: the teacher itself, which undoes what the student became since."""

    kind = "difference"
    told = "the difference to the teacher: it undoes the student's own training since it was cut"
    nothing = "the student is the teacher on its own units already: there is nothing to transplant"

    def __init__(self, cutter: Cutter) -> None:
        self.cutter = cutter
        self.root = cutter.old  # what the student was cut from, or the nearest to it that is known

    def whole(self, target: Target) -> Tensor:
        """The change [out, in] of one of the student's matrices, [experts, out, in] of its experts, fp32."""
        cut = self.factor(target.parameter)[0] * self.cutter.matrix(target, self.cutter.old.raw)
        mine = self.cutter.new.parameter(target.parameter).float()
        mine = mine.mT if target.kind == "conv1d" else mine
        # Units without a match stay the student's own, here and in vectors.
        known = self.cutter.matrix(
            target, lambda *where: torch.ones_like(self.cutter.old.raw(*where), dtype=torch.float32)
        )
        return torch.where(known > 0, cut - mine, torch.zeros_like(cut))

    def factor(self, name: str) -> tuple[float, float]:
        """(how much larger a parameter is in the student than in the teacher, what a stored gain lacks of the gain)."""
        return self._factors.get(name, (1.0, 0.0))

    @functools.cached_property
    def _factors(self) -> dict[str, tuple[float, float]]:
        """Of those that shrinking may take larger (norm gains, Gemma's table), what the student's are nearest to.

        Others who cut models leave them as they are, and nothing is recorded of a student that is matched by its weights.
        """
        found = {}
        ways = [cut_factors(self.cutter.old, self.cutter.new, rescale) for rescale in (True, False)]
        for name in ways[0]:
            offset, known = ways[0][name][1], {1.0, *(way[name][0] for way in ways if name in way)}
            ratio = self._ratio(name, offset) if len(known) > 1 else 0.0
            if ratio > 0:
                apart = {abs(math.log(ratio / factor)): factor for factor in known}
                found[name] = apart[min(apart)], offset
        return found

    def _ratio(self, name: str, offset: float) -> float:
        """By what a parameter of the root's, on the student's units, comes nearest to the student's; 0 where it is none."""
        old, new = self.root, self.cutter.new
        table = new.index["embed", None][0]
        if name == table.parameter:
            cut: Tensor | None = self.cutter.matrix(table, old.raw)
        else:
            cut = self.cutter.vector(name, lambda n: old.parameter(n).float() + offset)
        if cut is None or not bool((cut != 0).any()):
            return 0.0
        return float(((new.parameter(name).float() + offset) * cut).sum() / cut.square().sum())

    def holds(self, target: Target) -> bool:
        """Whether a LoRA of one of the student's matrices takes its change: it is matched, and an adapter reaches it."""
        return bool(self.cutter.roles(target)) and not target.unadaptable

    def pair(self, target: Target) -> Pair | None:
        """Its factors where they need no SVD."""
        return None

    def vector(self, name: str) -> Tensor | None:
        """The change of one of the student's norms or biases [units], fp32; None where the teacher has no such vector."""
        cut = self.cutter.vector(name, self.cutter.old.parameter)
        known = self.cutter.vector(name, lambda n: torch.ones(self.cutter.old.shapes[n]))
        if cut is None or known is None:
            return None
        factor, offset = self.factor(name)
        cut = (cut + offset) * factor - offset
        return torch.where(known > 0, cut - self.cutter.new.parameter(name).float(), torch.zeros_like(cut))


class Delta(Difference):
    """(W_teacher − W_base) on the student's units: what the teacher learnt, and nothing of what it was."""

    kind = "delta"
    told = "what the teacher learnt since its base"
    nothing = "the teacher and its base have the same weights: there is nothing to transplant"

    def __init__(self, cutter: Cutter, base: Matrices) -> None:
        super().__init__(cutter)
        self.root = self.base = base

    def whole(self, target: Target) -> Tensor:
        def source(role: str, layer: int | None, expert: int | None) -> Tensor:
            return self.cutter.old.raw(role, layer, expert).float() - self.base.raw(role, layer, expert).float()

        return self.factor(target.parameter)[0] * self.cutter.matrix(target, source)

    def vector(self, name: str) -> Tensor | None:
        def source(theirs: str) -> Tensor:
            return self.cutter.old.parameter(theirs).float() - self.base.parameter(theirs).float()

        change = self.cutter.vector(name, source)
        return None if change is None else self.factor(name)[0] * change


class OwnLora(Difference):
    """The teacher's own LoRA, cut exactly: rows of B, columns of A."""

    kind = "adapter"
    told = "the teacher's own LoRA, cut"
    nothing = "the adapter changes nothing that the student has: there is nothing to transplant"

    def __init__(self, cutter: Cutter, pairs: Mapping[str, Pair]) -> None:
        super().__init__(cutter)
        self.pairs = pairs

    def whole(self, target: Target) -> Tensor:
        return self.factor(target.parameter)[0] * self.cutter.matrix(target, self._source)

    def pair(self, target: Target) -> Pair | None:
        """Its factors, cut, without an SVD; None for a matrix that the adapter leaves alone or that several feed."""
        roles = self.cutter.roles(target)
        if len(roles) != 1 or target.parts:
            return None
        layer = None if target.layer is None else self.cutter.found.layers[target.layer]
        source, rows = self.cutter.old.index[roles[0], layer]
        found = self.pairs.get(source.module)
        if found is None:
            return None
        a, b = found.A.float(), found.B.float()
        if found.kind == "embedding":
            # (B A)ᵀ is the table [vocabulary, d]: its rows are A's columns.
            table_in, table_out = self.cutter.factors(target, roles[0], self.factor(target.parameter)[0] * b.t(), a.t())
            return Pair(table_out.t().contiguous(), table_in.t().contiguous(), target.kind)
        if target.experts:
            theirs = self.cutter.found.experts[target.layer or 0]
            # An expert without a match gets no change.
            each = [
                self.cutter.factors(
                    target, roles[0], a[max(t, 0)], b[t] if t >= 0 else torch.zeros_like(b[0]), expert=e
                )
                for e, t in enumerate(theirs)
            ]
            return Pair(torch.stack([a for a, _ in each]), torch.stack([b for _, b in each]), target.kind)
        a, b = self.cutter.factors(target, roles[0], a, torch.cat([b[x:y] for x, y in rows]))
        return Pair(a.contiguous(), b.contiguous(), target.kind)

    def vector(self, name: str) -> Tensor | None:
        return None

    def _source(self, role: str, layer: int | None, expert: int | None) -> Tensor:
        target, rows = self.cutter.old.index[role, layer]
        pair = self.pairs.get(target.module)
        if pair is None:
            return torch.zeros(sum(b - a for a, b in rows), target.shape[1])
        a, b = (pair.A, pair.B) if expert is None else (pair.A[expert], pair.B[expert])
        delta = (b @ a).float()
        delta = delta.t() if pair.kind == "embedding" else delta
        return torch.cat([delta[a:b] for a, b in rows])


def open_content(cutter: Cutter, *, base: Matrices | None = None, adapter: str | Path | None = None) -> Difference:
    """The content that the given inputs allow. Raises `PktError` for an adapter of another model."""
    if adapter is not None:
        return _open_adapter(cutter, adapter)
    return Difference(cutter) if base is None else Delta(cutter, base)


def open_base(base: Any, teacher: Matrices) -> Matrices:
    """The matrices of what the teacher was tuned from. Raises `PktError` for a model of other shapes."""
    found = Matrices(base)
    ours, theirs = teacher.shapes, found.shapes
    wrong = next((n for n in ours if theirs.get(n) != ours[n]), None)
    if wrong is not None:
        raise PktError(
            f"the base has {wrong} as {list(theirs.get(wrong, ()))}, the teacher as {list(ours[wrong])}; name the model that "
            "the teacher was tuned from; if teacher and student are swapped, the teacher comes first"
        )
    return found


def _open_adapter(cutter: Cutter, adapter: str | Path) -> OwnLora:
    read, _ = read_adapter(adapter)
    spec = cutter.old.spec
    pairs = split_tied(read, spec.head if spec.tied else None).pairs
    known = spec.by_module()
    for module, pair in pairs.items():
        shape = known[module].shape if module in known else None
        rows, cols = (
            (pair.B.shape[-2], pair.A.shape[-1]) if pair.kind != "embedding" else (pair.A.shape[-1], pair.B.shape[-2])
        )
        if shape != (rows, cols):
            has = "does not have" if shape is None else f"has as {list(shape)}"
            raise PktError(
                f"{adapter} adapts {module} [{rows}, {cols}], which {spec.name} {has}; it is another model's adapter"
            )
    return OwnLora(cutter, pairs)


def pairs_of(content: Difference, targets: Sequence[Target], rank: Rank, seed: int) -> dict[str, tuple[Pair, float]]:
    """The pair of each target and the share of its change's squared norm that it holds; what does not change is left out.

    U Σ Vᵀ of the change, truncated to `rank`: B = U√Σ, A = √ΣVᵀ. A teacher's own LoRA keeps its rank and is exact. "full": the
    change itself, beside an identity.
    """
    if rank == "full":
        return {name: (pair, 1.0) for name, pair in whole_pairs(content, targets).items()}
    found: dict[str, tuple[Pair, float]] = {}
    wholes: dict[int, dict[str, Tensor]] = {}
    kinds = {t.module: t.kind for t in targets}
    for target in targets:
        own = content.pair(target)
        if own is not None:
            found[target.module] = (own, 1.0)
            continue
        change = content.whole(target)
        if bool((change != 0).any()):
            matrix = change.t() if target.kind == "embedding" else change
            wholes.setdefault(min(rank, *matrix.shape[-2:]), {})[target.module] = matrix
    for each, matrices in wholes.items():
        options = Factorization(rank=each, split="sqrt", seed=seed)
        slices = [(name, m) for name, matrix in matrices.items() for m in (matrix if matrix.ndim == 3 else [matrix])]
        made = iter(factorize_all([m for _, m in slices], [name for name, _ in slices], options))
        for name, matrix in matrices.items():
            parts = [next(made) for _ in (matrix if matrix.ndim == 3 else [matrix])]
            found[name] = _joined(parts, matrix, kinds[name])
    return {t.module: found[t.module] for t in targets if t.module in found}


def whole_pairs(content: Difference, targets: Sequence[Target]) -> dict[str, Pair]:
    """The change of each target without truncation: one factor holds it, the other is the identity."""
    found = {}
    for target in targets:
        change = content.whole(target)
        if not bool((change != 0).any()):
            continue
        matrix = (change.t() if target.kind == "embedding" else change).contiguous()
        rows, cols = matrix.shape[-2:]
        one = torch.eye(min(rows, cols)).expand(*matrix.shape[:-2], -1, -1).contiguous()
        a, b = (one, matrix) if cols <= rows else (matrix, one)
        found[target.module] = Pair(a, b, target.kind)
    return found


def vectors_of(content: Difference, new: Matrices) -> dict[str, Tensor]:
    """The change, fp32, of each parameter of the student's that changes and that no LoRA of matrices holds, by its name.

    Norms and biases [units], routers, tables of positions, and matrices that no adapter reaches.
    """
    found = {name: content.vector(name) for name, shape in new.shapes.items() if len(shape) == 1}
    for target in (*new.others, *(t for t in new.spec.targets if t.unadaptable)):
        change = content.whole(target)
        found[target.parameter] = change.mT if target.kind == "conv1d" else change
    return {name: change for name, change in found.items() if change is not None and bool((change != 0).any())}


def _joined(parts: Sequence[Factors], matrix: Tensor, kind: Kind) -> tuple[Pair, float]:
    """The pair of a matrix, or of experts in one parameter, and the share of its squared norm that it holds."""
    if matrix.ndim == 2:
        return Pair(parts[0].A, parts[0].B, kind), parts[0].energy
    sizes = matrix.double().square().sum((1, 2))
    held = sum(part.energy * float(size) for part, size in zip(parts, sizes, strict=True))
    return Pair(torch.stack([p.A for p in parts]), torch.stack([p.B for p in parts]), kind), held / float(sizes.sum())
