"""Does a student descend from its teacher, and which of the teacher's units are its own? Weights only, read a layer at a time.

Hidden units are matched by the columns of the tables [embedding; head], layers by a sample of their FFN neurons and values,
then the neurons and heads of the matched layers by all their weights. Chance is measured for the very pair: by a student whose
hidden units are randomly rotated, and by the layers that were not matched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pkt.errors import PktError
from pkt.files import MANIFEST, atomic_file, read_json, sha256, write_json
from pkt.manifest import read_manifest
from pkt.matching.layers import increasing
from pkt.matching.matrices import Matrices
from pkt.matching.rotated import procrustes
from pkt.matching.units import Evidence, assign, rotation, table_cosines, unit_rows
from pkt.matching.within import Within
from pkt.models import check_identity, other_ids, shared_vocabulary
from pkt.progress import bar
from pkt.tables import Tabular

FORMAT = "pkt-lineage-1"
BESIDE = "lineage.json"  # in the folder of a student that `pkt shrink` made
Verdict = Literal["descends", "descends but has drifted", "no lineage"]
# Rows of the tables, hidden units and units of each layer that are looked at: enough for a cosine's noise of 1/32 and less.
_TOKENS, _FEATURES, _SAMPLE = 16384, 1024, 64
_SAMPLE_FEATURES = 256
# How far between chance and 1 the layers' cosines must lie.
_KIN, _CLOSE = 0.1, 0.5


@dataclass(repr=False)
class Lineage(Tabular):
    """The teacher's unit of each student's, -1 where there is none; prints as a table.

    hidden [student's hidden]; layers [student's layers]; for each student layer: neurons (of the FFN, or of one expert after
    another, each in its own expert of the teacher's), queries (attention heads), groups (the teacher's key/value heads that one
    is the mean of), experts. tokens: (teacher's row, student's row) of the tokens in both vocabularies; None: the same rows.
    rotated: the student's hidden units are no single ones of the teacher's, but a rotation of them.
    """

    teacher: dict[str, Any]
    student: dict[str, Any]
    hidden: list[int]
    layers: list[int]
    neurons: list[list[int]] = field(default_factory=list)
    queries: list[list[int]] = field(default_factory=list)
    groups: list[list[list[int]]] = field(default_factory=list)
    experts: list[list[int]] = field(default_factory=list)
    tokens: list[tuple[int, int]] | None = None
    rotated: bool = False
    evidence: list[Evidence] = field(default_factory=list)
    verdict: Verdict = "no lineage"
    reason: str = ""

    @property
    def kin(self) -> bool:
        return self.verdict != "no lineage"

    def __repr__(self) -> str:
        return f"Lineage({self.verdict}: {self.reason})"

    def table(self) -> list[tuple[str, ...]]:
        rows = [(e.kind, f"{e.matched} of {e.total}", f"{e.cosine:.3f}", f"{e.chance:.3f}") for e in self.evidence]
        return [("units", "matched", "mean cosine", "chance"), *rows] if rows else []

    def summary(self) -> list[str]:
        lines = []
        if self.tokens is not None:
            lines.append(f"two vocabularies: the tables are compared by the {len(self.tokens)} tokens that both have")
        if self.kin:
            layers = ", ".join("none" if layer < 0 else str(layer) for layer in self.layers)
            lines.append(f"student layers are the teacher's {layers}")
        return [*lines, f"{self.verdict}: {self.reason}"]

    def save(self, path: str | Path) -> None:
        """Write one JSON file, atomically."""
        value = {"format": FORMAT, **self.__dict__, "evidence": [e.__dict__ for e in self.evidence]}
        with atomic_file(path) as scratch:
            write_json(scratch, value)

    @classmethod
    def load(cls, path: str | Path) -> Lineage:
        """Read what `save` wrote. Raises `PktError` for anything else."""
        value = read_json(Path(path))
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise PktError(f"{path} is not a lineage; make one with `pkt lineage TEACHER STUDENT --out FILE`")
        try:
            rest = {k: v for k, v in value.items() if k not in ("format", "evidence")}
            rest["tokens"] = rest["tokens"] and [(t, s) for t, s in rest["tokens"]]
            found = cls(**rest, evidence=[Evidence(**e) for e in value["evidence"]])
            for side in (found.teacher, found.student):
                _ = side["name"].strip(), side["shapes"].strip()
            if found.verdict not in get_args(Verdict):
                raise ValueError(f"{found.verdict!r} is no verdict")
            return found
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PktError(f"{path} is incomplete ({error}); make it again with `pkt lineage`") from error

    def fingerprint(self) -> str:
        """A hash of which unit is whose."""
        units = [self.hidden, self.layers, self.neurons, self.queries, self.groups, self.experts, self.tokens]
        return sha256(json.dumps(units))

    def check(self, teacher: Matrices, student: Matrices) -> None:
        """Raises `PktError` when it was made for another pair."""
        check_identity(self.teacher, teacher.spec, "the lineage's teacher side")
        check_identity(self.student, student.spec, "the lineage's student side")
        try:
            fits = all(
                len(units) in (0, count) and all(type(unit) is int and -1 <= unit < most for unit in units)
                for units, count, most in self._sizes(teacher, student)
            )
        except (IndexError, KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise PktError("the lineage names units that the two models do not have; make it again with `pkt lineage`")

    def _sizes(self, old: Matrices, new: Matrices) -> Iterator[tuple[Sequence[int], int, int]]:
        """Each list of units, how long it is (or empty), and below what its units are; -1 is a unit without a match."""
        yield self.hidden, new.hidden, old.hidden
        yield self.layers, new.spec.num_layers, old.spec.num_layers
        for place, side in enumerate((old, new)):
            rows = [pair[place] for pair in self.tokens or ()]
            yield rows, len(rows), side.index["embed", None][0].shape[0]
        for layer, theirs in enumerate(self.layers):
            mine, others = ((side.heads(i), side.experts(i)) for side, i in ((new, layer), (old, theirs)))
            down = [
                side.index["down", i][0].shape[1] for side, i in ((new, layer), (old, theirs)) if side.has("down", i)
            ]
            if self.neurons and len(down) == 2:
                yield self.neurons[layer], down[0] * max(1, mine[1]), down[1]
            if self.queries:
                yield self.queries[layer], mine[0][0], others[0][0]
            if self.groups:
                yield [0] * len(self.groups[layer]), mine[0][1], 1
                found = [unit for members in self.groups[layer] for unit in members]
                yield found, len(found), others[0][1]
            if self.experts:
                yield self.experts[layer], mine[1], others[1]


def lineage(
    teacher: Any,
    student: Any,
    *,
    tokens: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    anyway: bool = False,
    progress: bool = True,
) -> Lineage:
    """Match every unit of `student` with one of `teacher` by their weights, and say whether it descends from it.

    teacher, student: a model or a checkpoint directory. tokens: (teacher's row, student's row) of what means the same in their
    tables; None: of the tokens that both tokenizers have, where they lie beside the models and differ, and else the same rows.
    anyway: match the units of each layer where there is no lineage too. Raises `PktError` for models without an embedding or
    decoder layers, tokenizers without a common token, and weights that are not finite.

    What `pkt shrink` recorded beside `student` is taken as it is while the weights of both are still those it was made of.
    """
    old, new = Matrices(teacher), Matrices(student)
    known = _recorded(old, new)
    if known is not None:
        return known
    for side in (old, new):
        if not side.has("embed", None) or not side.spec.num_layers:
            raise PktError(
                f"{side.spec.name} has no embedding or no decoder layers that pkt knows, so nothing can be matched"
            )
    generator = torch.Generator().manual_seed(seed)
    rows = _shared_tokens(old, new) if tokens is None else list(tokens)
    found = Lineage(old.spec.identity(), new.spec.identity(), [], [], tokens=rows)
    hidden = _match_hidden(old, new, found, generator)
    with bar("matching layers", old.spec.num_layers, unit="layers", shown=progress) as advance:
        samples = _samples(old, new, hidden, generator)
        scores = samples.scores(advance)
    _judge(found, scores, samples)
    mixed = [any(side.experts(layer) for layer in range(side.spec.num_layers)) for side in (old, new)]
    if mixed[0] != mixed[1]:
        whose = ("teacher", "student") if mixed[0] else ("student", "teacher")
        found.verdict = "no lineage"
        found.reason = (
            f"the {whose[0]}'s FFNs are experts and the {whose[1]}'s are not, so neither was cut from the other's"
        )
    elif not found.kin and new.hidden <= old.hidden:
        _try_rotation(old, new, found, generator, progress)
    if new.hidden > old.hidden:
        found.reason += (
            f"; the student is the wider, {new.hidden} hidden units against {old.hidden}: are the two swapped?"
        )
    if not found.rotated and (found.kin or anyway):
        _match_layers(old, new, hidden, found, generator, progress)
    return found


def _recorded(old: Matrices, new: Matrices) -> Lineage | None:
    """The lineage beside a shrunk student, where the hashes of both models' weights are those it records."""
    folder = new.model.path
    if folder is None or not (folder / BESIDE).is_file() or not (folder / MANIFEST).is_file():
        return None
    if read_manifest(folder).get("kind") != "shrunk":
        return None
    found = Lineage.load(folder / BESIDE)
    sides = ((found.teacher, old), (found.student, new))
    return (
        found if all(then.get("fingerprint") == side.model.content()["fingerprint"] for then, side in sides) else None
    )


def _shared_tokens(old: Matrices, new: Matrices) -> list[tuple[int, int]] | None:
    """Rows of the tokens that both tokenizers have; None where ids mean the same, or a tokenizer is not at hand."""
    if not (old.model.is_named and new.model.is_named):
        return None
    try:
        tokenizers = old.model.tokenizer, new.model.tokenizer
    except PktError:
        return None
    if not other_ids(*tokenizers):
        return None
    most = [side.index["embed", None][0].shape[0] for side in (old, new)]
    shared = [(t, s) for t, s in shared_vocabulary(*tokenizers) if t < most[0] and s < most[1]]
    if not shared:
        raise PktError(
            f"the tokenizers of {old.spec.name} and {new.spec.name} share no token, so their tables cannot be compared"
        )
    return shared


def _match_hidden(old: Matrices, new: Matrices, found: Lineage, generator: torch.Generator) -> Tensor:
    """The teacher's hidden unit of each student's; sets the first line of evidence."""
    tables, rows = _tables(old, new, found.tokens, generator)
    cos = table_cosines(tables, rows)
    if not bool(torch.isfinite(cos).all()):
        raise PktError("the tables of the two models hold NaN or Inf; a checkpoint is damaged")
    hidden, values = assign(cos)
    # A part of the rows is enough for what a rotated student would give.
    few = [(t[:8192], s[:8192]) for t, s in rows]
    turn = rotation(new.hidden, generator)
    turned = [(t, s[r].float() @ turn) for (t, s), (_, r) in zip(tables, few, strict=True)]
    _, by_chance = assign(table_cosines(turned, [(t, torch.arange(len(s))) for t, s in few]))
    chance = float(by_chance[by_chance != 0].mean())
    hidden = torch.where(values >= chance, hidden, torch.full_like(hidden, -1))
    matched = hidden >= 0
    cosine = float(values[matched].mean()) if bool(matched.any()) else 0.0
    found.hidden = hidden.tolist()
    found.evidence.append(Evidence("hidden units", int(matched.sum()), len(hidden), cosine, chance))
    return hidden


def _tables(
    old: Matrices, new: Matrices, tokens: list[tuple[int, int]] | None, generator: torch.Generator
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """The rows that are compared of the embeddings and, where both have one of their own, of the heads; and their places there.

    A whole table is in memory only while its rows are taken.
    """
    roles = ["embed"] + ["head"] * (old.has("head", None) and new.has("head", None))
    tables, rows = [], []
    for role in roles:
        count = min(side.index[role, None][0].shape[0] for side in (old, new))
        pairs = torch.tensor(tokens) if tokens is not None else torch.arange(count)[:, None].expand(-1, 2)
        chosen = pairs[torch.randperm(len(pairs), generator=generator)[:_TOKENS].sort().values]
        t, s = (side.raw(role, None)[index] for side, index in zip((old, new), chosen.unbind(1), strict=True))
        if role == "head":
            t, s = (
                matrix if gain is None else matrix * gain.to(matrix.dtype)
                for matrix, gain in ((t, old.gain("head", None)), (s, new.gain("head", None)))
            )
        tables.append((t, s))
        rows.append((torch.arange(len(t)), torch.arange(len(s))))
    return tables, rows


def _samples(old: Matrices, new: Matrices, hidden: Tensor, generator: torch.Generator) -> _Samples:
    """Of some of the hidden units that are matched; of any where none is."""
    matched = (hidden >= 0).nonzero()[:, 0]
    if not len(matched):
        matched = torch.arange(len(hidden))
        hidden = torch.zeros_like(hidden)
    mine = _some(matched, _SAMPLE_FEATURES, generator)
    return _Samples(old, new, hidden[mine], mine, generator)


class _Samples:
    """A few units of every student layer, held against all of a teacher layer's.

    theirs: the teacher's hidden units, by index or direction, that the student's, `mine`, are compared with.
    """

    def __init__(self, old: Matrices, new: Matrices, theirs: Tensor, mine: Tensor, generator: torch.Generator) -> None:
        self.old, self.generator = old, generator
        self.student_units, self.teacher_units = mine, theirs
        self.kinds: list[dict[str, Tensor]] = []
        for layer in range(new.spec.num_layers):
            found = _units(new, layer, self.student_units)
            few = {k: f[_some(torch.arange(len(f)), _SAMPLE, generator)] for k, f in found.items()}
            self.kinds.append({k: unit_rows(f) for k, f in few.items()})
        if not any(self.kinds):
            raise PktError(
                f"{new.spec.name} has no FFN or values that pkt knows by name, so its layers cannot be matched"
            )

    def scores(self, advance: Any) -> Tensor:
        """Mean best cosine of the samples [teacher's layers, student's]."""
        rows = []
        for layer in range(self.old.spec.num_layers):
            units = {k: unit_rows(f) for k, f in _units(self.old, layer, self.teacher_units).items()}
            best = [{k: (f @ units[k].t()).amax(1) for k, f in mine.items() if k in units} for mine in self.kinds]
            rows.append([float(torch.stack([v.mean() for v in b.values()]).mean()) if b else 0.0 for b in best])
            advance(layer + 1)
        return torch.tensor(rows, dtype=torch.float64)

    def chance(self, layers: list[int]) -> float:
        """The same for students whose hidden units are randomly rotated."""
        turn = rotation(len(self.student_units), self.generator)
        found = []
        for j, layer in enumerate(layers[:: max(1, len(layers) // 4)]):
            mine = self.kinds[j * max(1, len(layers) // 4)]
            units = {k: unit_rows(f) for k, f in _units(self.old, layer, self.teacher_units).items()}
            for kind, features in mine.items():
                if kind in units:
                    turned = (features.unflatten(1, (-1, len(turn))) @ turn).flatten(1)
                    found.append(float((turned @ units[kind].t()).amax(1).mean()))
        return sum(found) / max(1, len(found))


def _units(side: Matrices, layer: int, hidden: Tensor) -> dict[str, Tensor]:
    """Features of a layer's units of each kind, on these hidden units."""
    found = {}
    if side.has("down", layer) and side.has("up", layer):
        experts = side.experts(layer)
        every = [side.neurons(layer, hidden, e) for e in range(experts)] if experts else [side.neurons(layer, hidden)]
        found["neurons"] = torch.cat(every)
    elif side.has("v", layer):
        # Fewer weights a unit, so chance is higher: only where there are no neurons.
        found["values"] = side.folded("v", layer, hidden)
    return found


def _some(indices: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return indices[torch.randperm(len(indices), generator=generator)[:count].sort().values]


def _judge(found: Lineage, scores: Tensor, samples: _Samples) -> None:
    """The layers and the verdict: how far they are from chance, which is the larger of two measured ones.

    A student layer that matches none counts as chance, and so not for it.
    """
    nearest = scores.argmax(0)
    others = torch.ones_like(scores, dtype=torch.bool)
    others[nearest, torch.arange(scores.shape[1])] = False
    wrong = float(scores[others].mean()) if bool(others.any()) else 0.0
    chance = max(samples.chance(nearest.tolist()), wrong)
    found.layers = increasing(scores, chance + _KIN * (1 - chance))
    chosen = torch.tensor(found.layers)
    matched = chosen >= 0
    values = scores.gather(0, chosen.clamp_min(0)[None])[0]
    kept = float(values[matched].mean()) if bool(matched.any()) else float(scores.amax(0).mean())
    layers = Evidence("layers", int(matched.sum()), len(chosen), kept, chance)
    found.evidence.append(layers)
    if layers.closeness * float(matched.double().mean()) < _KIN:
        found.layers = increasing(scores)
        found.verdict = "no lineage"
        found.reason = (
            f"the layers' weights match no better ({kept:.3f}) than those of a rotated student or of other layers "
            f"({layers.chance:.3f})"
        )
        return
    some = "its layers are" if bool(matched.all()) else f"{layers.matched} of its {layers.total} layers are"
    found.verdict = "descends" if layers.closeness >= _CLOSE else "descends but has drifted"
    found.reason = f"{some} the teacher's, at a cosine of {kept:.3f} where chance gives {chance:.3f}"


def _try_rotation(old: Matrices, new: Matrices, found: Lineage, generator: torch.Generator, progress: bool) -> None:
    """Look again with the teacher's hidden units rotated to where the student's tables are, if the tables say that they may be."""
    turn, cosine, chance = procrustes(*_tables(old, new, found.tokens, generator), generator)
    hidden = Evidence("hidden units, rotated", new.hidden, new.hidden, cosine, chance)
    if hidden.closeness < _KIN:
        return
    mine = _some(torch.arange(new.hidden), _SAMPLE_FEATURES, generator)
    samples = _Samples(old, new, turn[:, mine], mine, generator)
    with bar("matching layers, rotated", old.spec.num_layers, unit="layers", shown=progress) as advance:
        scores = samples.scores(advance)
    other = Lineage(found.teacher, found.student, [-1] * new.hidden, [], tokens=found.tokens, rotated=True)
    _judge(other, scores, samples)
    if other.kin:
        vars(found).update(vars(other), evidence=[hidden, *other.evidence], reason=f"descends, rotated: {other.reason}")


def _match_layers(
    old: Matrices, new: Matrices, hidden: Tensor, found: Lineage, generator: torch.Generator, progress: bool
) -> None:
    """Neurons, experts and heads of every matched pair of layers; adds their lines of evidence."""
    mine = _some((hidden >= 0).nonzero()[:, 0], _FEATURES, generator)
    within = Within(old, new, hidden[mine], mine, rotation(len(mine), generator))
    with bar("matching units", new.spec.num_layers, unit="layers", shown=progress) as advance:
        for j, layer in enumerate(found.layers):
            neurons, experts = within.ffn(layer, j) if layer >= 0 else ([], [])
            queries, groups = within.heads(layer, j) if layer >= 0 else ([], [])
            found.neurons.append(neurons)
            found.experts.append(experts)
            found.queries.append(queries)
            found.groups.append(groups)
            advance(j + 1)
    found.evidence += within.evidence()
