"""What is learnt about a model while it is scored: one value, which a new start or another process is given."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class Findings:
    """How a model has to be scored, as far as is known.

    shared: parameters used more than once in a pass, whose uses are summed before the absolute value; untapped: parameters
    whose uses only autograd sees; one_by_one: samples cannot share a batch; fused: the weight of the head, where the loss
    can be had without logits.
    """

    shared: frozenset[str] = frozenset()
    untapped: frozenset[str] = frozenset()
    one_by_one: bool = False
    fused: str | None = None

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str], prefix: str = "") -> Findings:
        """What the modules tell by themselves: which of the named parameters several of them hold. prefix: as a `Scorer` has it."""
        places = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        parameters = dict(model.named_parameters(prefix))
        return cls(shared=frozenset(n for n in names if places[id(parameters[n])] > 1))

    def sharing(self, name: str) -> Findings:
        """The parameter is used more than once; a fused head, if it is one, knows of no such uses."""
        fused = None if name == self.fused else self.fused
        return replace(self, shared=self.shared | {name}, fused=fused)

    def untapping(self, name: str) -> Findings:
        fused = None if name == self.fused else self.fused
        return replace(self, untapped=self.untapped | {name}, fused=fused)

    def alone(self) -> Findings:
        return replace(self, one_by_one=True)

    def joined(self, other: Findings) -> Findings:
        """What holds for both: of two processes, or of two runs."""
        return Findings(
            self.shared | other.shared,
            self.untapped | other.untapped,
            self.one_by_one or other.one_by_one,
            self.fused if self.fused == other.fused else None,
        )

    def alike(self, names: Collection[str]) -> Findings:
        """What is learnt about a parameter of one layer holds for its like in the others: the findings for `names`."""
        shared, untapped = ({_in_any_layer(n) for n in found} for found in (self.shared, self.untapped))
        return replace(
            self,
            shared=frozenset(n for n in names if _in_any_layer(n) in shared),
            untapped=frozenset(n for n in names if _in_any_layer(n) in untapped),
        )


def _in_any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


class LearntError(Exception):
    """Something was learnt that changes how the model must be scored: begin again with `findings`."""

    def __init__(self, findings: Findings) -> None:
        super().__init__("begin again with what was learnt")
        self.findings = findings
