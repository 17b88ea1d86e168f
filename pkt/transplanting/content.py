"""What is taken from the teacher: its change since its base, its own LoRA, or its difference to the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pkt.adapters import Pair, read_adapter, split_tied
from pkt.errors import PktError
from pkt.extraction.factorization import factorize_all
from pkt.matching import Cutter, Matrices
from pkt.models import Target

Kind = Literal["delta", "adapter", "difference"]


class Content(Protocol):
    """One way of making a student matrix's change [out, in]."""

    kind: Kind

    def whole(self, target: Target) -> Tensor: ...


@dataclass
class Delta:
    """(W_teacher − W_base) on the student's units: what the teacher learnt, and nothing of what it was."""

    cutter: Cutter
    base: Matrices
    kind: Kind = "delta"

    def whole(self, target: Target) -> Tensor:
        def source(role: str, layer: int | None, expert: int | None) -> Tensor:
            return self.cutter.old.raw(role, layer, expert).float() - self.base.raw(role, layer, expert).float()

        return self.cutter.matrix(target, source)

    def vector(self, name: str) -> Tensor:
        return self.cutter.old.parameter(name).float() - self.base.parameter(name).float()


@dataclass
class Difference:
    """W_teacher on the student's units minus W_student: the teacher itself, which undoes what the student became since."""

    cutter: Cutter
    student: Matrices
    kind: Kind = "difference"

    def whole(self, target: Target) -> Tensor:
        cut = self.cutter.matrix(target, self.cutter.old.raw)
        mine = target.oriented(self.student.parameter(target.parameter)).float()
        # Units without a match stay the student's own.
        known = self.cutter.matrix(
            target, lambda *where: torch.ones_like(self.cutter.old.raw(*where), dtype=torch.float32)
        )
        return torch.where(known > 0, cut - mine, torch.zeros_like(cut))


@dataclass
class Own:
    """The teacher's own LoRA, cut exactly: rows of B, columns of A."""

    cutter: Cutter
    pairs: Mapping[str, Pair]
    kind: Kind = "adapter"

    def whole(self, target: Target) -> Tensor:
        return self.cutter.matrix(target, self._source)

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
            table_in, table_out = self.cutter.factors(target, roles[0], b.t(), a.t())
            return Pair(table_out.t().contiguous(), table_in.t().contiguous(), target.kind)
        a, b = self.cutter.factors(target, roles[0], a, torch.cat([b[x:y] for x, y in rows]))
        return Pair(a.contiguous(), b.contiguous(), target.kind)

    def _source(self, role: str, layer: int | None, expert: int | None) -> Tensor:
        target, rows = self.cutter.old.index[role, layer]
        pair = self.pairs.get(target.module)
        if pair is None:
            return torch.zeros(sum(b - a for a, b in rows), target.shape[1])
        delta = (pair.B @ pair.A).float()
        delta = delta.t() if pair.kind == "embedding" else delta
        return torch.cat([delta[a:b] for a, b in rows])


def open_content(cutter: Cutter, *, base: Any = None, adapter: Any = None) -> Content:
    """The content that the given inputs allow. Raises `PktError` for a base or an adapter of another model."""
    if adapter is not None:
        read, _ = read_adapter(adapter)
        spec = cutter.old.spec
        pairs = split_tied(read, spec.head if spec.tied else None).pairs
        known = spec.by_module()
        other = [m for m in pairs if m not in known]
        if other:
            raise PktError(
                f"{adapter} adapts {other[0]}, which {spec.name} does not have; it is another model's adapter"
            )
        return Own(cutter, pairs)
    if base is None:
        return Difference(cutter, cutter.new)
    found = base if isinstance(base, Matrices) else Matrices(base)
    ours, theirs = cutter.old.shapes, found.shapes
    wrong = [n for n in ours if theirs.get(n) != ours[n]]
    if wrong:
        raise PktError(
            f"the base has {wrong[0]} as {list(theirs.get(wrong[0], ()))}, the teacher as {list(ours[wrong[0]])}; "
            "name the model that the teacher was tuned from"
        )
    return Delta(cutter, found)


def pairs_of(content: Content, targets: Sequence[Target], rank: int, seed: int) -> dict[str, tuple[Pair, float]]:
    """The pair of each target and the share of its change's squared norm that it holds; what does not change is left out.

    U Σ Vᵀ of the change, truncated to `rank`: B = U√Σ, A = √ΣVᵀ. A teacher's own LoRA keeps its rank and is exact.
    """
    found: dict[str, tuple[Pair, float]] = {}
    wholes: dict[str, Tensor] = {}
    for target in targets:
        own = content.pair(target) if isinstance(content, Own) else None
        if own is not None:
            found[target.module] = (own, 1.0)
            continue
        change = content.whole(target)
        if bool((change != 0).any()):
            wholes[target.module] = change.t() if target.kind == "embedding" else change
    kinds = {t.module: t.kind for t in targets}
    by_rank: dict[int, list[str]] = {}
    for name, matrix in wholes.items():
        by_rank.setdefault(min(rank, *matrix.shape), []).append(name)
    for each, names in by_rank.items():
        for name, made in zip(
            names, factorize_all([wholes[n] for n in names], names, each, split="sqrt", seed=seed), strict=True
        ):
            found[name] = (Pair(made.A, made.B, kinds[name]), made.energy)
    return {t.module: found[t.module] for t in targets if t.module in found}
