"""Whether a student looks like its teacher's descendant, from so little of their weights that it can be asked on the way.

`lineage` is the judge; this misses students whose first and last layers are not the teacher's, and is meant to claim nothing wrong.
"""

from __future__ import annotations

from typing import Any

import torch

from pkt.matching.matrices import Matrices
from pkt.matching.units import Evidence, cosines, rotation, table_cosines
from pkt.models import Model

# Rows of the embeddings, hidden units and neurons that are looked at.
_ROWS, _UNITS, _NEURONS = 2048, 256, 64
# How far between chance and 1 the neurons' cosine must lie: further than `lineage` asks.
_CLEAR = 0.25


def looks_kin(teacher: Any, student: Any) -> Evidence | None:
    """The match of the first or the last layers' neurons where it is clear; None where it is not or little cannot tell.

    Asked only of decoders of one family with tables of one height, both here and stored tensor by tensor. Reads the first rows
    of the embeddings and the gate and up matrices of two layers of each: some 3% of an 8B pair.
    """
    models = [Model.of(teacher), Model.of(student)]
    if not all(model.module is not None or model.is_stored_one_by_one for model in models):
        return None
    old, new = (Matrices(model) for model in models)
    if (old.spec.model_type, old.spec.vocab_size) != (new.spec.model_type, new.spec.vocab_size):
        return None
    if not (old.has("embed", None) and new.has("embed", None) and old.spec.num_layers and new.spec.num_layers):
        return None
    mine, theirs = _units(old, new)
    if len(mine) < 2:
        return None
    turn = rotation(len(mine), torch.Generator().manual_seed(0))
    ends = {(0, 0), (old.spec.num_layers - 1, new.spec.num_layers - 1)}
    found = [e for t, s in ends if (e := _match(old, new, t, s, theirs, mine, turn)) is not None]
    best = max(found, key=lambda e: e.closeness, default=None)
    return best if best is not None and best.closeness >= _CLEAR else None


def _units(old: Matrices, new: Matrices) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's hidden units whose columns are the surest matches, and the teacher's units they match."""
    sides = [side.model.rows(side.index["embed", None][0].parameter, _ROWS) for side in (old, new)]
    every = torch.arange(len(sides[0]))
    cos = table_cosines([(sides[0], sides[1])], [(every, every)])
    values, best = cos.max(0)
    mutual = (cos.argmax(1)[best] == torch.arange(cos.shape[1])).nonzero()[:, 0]
    mine = mutual[values[mutual].argsort(descending=True)[:_UNITS]]
    return mine, best[mine]


def _match(
    old: Matrices,
    new: Matrices,
    layer_t: int,
    layer_s: int,
    theirs: torch.Tensor,
    mine: torch.Tensor,
    turn: torch.Tensor,
) -> Evidence | None:
    """How well the student's neurons match the teacher's in a pair of layers, and what a rotated student would give."""
    roles = [r for r in ("gate", "up") if old.has(r, layer_t) and new.has(r, layer_s)]
    if not roles or any(side.index[roles[0], j][0].experts for side, j in ((old, layer_t), (new, layer_s))):
        return None
    teacher = torch.cat([old.folded(role, layer_t, theirs) for role in roles], 1)
    student = torch.cat([new.folded(role, layer_s, mine) for role in roles], 1)[:_NEURONS]
    turned = (student.unflatten(1, (-1, len(turn))) @ turn).flatten(1)
    cosine, chance = (float(cosines(teacher, side).amax(0).mean()) for side in (student, turned))
    return Evidence("FFN neurons", len(student), len(student), cosine, chance)
