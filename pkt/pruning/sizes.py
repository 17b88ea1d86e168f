"""The shape that is asked for: a configuration's, or one near a number of parameters."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

from pkt.errors import PktError
from pkt.matching import Matrices, Shape, shape_of, shrunk_model
from pkt.models import Model

_STEPS = 256  # sizes between nothing and the whole
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def shape_like(old: Matrices, like: Any) -> Shape:
    """The shape of another model of the same family: a folder, its config.json, a name on the Hub, or a configuration.

    The vocabulary is not looked at: it stays the teacher's.
    """
    if isinstance(like, (str, Path)) and Path(like).is_file():
        if Path(like).name != "config.json":
            raise PktError(f"{like} is no config.json; name one, or the folder of a model of the shape that is wanted")
        like = Path(like).parent
    other = Matrices(like)
    kind, theirs = old.spec.model_type, other.spec.model_type
    if kind != theirs:
        raise PktError(
            f"{other.spec.name} is a {theirs} and {old.spec.name} a {kind}; --like takes a shape of the same family"
        )
    if other.spec.head_dim != old.spec.head_dim:
        raise PktError(
            f"{other.spec.name} has heads of {other.spec.head_dim} and {old.spec.name} of {old.spec.head_dim}; heads are kept "
            "whole, since their halves are rotated together: ask for fewer of them"
        )
    return shape_of(other)


def read_count(given: int | str) -> int:
    """A number of parameters, such as 60M or 1.2B."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMB]?)", str(given).strip().upper())
    if match is None or float(match[1]) == 0:
        raise PktError(f"params={given!r} is no number of parameters; give one such as 60M or 1.2B")
    return int(float(match[1]) * _UNITS[match[2]])


def shape_near(old: Matrices, params: int) -> Shape:
    """The shape with about so many parameters whose layers, hidden units, neurons and groups are the same share of the whole.

    Hidden units and neurons come in eights, hidden units as a multiple of the heads too; groups and layers are whole. Raises
    `PktError` for more than the model has, and for less than its smallest shape.
    """
    whole, most = shape_of(old), parameters(old.model)
    if params > most:
        raise PktError(f"{old.spec.name} has {most:,} parameters, and {params:,} are asked for; ask for fewer")

    @functools.cache
    def tried(step: int) -> tuple[Shape, int]:
        return _at(old, whole, step / _STEPS)

    low, high = 1, _STEPS
    while low < high:  # the smallest that has enough; sizes grow with the share
        middle = (low + high) // 2
        low, high = (low, middle) if tried(middle)[1] >= params else (middle + 1, high)
    shape, count = min((tried(step) for step in (low, max(1, low - 1))), key=lambda found: abs(found[1] - params))
    if not 0.5 <= count / params <= 2:
        raise PktError(
            f"the nearest to {params:,} parameters that {old.spec.name} can be shrunk to in its proportions is {count:,}; ask for "
            "that, or give the shape with --like"
        )
    return shape


def _at(old: Matrices, whole: Shape, share: float) -> tuple[Shape, int]:
    """The shape of a share of the whole, and its parameters."""

    def part(size: int, step: int) -> int:
        return min(size, max(step, round(share * size / step) * step))

    groups = part(whole.groups, 1)
    heads = groups * (whole.queries or 1)
    # Families want hidden units that can be shared out over the heads; eights suit the hardware.
    hidden = whole.hidden if share == 1 else part(whole.hidden, math.lcm(heads, 8))
    shape = Shape(hidden, part(whole.neurons, 8), groups, part(whole.layers, 1))
    try:
        made = shrunk_model(old, shape)
    except PktError:  # a family whose heads make up the hidden units
        shape = Shape(heads * (old.spec.head_dim or 1), shape.neurons, groups, shape.layers)
        made = shrunk_model(old, shape)
    return shape, parameters(made)


def parameters(model: Any) -> int:
    """How many numbers a model's weights are; tied ones count once."""
    made: Model = Model.of(model)
    return sum(math.prod(shape) for shape in made.shapes.values())
