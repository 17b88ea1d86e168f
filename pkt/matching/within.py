"""The units inside of a pair of layers: FFN neurons, experts and attention heads, each held against what chance gives."""

from __future__ import annotations

import torch
from torch import Tensor

from pkt.matching.matrices import Matrices
from pkt.matching.units import Evidence, assign, cosines, unit_rows

# Units that tell what chance gives, and neurons of each expert that tell which of the teacher's it is.
_SAMPLE, _EXPERT_SAMPLE = 64, 8


class Within:
    """Matches layer after layer on the same hidden units, and keeps count; a unit below chance has no match (-1).

    theirs, mine: the teacher's hidden unit and the student's that is compared with it; turn: a rotation of as many.
    """

    def __init__(self, old: Matrices, new: Matrices, theirs: Tensor, mine: Tensor, turn: Tensor) -> None:
        self.old, self.new, self.theirs, self.mine, self.turn = old, new, theirs, mine, turn
        self.values: dict[str, list[Tensor]] = {}
        self.chances: dict[str, list[float]] = {}

    def evidence(self) -> list[Evidence]:
        """A line for each kind: the mean cosine of what was matched."""
        lines = []
        for kind, values in self.values.items():
            every = torch.cat(values)
            good = every != 0
            mean = float(every[good].mean()) if bool(good.any()) else 0.0
            chance = sum(self.chances[kind]) / len(self.chances[kind])
            lines.append(Evidence(kind, int(good.sum()), len(every), mean, chance))
        return lines

    def ffn(self, layer: int, j: int) -> tuple[list[int], list[int]]:
        """The teacher's neuron of each of the student's, and its expert of each; empty where they cannot be compared."""
        counts = self.old.experts(layer), self.new.experts(j)
        if not (self.old.has("down", layer) and self.new.has("down", j)) or bool(counts[0]) != bool(counts[1]):
            return [], []
        if not counts[1]:
            return self._neurons(layer, j, None, None), []
        experts = self._experts(layer, j, counts)
        neurons: list[int] = []
        width = self.new.index["down", j][0].shape[1]
        for expert, theirs in enumerate(experts):
            neurons += self._neurons(layer, j, expert, theirs) if theirs >= 0 else [-1] * width
        return neurons, experts

    def _neurons(self, layer: int, j: int, expert: int | None, theirs: int | None) -> list[int]:
        teacher, student = self.old.neurons(layer, self.theirs, theirs), self.new.neurons(j, self.mine, expert)
        if teacher.shape[1] != student.shape[1]:  # one of them has a gate
            return []
        index, _ = self._assign("FFN neurons", teacher, student)
        return [int(i) for i in index]

    def _assign(self, kind: str, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        index, values = assign(cosines(teacher, student))
        return self._count(kind, index, values, self._by_chance(teacher, student))

    def _count(self, kind: str, index: Tensor, values: Tensor, chance: float) -> tuple[Tensor, Tensor]:
        """The match without what is below chance, its values 0 there; all of it is counted."""
        index = torch.where(values >= chance, index, torch.full_like(index, -1))
        values = torch.where(index >= 0, values, torch.zeros_like(values))
        self.values.setdefault(kind, []).append(values)
        self.chances.setdefault(kind, []).append(chance)
        return index, values

    def _by_chance(self, teacher: Tensor, student: Tensor) -> float:
        """Mean best cosine of a student whose hidden units are randomly rotated."""
        return float(cosines(teacher, self._turned(student[:_SAMPLE])).amax(0).mean())

    def _turned(self, features: Tensor) -> Tensor:
        turned: Tensor = features.unflatten(1, (-1, len(self.turn))) @ self.turn
        return turned.flatten(1)

    def _experts(self, layer: int, j: int, counts: tuple[int, int]) -> list[int]:
        """By a few neurons of each: how near their nearest in every one of the teacher's experts is."""
        some = torch.cat([_spread(self.new.neurons(j, self.mine, e)) for e in range(counts[1])])
        each = len(some) // counts[1]
        both = torch.cat([unit_rows(some), unit_rows(self._turned(some))])
        rows = []
        for expert in range(counts[0]):
            teacher = unit_rows(self.old.neurons(layer, self.theirs, expert))
            rows.append((teacher @ both.t()).amax(0).unflatten(0, (-1, each)).mean(1))
        scores, rotated = torch.stack(rows).split(counts[1], 1)
        index, values = assign(scores)
        index, _ = self._count("experts", index, values, float(rotated.amax(0).mean()))
        return [int(i) for i in index]

    def heads(self, layer: int, j: int) -> tuple[list[int], list[list[int]]]:
        """The teacher's query head of each student's, and its key/value heads of each."""
        old, new = self.old, self.new
        (heads_t, groups_t), (heads_s, groups_s) = old.heads(layer), new.heads(j)
        if not (heads_t and heads_s) or old.spec.head_dim != new.spec.head_dim:
            return [], []
        queries_t, queries_s = old.queries(layer, self.theirs), new.queries(j, self.mine)
        by_query = cosines(queries_t, queries_s)
        kv_t, kv_s = old.groups(layer, self.theirs), new.groups(j, self.mine)
        whole, values = assign(cosines(kv_t, kv_s))
        groups = [[int(g)] if g >= 0 else [] for g in whole]
        share_t, share_s = heads_t // groups_t, heads_s // groups_s
        queries = torch.full((heads_s,), -1)
        if groups_t > groups_s:
            # A student whose groups are means of several: its query heads tell of which.
            free, _ = assign(by_query)
            means = [
                sorted({int(q) // share_t for q in free[g * share_s : (g + 1) * share_s] if q >= 0})
                for g in range(groups_s)
            ]
            mean_kv = torch.stack([kv_t[m].mean(0) if m else torch.zeros_like(kv_t[0]) for m in means])
            joined = (unit_rows(mean_kv) * unit_rows(kv_s)).sum(1)
            if float(joined.mean()) > float(values.mean()) + 0.02:
                groups, queries, values = means, free, joined
        if bool((queries < 0).all()):
            for g, (group,) in ((g, found) for g, found in enumerate(groups) if found):
                rows, cols = slice(group * share_t, (group + 1) * share_t), slice(g * share_s, (g + 1) * share_s)
                index, _ = assign(by_query[rows, cols])
                queries[cols] = torch.where(index >= 0, index + group * share_t, index)
        of_queries = by_query.gather(0, queries.clamp_min(0)[None])[0]
        of_queries = torch.where(queries >= 0, of_queries, torch.zeros_like(of_queries))
        queries, _ = self._count("attention heads", queries, of_queries, self._by_chance(queries_t, queries_s))
        # A key/value head stays as long as one of its queries does.
        kept = (queries.unflatten(0, (groups_s, -1)) >= 0).any(1)
        groups = [members if kept[g] else [] for g, members in enumerate(groups)]
        return [int(q) for q in queries], groups


def _spread(features: Tensor) -> Tensor:
    """A few rows, evenly spaced."""
    return features[torch.linspace(0, len(features) - 1, min(_EXPERT_SAMPLE, len(features))).long()]
