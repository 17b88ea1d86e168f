"""Choosing, once there are scores: the layers, experts and regions of a pairing, and so the plan (docs/method.md §2, §3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pkt import ops
from pkt.errors import PktError
from pkt.models import Model, ModelSpec, Target, check_identity, read_roles, with_roles
from pkt.options import PlanOptions, Select
from pkt.planning.options import ModuleMap, read_map, read_vocabulary
from pkt.planning.pairing import Feed, Pairing, steps_of
from pkt.planning.regions import Asking, Region, Wanted, select_experts, selecting, together
from pkt.planning.transfer_plan import Entry, TransferPlan, spans
from pkt.progress import bar
from pkt.scoring import Sensitivity


def plan(
    sens: Sensitivity,
    teacher: Any,
    student: Any,
    *,
    layers: str | Sequence[int] = "sensitivity",
    select: Select = "window",
    modules: str = "all",
    align_heads: bool = False,
    layer_map: Sequence[int] | None = None,
    module_map: ModuleMap | None = None,
    partial: bool = False,
    map_vocabulary: bool | tuple[Any, Any] = False,
    roles: Any = None,
    seed: int = 0,
) -> TransferPlan:
    """Choose layers and regions (docs/method.md §2, §3) and check them against both models.

    teacher, student: a configuration, a model or a checkpoint directory. layers: sensitivity, first, last, random, or a list
    of teacher layers, one per student layer (`layer_map` is the same under the name people look for). select: window,
    rows_cols, weights, blocks or random. modules: groups and roles, separated by commas, "-" in front of what is left out
    (all, attention, ffn, embedding, q, k, v, o, gate, up, down: "all,-k,-v"), or a regular expression on the student's module
    names. align_heads: windows of q, k, v (rows) and o (columns) start at a head.

    Matrices feed each other by role: fused projections are cut into their roles and put together again; the most sensitive
    expert of a layer feeds a dense FFN, the most sensitive ones the student's experts, in their order. module_map: instead,
    exactly these pairs, {"teacher.*.fc1": "student.*.up"}, `*` standing for a number (for the layer's, the chosen teacher
    layer). roles: more lines for `pkt.models.ROLES`, or a JSON file with them. map_vocabulary: feed embeddings and head by
    shared token strings; True reads both directories' tokenizers, or pass (teacher's, student's). partial: where the teacher
    is smaller, feed what fits and leave zeros.

    Raises one `PktError` listing every module whose shape cannot be cut.
    """
    options = PlanOptions(
        layers=layers if layer_map is None else layer_map,
        select=select,
        modules=modules,
        align_heads=align_heads,
        module_map=read_map(module_map),
        partial=partial,
        map_vocabulary=map_vocabulary is not False,
        roles=None if roles is None else read_roles(roles),
        seed=seed,
    )
    model, target = (
        Model.of(given, "a configuration, a model, or the path of a checkpoint") for given in (teacher, student)
    )
    recorded = sens.provenance.get("teacher")
    spec = model.comparable(recorded)
    check_identity(recorded, spec, "the scores")
    pairing = Pairing(
        with_roles(spec, options.roles),
        with_roles(target.spec, options.roles),
        options,
        read_vocabulary(map_vocabulary, model, target),
    )
    made = Chooser(pairing).plan(sens)
    made.seeds = sens.provenance.get("seeds", {})
    return made


class Chooser:
    """What the scores of a pairing's teacher choose."""

    def __init__(self, pairing: Pairing) -> None:
        self.pairing = pairing

    def plan(self, sens: Sensitivity) -> TransferPlan:
        """The plan that these scores give."""
        if sens.measure != "theta_grad":
            raise PktError(
                f'these scores are of measure="{sens.measure}", and regions are chosen by Σ|θ·g|; score the teacher again '
                'with measure="theta_grad"'
            )
        scores = sens.layer_scores() if self.pairing.ranked else None
        if scores is not None and len(scores) != self.pairing.teacher.num_layers:
            raise PktError(
                f"the scores are of {len(scores)} layers, {self.pairing.teacher.name} has {self.pairing.teacher.num_layers}; "
                "they were made from another model"
            )
        chosen = self.pairing.choose_layers(scores)

        def score_of(source: Target) -> Tensor:
            return _score_of(sens, source, self.pairing.teacher)

        entries = []
        choosers = {
            layer: self.expert_chooser(layer, lambda source: expert_sums(score_of(source))) for layer in [None, *chosen]
        }
        with bar("choosing regions", len(self.pairing.targets), unit="matrices") as advance:
            for done, target in enumerate(self.pairing.targets, 1):
                layer = None if target.layer is None else chosen[target.layer]
                for feed in self.pairing.feeds(target, layer):
                    entries += together(self.entries(feed, score_of, choosers[layer], sens.tile))
                advance(done)
        return self.finish(entries, chosen, [] if sens.layers is None else sens.layer_scores().tolist())

    def expert_chooser(self, layer: int | None, sums_of: Callable[[Target], Tensor]) -> Callable[[int], list[int]]:
        """The most sensitive experts of a teacher layer, by Σ S over all an expert's matrices; summed when first asked for.

        sums_of: `expert_sums` of a source's scores.
        """
        found: list[Tensor] = []

        def best(count: int) -> list[int]:
            if not found:
                sources = [t for t in self.pairing.inside[layer if layer is not None else -1] if t.experts]
                found.append(torch.stack([sums_of(t) for t in sources]).sum(0))
            return select_experts(found[0], count)

        return best

    def entries(
        self,
        feed: Feed,
        score_of: Callable[[Target], Tensor],
        experts_of: Callable[[int], list[int]],
        tile: int | None = None,
        whole: Callable[[], float] | None = None,
    ) -> list[Asking[Entry]]:
        """The regions of a feed, of each expert where the student has experts, for `together`.

        whole: Σ S of its source, where that is known when the regions are.
        """
        source, target = feed.source, feed.target
        if not source.experts:
            return [self._entry(feed, score_of, None, None, tile, whole)]
        if not target.experts:
            return [self._entry(feed, score_of, experts_of(1)[0], None, tile, None)]
        kept = experts_of(min(source.experts, target.experts))
        return [self._entry(feed, score_of, e, (i, target.experts), tile, None) for i, e in enumerate(kept)]

    def _entry(
        self,
        feed: Feed,
        score_of: Callable[[Target], Tensor],
        expert: int | None,
        slot: tuple[int, int] | None,
        tile: int | None,
        whole: Callable[[], float] | None,
    ) -> Asking[Entry]:
        source, target, options = feed.source, feed.target, self.pairing.options
        name = f"{target.module} {feed.role}" if target.parts else target.module
        score = source.oriented(score_of(source), expert)
        part, shape = _rows_of(score, feed, tile)
        head = source.head or self.pairing.teacher.head_dim
        steps = steps_of(feed.role, shape, feed.shape, head) if options.align_heads else (1, 1)
        name = name if slot is None else f"{name} of expert {slot[0]}"
        region = yield from selecting(part, options.select, Wanted(shape, feed.shape, tile, steps, options.seed, name))
        sums = [caught_by(part, region, tile), *([ops.double_sum(score)] if whole is None else [])]
        inside, *others = (yield torch.stack(sums)).tolist()
        total = others[0] if whole is None else whole()
        return Entry(
            source.module,
            target.module,
            region.inside(feed.rows, source.shape),
            inside,
            inside / total if total else 0.0,
            target.kind,
            expert,
            feed.place,
            slot,
        )

    def finish(self, entries: list[Entry], chosen: list[int], layer_scores: list[float]) -> TransferPlan:
        """The plan of these entries, with what is to be said about them."""
        return TransferPlan(
            entries=entries,
            layer_map=chosen,
            teacher=self.pairing.teacher.identity(),
            student=self.pairing.student.identity(),
            options=self.pairing.options.as_dict(),
            layer_scores=layer_scores,
            layer_shares=layer_shares_of(entries, self.pairing.student, chosen, layer_scores),
            notes=[*self.pairing.notes, *self._expert_note(entries), *self._partial_note(entries)],
        )

    def _expert_note(self, entries: Iterable[Entry]) -> list[str]:
        one: dict[int, int] = {}
        kept: dict[int, set[int]] = {}
        counts: dict[int, int] = {}
        for e in entries:
            source = self.pairing.by_module[e.source]
            if e.expert is None or source.layer is None:
                continue
            counts[source.layer] = source.experts
            if e.target_expert is None:
                one[source.layer] = e.expert
            else:
                kept.setdefault(source.layer, set()).add(e.expert)
        notes = []
        if one:
            listed = ", ".join(f"{layer}: {expert}" for layer, expert in sorted(one.items()))
            notes.append(f"the most sensitive expert of each teacher layer feeds the FFN (layer: expert {listed})")
        if kept and all(len(experts) == counts[layer] for layer, experts in kept.items()):
            notes.append("every expert of the teacher feeds the student's of the same number")
        elif kept:
            listed = "; ".join(f"{layer}: {spans(sorted(kept[layer]))}" for layer in sorted(kept))
            notes.append(
                f"the most sensitive experts feed the student's, in their order (teacher layer: experts {listed})"
            )
        return notes

    def _partial_note(self, entries: Iterable[Entry]) -> list[str]:
        if not self.pairing.partial:
            return []
        entries = list(entries)
        fed = sum(math.prod(e.region.shape) for e in entries)
        total = sum(math.prod(t.stored_shape) for t in self.pairing.wanted)
        names = {e.target for e in entries}
        none = [t.module for t in self.pairing.wanted if t.module not in names]
        rest = (
            f"; nothing feeds {len(none)} of its {len(self.pairing.wanted)} matrices ({none[0]}, ...)" if none else ""
        )
        return [
            f"partial: {100 * fed / total:.0f}% of the student's chosen weights are fed, the others start at zero{rest}"
        ]


def expert_sums(score: Tensor) -> Tensor:
    """Σ S of every expert [experts] of a source's scores [experts, ...], on the CPU."""
    return ops.double_sum(score.flatten(1), 1).cpu()


def _rows_of(score: Tensor, feed: Feed, tile: int | None) -> tuple[Tensor, tuple[int, int]]:
    """The scores of a feed's rows and what shape of weights they stand for."""
    count = sum(b - a for a, b in feed.rows)
    shape = count, feed.source.shape[1]
    if feed.rows == ((0, feed.source.shape[0]),):
        return score, shape
    rows = feed.rows
    if tile is not None:
        if any(a % tile or b % tile for a, b in rows):
            raise PktError(
                f"{feed.source.module}: the rows for {feed.target.module} ({feed.role}) do not lie on {tile} x {tile} tiles; "
                "keep the scores themselves (no tile)"
            )
        rows = tuple((a // tile, b // tile) for a, b in rows)
        count //= tile
    return Region((count, score.shape[1]), rows, ((0, score.shape[1]),)).cut(score), shape


def _score_of(sens: Sensitivity, source: Target, teacher: ModelSpec) -> Tensor:
    name = source.parameter
    if name not in sens:
        raise PktError(f"the scores have no {name}; score the teacher with all its parameters (params=None)")
    if tuple(sens.shapes[name]) != source.stored_shape:
        raise PktError(
            f"{name} is {list(source.stored_shape)} in {teacher.name} but {list(sens.shapes[name])} in the scores of "
            "another model"
        )
    return sens[name]


def caught_by(score: Tensor, region: Region, tile: int | None) -> Tensor:
    """Σ of S in the region, fp64; of whole tiles when the scores are tile sums."""
    if tile is None:
        return ops.double_sum(region.cut(score))
    rows, cols = (tuple((a // tile, -(-b // tile)) for a, b in axis) for axis in (region.rows, region.cols))
    return ops.double_sum(Region(region.shape, rows, cols).cut(score))


def layer_shares_of(entries: list[Entry], student: ModelSpec, chosen: list[int], scores: list[float]) -> list[float]:
    """Of each chosen teacher layer's whole sensitivity, the share inside the regions."""
    if not scores:
        return []
    place = student.by_module()
    caught = [0.0] * len(chosen)
    for entry in entries:
        layer = place[entry.target].layer
        if layer is not None:
            caught[layer] += entry.score
    return [c / scores[i] if scores[i] else 0.0 for c, i in zip(caught, chosen, strict=True)]
