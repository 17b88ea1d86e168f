"""Regions and factors of a transfer, chosen as each part's scores arrive, so that the scores themselves can be forgotten.

What cannot be decided at once waits: with students whose layers differ in shape, or random windows (which depend on the
student's layer), the regions of every place a teacher layer may take are chosen while its scores are there, and the chosen
layers' weights are read once more at the end.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pkt import ops
from pkt.adapters import Pair
from pkt.extraction import SETTLED, factorize_targets
from pkt.files import sha256
from pkt.models import Target
from pkt.options import Factorization
from pkt.planning import STRATEGIES, Chooser, Entry, Feed, Pairing, TransferPlan
from pkt.streaming import Key


class Harvest:
    """Regions and factors of one task, taken from each part's scores as soon as they are complete.

    A record is one teacher part's choice: each target's entries by (signature, suffix), JSON, and its factors by the same key.
    Places of the student that a teacher layer may take have one signature when the same regions and factors serve them.
    """

    def __init__(self, pairing: Pairing, factorization: Factorization) -> None:
        self.pairing, self.chooser, self.factorization = pairing, Chooser(pairing), factorization
        self.teacher, self.student, self.options = pairing.teacher, pairing.student, pairing.options
        self.records: dict[Key, dict[str, Any]] = {}
        self.factors: dict[Key, dict[str, tuple[Tensor, Tensor]]] = {}
        self.ranked = pairing.ranked
        self.unsettled: dict[
            str, float
        ] = {}  # of targets whose directions the iteration has not found, once it is finished

    def places(self, layer: int) -> list[int]:
        """The student's layers that this teacher layer feeds, or may feed while the ranking is open."""
        return [place for place in range(self.pairing.count) if layer in self.pairing.layers_for(place)]

    def signature(self, place: int) -> str:
        mine = [
            [t.suffix, *(t.stored_shape if t.experts else t.shape)] for t in self.pairing.targets if t.layer == place
        ]
        drawn = place if STRATEGIES[self.options.select].per_place else ""
        return sha256(json.dumps([mine, drawn]))[:12]

    def take(self, key: Key, scores: dict[str, Tensor], weight: Callable[[str], Tensor]) -> None:
        """Choose and factorize what this part gives to the student."""
        sums = {name: ops.double_sum(score).item() for name, score in scores.items()}
        record: dict[str, Any] = {"total": sum(sums.values()), "entries": {}}
        wanted = self._wanted(key, scores)
        groups = {group for group, _, _ in wanted}

        def score_of(source: Target) -> Tensor:
            return scores[source.parameter]

        experts_of = self.chooser.expert_chooser(key if isinstance(key, int) else None, score_of)
        for group, target, feeds in wanted:
            name = f"{group}/{target.suffix}"
            entries = [
                e for f in feeds for e in self.chooser.entries(f, score_of, experts_of, whole=sums[f.source.parameter])
            ]
            record["entries"][name] = {"entries": [e.to_json() for e in entries]}
        at_once = len(groups) == 1 or not self.ranked
        factors = self._factorize(record["entries"], weight) if at_once else {}
        self.records[key], self.factors[key] = record, factors
        if isinstance(key, int) and self.ranked:
            self._forget_losers()

    def _wanted(self, key: Key, scores: dict[str, Tensor]) -> list[tuple[str, Target, list[Feed]]]:
        """(signature, target, what feeds it) for everything this part's scores decide."""
        wanted: list[tuple[str, Target, list[Feed]]] = []
        if not isinstance(key, int):
            outside = [(t, self.pairing.feeds(t, None)) for t in self.pairing.targets if t.layer is None]
            return [("", t, feeds) for t, feeds in outside if feeds and feeds[0].source.parameter in scores]
        seen: set[str] = set()
        for place in self.places(key):
            group = self.signature(place)
            if group in seen:
                continue
            seen.add(group)
            mine = [(t, self.pairing.feeds(t, key)) for t in self.pairing.targets if t.layer == place]
            wanted += [(group, target, feeds) for target, feeds in mine if feeds]
        return wanted

    def _factorize(
        self, targets: dict[str, dict[str, Any]], weight: Callable[[str], Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B for each target of one part, whose energies are filled in."""

        def matrix_of(entry: Entry) -> Tensor:
            source = self.pairing.by_module[entry.source]
            return source.oriented(weight(source.parameter), entry.expert)

        entries = {name: [Entry.from_json(e) for e in target["entries"]] for name, target in targets.items()}
        found = factorize_targets(entries, matrix_of, self.factorization)
        for name, (_, energy, unsettled) in found.items():
            targets[name]["energy"] = energy
            if unsettled > SETTLED:
                targets[name]["unsettled"] = unsettled
        return {name: (pair.A.cpu(), pair.B.cpu()) for name, (pair, _, _) in found.items()}

    def _best(self) -> dict[int, int]:
        """The student's layer -> the teacher's that feeds it, of those that are scored."""
        return self.pairing.layering.best({k: r["total"] for k, r in self.records.items() if isinstance(k, int)})

    def _forget_losers(self) -> None:
        best = set(self._best().values())
        for key in list(self.factors):
            if isinstance(key, int) and key not in best:
                self.factors[key] = {}

    def layer_map(self) -> list[int]:
        if self.pairing.fixed is not None:
            return self.pairing.fixed
        best = self._best()
        return [best[place] for place in range(self.pairing.count)]

    def finish(
        self, weights_of: Callable[[Key], contextlib.AbstractContextManager[Callable[[str], Tensor]]]
    ) -> tuple[TransferPlan, dict[str, Pair], dict[str, float]]:
        """The plan, and a pair and its energy for each target. Reads a layer again where its factors had to wait."""
        chosen = self.layer_map()
        place_of: dict[str, tuple[Key, str]] = {}
        keys: list[Key]
        for target in self.pairing.targets:
            if target.layer is None:
                name, keys = f"/{target.suffix}", [k for k in self.records if not isinstance(k, int)]
            else:
                name, keys = f"{self.signature(target.layer)}/{target.suffix}", [chosen[target.layer]]
            # A partial transfer has targets that nothing feeds.
            for k in keys:
                if name in self.records[k]["entries"]:
                    place_of[target.module] = k, name
        for key in dict.fromkeys(k for k, _ in place_of.values() if isinstance(k, int)):
            late = sorted({n for k, n in place_of.values() if k == key and n not in self.factors[key]})
            if late:
                with weights_of(key) as weight:
                    waiting = {name: self.records[key]["entries"][name] for name in late}
                    self.factors[key].update(self._factorize(waiting, weight))
        entries, pairs, energies = [], {}, {}
        for module, (part, name) in place_of.items():
            found, (A, B) = self.records[part]["entries"][name], self.factors[part][name]
            mine = [Entry.from_json({**e, "target": module}) for e in found["entries"]]
            entries += mine
            pairs[module] = Pair(A, B, mine[0].kind)
            energies[module] = found["energy"]
            if "unsettled" in found:
                self.unsettled[module] = found["unsettled"]
        layer_scores = [self.records[i]["total"] for i in range(self.teacher.num_layers)]
        return self.chooser.finish(entries, chosen, layer_scores), pairs, energies
