"""Regions and factors of a transfer, chosen as each part's scores arrive, so that the scores themselves can be forgotten.

What cannot be decided at once waits: with students whose layers differ in shape, or random windows (which depend on the
student's layer), the regions of every place a teacher layer may take are chosen while its scores are there, and the chosen
layers' weights are read once more at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pkt import ops
from pkt.adapters import Pair
from pkt.extraction import SETTLED, factorize_targets
from pkt.files import sha256
from pkt.models import Target
from pkt.options import Factorization
from pkt.planning import STRATEGIES, Asking, Chooser, Entry, Feed, Pairing, TransferPlan, expert_sums, together
from pkt.ranks import ALONE, Ranks
from pkt.streaming import Key


@dataclass
class Choice:
    """What one part of the teacher gives to the student: the entries of each target, by (signature, suffix), and their pairs.

    total: Σ S of the part. energies and pairs (on the CPU) are there for the targets that are factorized, unsettled for those whose
    directions the factorization has not quite found.
    """

    total: float
    entries: dict[str, list[Entry]] = field(default_factory=dict)
    energies: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, Pair] = field(default_factory=dict)
    unsettled: dict[str, float] = field(default_factory=dict)


class Extractor:
    """Regions and factors of one task and recipe, taken from each part's scores as soon as they are complete.

    Places of the student that a teacher layer may take have one signature when the same regions and factors serve them. Of ranks
    each chooses the regions of the matrices whose scores it has and factorizes its share of them; the pairs are the first one's.
    """

    def __init__(self, pairing: Pairing, factorization: Factorization, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.pairing, self.chooser, self.factorization = pairing, Chooser(pairing), factorization
        self.choices: dict[Key, Choice] = {}
        self.unsettled: dict[str, float] = {}  # of the student's matrices, once it is finished

    def places(self, layer: int) -> list[int]:
        """The student's layers that this teacher layer feeds, or may feed while the ranking is open."""
        return [place for place in range(self.pairing.count) if layer in self.pairing.layers_for(place)]

    def signature(self, place: int) -> str:
        mine = [
            [t.suffix, *(t.stored_shape if t.experts else t.shape)] for t in self.pairing.targets if t.layer == place
        ]
        drawn = place if STRATEGIES[self.pairing.options.select].per_place else ""
        return sha256(json.dumps([mine, drawn]))[:12]

    def saved_bytes(self) -> int:
        """Bytes of the pairs in all parts' checkpoints, at most: those of layers that lose stay in theirs."""
        of_place: Counter[int | None] = Counter()
        for t in self.pairing.targets:
            of_place[t.layer] += 4 * min(self.factorization.largest, *t.shape) * sum(t.shape) * max(1, t.experts)
        signatures = [self.signature(place) for place in range(self.pairing.count)]
        total = of_place[None]
        for layer in range(self.pairing.teacher.num_layers):
            groups = {signatures[place]: of_place[place] for place in self.places(layer)}
            if self._at_once(groups):
                total += sum(groups.values())
        return total

    def _at_once(self, groups: Collection[str]) -> bool:
        """Whether a part is factorized while its scores are there: where it is known what for, or all of it is wanted."""
        return len(groups) == 1 or not self.pairing.ranked

    def take(self, key: Key, scores: Mapping[str, Tensor], weight: Callable[[str], Tensor]) -> None:
        """Choose and factorize what this part gives to the student."""
        wanted = self._wanted(key, self.ranks.joined(dict.fromkeys(scores)))
        own_sums, mine = self._choose(key, wanted, scores)
        sums, found = self.ranks.joined(own_sums), self.ranks.joined(mine)
        choice = Choice(sum(sums.values()))
        for i, (group, target, feeds) in enumerate(wanted):
            choice.entries[f"{group}/{target.suffix}"] = [e for j in range(len(feeds)) for e in found[i, j]]
        if self._at_once({group for group, _, _ in wanted}):
            self._factorize(choice, choice.entries, weight)
        self.choices[key] = choice
        self._forget_losers()

    def _choose(
        self, key: Key, wanted: Sequence[tuple[str, Target, list[Feed]]], scores: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], dict[tuple[int, int], list[Entry]]]:
        """Σ S of each matrix and vector, and the entries of those among `wanted` whose scores are here, by their places."""
        sums: dict[str, float] = {}

        def summing() -> Asking[Any]:
            if scores:
                totals = yield torch.stack([ops.double_sum(score) for score in scores.values()])
                sums.update(zip(scores, totals.tolist(), strict=True))

        def work_of(feed: Feed) -> list[Asking[Any]]:
            name = feed.source.parameter
            return self.chooser.entries(
                feed, lambda source: scores[source.parameter], experts_of, whole=lambda: sums[name]
            )

        experts_of = self.chooser.expert_chooser(
            key if isinstance(key, int) else None, self._expert_sums(wanted, scores)
        )
        works: list[tuple[tuple[int, int], Feed, Asking[Any]]] = [
            ((i, j), feed, work)
            for i, (_, _, feeds) in enumerate(wanted)
            for j, feed in enumerate(feeds)
            if feed.source.parameter in scores
            for work in work_of(feed)
        ]
        # The scores of rows that are not one run are a copy: one at a time.
        alike = [work for work in works if len(work[1].rows) == 1]
        mine: dict[tuple[int, int], list[Entry]] = {}
        _, *entries = together([summing(), *(work for _, _, work in alike)])
        apart = [work for work in works if len(work[1].rows) > 1]
        entries += [together([work])[0] for _, _, work in apart]
        for (place, _, _), entry in zip([*alike, *apart], entries, strict=True):
            mine.setdefault(place, []).append(entry)
        return sums, mine

    def _expert_sums(
        self, wanted: Sequence[tuple[str, Target, list[Feed]]], scores: Mapping[str, Tensor]
    ) -> Callable[[Target], Tensor]:
        """Σ S of a source's experts, whichever rank has its scores."""
        if self.ranks.alone:
            return lambda source: expert_sums(scores[source.parameter])
        layers = {f.source.layer for _, _, feeds in wanted for f in feeds if f.source.experts}
        sources = [t for layer in layers for t in self.pairing.inside[-1 if layer is None else layer] if t.experts]
        mine = {t.parameter: expert_sums(scores[t.parameter]) for t in sources if t.parameter in scores}
        sums = self.ranks.joined(mine)
        return lambda source: sums[source.parameter]

    def restore(self, choices: Mapping[Key, Choice]) -> None:
        """Go on from what parts gave in an earlier process, in their order."""
        self.choices = dict(choices)
        self._forget_losers()

    def _wanted(self, key: Key, scores: Collection[str]) -> list[tuple[str, Target, list[Feed]]]:
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

    def _factorize(self, choice: Choice, names: Iterable[str], weight: Callable[[str], Tensor]) -> None:
        """Put the pairs and energies of some targets of one part into its choice."""

        def matrix_of(entry: Entry) -> Tensor:
            source = self.pairing.by_module[entry.source]
            return source.oriented(weight(source.parameter), entry.expert)

        targets = {name: choice.entries[name] for name in names}
        owner = self.ranks.owners({name: sum(math.prod(e.region.shape) for e in targets[name]) for name in targets})
        mine = {name: entries for name, entries in targets.items() if owner[name] == self.ranks.rank}
        made = factorize_targets(mine, matrix_of, self.factorization)
        told = self.ranks.joined({name: (energy, unsettled) for name, (_, energy, unsettled) in made.items()})
        factors = iter(ops.fetched([factor for pair, _, _ in made.values() for factor in (pair.A, pair.B)]))
        gathered = self.ranks.gathered({n: (next(factors), next(factors), p.kind) for n, (p, _, _) in made.items()})
        pairs = {name: pair for part in gathered or [] for name, pair in part.items()}
        for name in targets:
            if name in pairs:
                choice.pairs[name] = Pair(*pairs[name])
            choice.energies[name], unsettled = told[name]
            if unsettled > SETTLED:
                choice.unsettled[name] = unsettled

    def _best(self) -> dict[int, int]:
        """The student's layer -> the teacher's that feeds it, of those that are scored."""
        return self.pairing.layering.best({k: c.total for k, c in self.choices.items() if isinstance(k, int)})

    def _forget_losers(self) -> None:
        if not self.pairing.ranked:
            return
        best = set(self._best().values())
        for key, choice in self.choices.items():
            if isinstance(key, int) and key not in best:
                choice.pairs, choice.energies = {}, {}

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
                name, keys = f"/{target.suffix}", [k for k in self.choices if not isinstance(k, int)]
            else:
                name, keys = f"{self.signature(target.layer)}/{target.suffix}", [chosen[target.layer]]
            # A partial transfer has targets that nothing feeds.
            for k in keys:
                if name in self.choices[k].entries:
                    place_of[target.module] = k, name
        for key in dict.fromkeys(k for k, _ in place_of.values() if isinstance(k, int)):
            late = sorted({n for k, n in place_of.values() if k == key and n not in self.choices[key].energies})
            if late:
                with weights_of(key) as weight:
                    self._factorize(self.choices[key], late, weight)
        entries, pairs, energies = [], {}, {}
        for module, (part, name) in place_of.items():
            choice = self.choices[part]
            entries += [dataclasses.replace(e, target=module) for e in choice.entries[name]]
            if self.ranks.first:
                pairs[module] = choice.pairs[name]
            energies[module] = choice.energies[name]
            if name in choice.unsettled:
                self.unsettled[module] = choice.unsettled[name]
        layer_scores = [self.choices[i].total for i in range(self.pairing.teacher.num_layers)]
        return self.chooser.finish(entries, chosen, layer_scores), pairs, energies
