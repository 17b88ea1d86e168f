"""What a start costs before training, as a share of the training: counted, so that the same study is charged the same anywhere.

A unit is one pass of a token through a model, forward: its matrices' elements. Reading a teacher by S takes four (forward twice,
backward into inputs and weights), a gradient three, a choice of α a forward pass for each α; a step of LoRA two. Decompositions
and matching are left out: they do not grow with the rows. What a clock says stands beside it in the results.
"""

from __future__ import annotations

import math

from pkt.models import ModelSpec
from pkt.starting import ALPHAS, BEYOND
from pkt.studying.schema import OwnStart, PlainLora, StartOptions, Transfer, Transplant

FORWARD, LEARNING, GRADIENT, READING = 1, 2, 3, 4
SEARCH = len(ALPHAS) + len(BEYOND)
_OWN = {"lora-ga": GRADIENT, "eva": FORWARD, "spectral": GRADIENT + SEARCH}
_INITS = {"corda": FORWARD, "eva": FORWARD, "lora_ga": GRADIENT}  # of PEFT's, those that are shown rows


def size(spec: ModelSpec) -> int:
    """Elements of the matrices that a token is multiplied by; all experts count."""
    tables = [t for t in spec.targets if t.kind == "embedding"]
    whole = sum(math.prod(t.stored_shape) for t in spec.targets if t.kind != "embedding")
    return whole + (sum(math.prod(t.stored_shape) for t in tables) if spec.tied else 0)


def share(start: StartOptions, student: ModelSpec, teacher: ModelSpec | None, *, seeds: int, learnt: float) -> float:
    """What making a start costs, over what its training does. seeds: tokens it is made of; learnt: tokens of the whole training."""
    units = 0.0
    if isinstance(start, Transfer):
        assert teacher is not None
        units = READING * size(teacher) * seeds
    elif isinstance(start, Transplant) and start.needs_seeds:
        units = SEARCH * size(student) * seeds
    elif isinstance(start, OwnStart):
        units = _OWN.get(start.how, 0) * size(student) * seeds
    elif isinstance(start, PlainLora):
        units = _INITS.get(start.init, 0) * size(student) * seeds
    return round(units / (LEARNING * size(student) * max(learnt, 1.0)), 3)
